"""The documentation runs: docstring examples, and the loops that the README shows."""

import doctest
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kdfast

README = Path(__file__).parents[2] / "README.md"
LARGE_VOCABULARY = README.parent / "docs" / "large-vocabulary.md"
VOCABULARIES = README.parent / "docs" / "different-vocabularies.md"
DISTILLER = README.parent / "docs" / "distiller.md"
PACKAGE = Path(kdfast.__file__).parent
MODULES = sorted(
    "kdfast." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


class Finder(doctest.DocTestFinder):
    """Finds the examples of public classes, too, which call the package their module."""

    def _from_module(self, module, found):
        return getattr(found, "__module__", None) == "kdfast" or super()._from_module(module, found)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, monkeypatch):
    monkeypatch.setattr(doctest, "DocTestFinder", Finder)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def blocks(page: Path = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_readme_replacement_has_the_relation_it_states():
    torch.manual_seed(0)
    scope = {
        "F": F,
        "student": torch.randn(6, 50, requires_grad=True),
        "teacher": torch.randn(6, 50),
        "labels": torch.randint(0, 50, (6,)),
        "T": 2.0,
        "alpha": 0.9,
    }
    replacement = blocks()[0]
    exec(replacement, scope)
    before = "\n".join(
        line.removeprefix("# before:").lstrip("# ") for line in replacement.splitlines() if line[:1] == "#"
    )
    exec(before.replace("loss =", "eager ="), scope)
    torch.testing.assert_close(scope["loss"], scope["eager"])
    assert scope["student"].grad is not None


def test_readme_causal_language_model():
    def model(ids):
        return SimpleNamespace(logits=torch.nn.functional.one_hot((ids + 1) % 40, 40).float() * 9)

    ids = torch.arange(10).repeat(2, 1)
    scope = {"torch": torch, "kdfast": kdfast, "model": model, "teacher": model, "input_ids": ids}
    exec(blocks()[1], scope)
    assert scope["loss"] < 0.05  # a model that counts is right about the next token only if the two are aligned


def test_different_vocabularies(capsys):
    padded, aligned = blocks(VOCABULARIES)
    exec(padded, scope := {})
    assert scope["student"].grad[:, :151936].isfinite().all()
    exec(aligned, scope := {})
    assert 0 < scope["uld"] <= 2
    assert all(parameter.grad.isfinite().all() for parameter in scope["student"].parameters())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[0].startswith("'Di")


def test_large_vocabulary():
    example, with_heads = blocks(LARGE_VOCABULARY)
    exec(example, scope := {})
    assert scope["weight"].grad.isfinite().all()
    assert scope["hidden"].grad.abs().sum() > 0
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

    def model():
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=1000, **shape))

    ids = torch.randint(1000, (2, 7))
    scope = {"student": model(), "teacher": model(), "ids": ids, "labels": ids, "mask": torch.ones_like(ids)}
    exec(with_heads, scope)
    assert scope["student"].lm_head.weight.grad.abs().sum() > 0


def test_distiller():
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(5, (6,))
    scope = {
        "torch": torch,
        "student": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)),
        "teacher": torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)),
        "loader": [(x, y)] * 20,
        "log": [],
        "x": x,
        "y": y,
    }
    scope["optimizer"] = torch.optim.SGD(scope["student"].parameters(), lr=0.5)
    for example in blocks(DISTILLER):
        exec(example, scope)
    assert scope["log"][-1] < 0.5 * scope["log"][0]
    assert "losses.hint.projector.weight" not in scope["checkpoint"]["student"]
    assert "hint.projector.weight" in scope["checkpoint"]["distiller"]["losses"]
