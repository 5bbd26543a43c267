"""docs/methods: one page for each method, as the docstrings have it, whose examples run."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from kdfast import methods
from kdfast.methods import Loss, Term
from kdfast.methods.response import LearnedTemperature

DOCS = Path(__file__).parents[2] / "docs"
NEEDED = ("When to use", "Cost", "Source", "Example")
WITHOUT_A_PAPER = {"CrossEntropy"}


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "generate", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


PAGES = sorted(path for path in (DOCS / "methods").glob("*.md") if path.name != "README.md")


def test_pages_are_those_of_the_docstrings(generate):
    made = generate.pages()
    assert {path.name for path in (DOCS / "methods").glob("*.md")} == set(made)
    for name, text in made.items():
        assert (DOCS / "methods" / name).read_text(encoding="utf-8") == text, f"{name} is not up to date: make docs"


def test_every_method_has_a_page_with_all_sections(generate):
    public = {getattr(methods, name) for name in methods.__all__}
    losses = {one for one in public if inspect.isclass(one) and issubclass(one, Loss)} - {Loss, Term}
    losses.add(LearnedTemperature)
    paged = {one for page in generate.PAGES for one in page.classes}
    assert losses == paged
    functions = {one for one in public if inspect.isfunction(one) and one.__name__.endswith("_loss")}
    assert functions <= {one for page in generate.PAGES for one in page.functions}
    for one in losses:
        found = generate.sections(one)
        inherited = {"Source"} if one is methods.WTTM else set()  # on the page of TTM
        missing = set(NEEDED) - set(found) - inherited - ({"Source"} if one.__name__ in WITHOUT_A_PAPER else set())
        assert not missing, f"{one.__name__} lacks {missing}"
        assert all(found.values()), one.__name__


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_examples_run(path):
    blocks = re.findall(r"### Example\n\n```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) < 25
        lines = block.splitlines()
        # What the last line gives stands below it in a comment.
        said = []
        while lines[-1].startswith("# "):
            said.insert(0, lines.pop().removeprefix("# "))
        scope: dict[str, object] = {}
        exec("\n".join(lines[:-1]), scope)
        expected = eval("\n".join(said), scope)
        found = eval(lines[-1].partition("  #")[0], scope)
        assert found == expected, path.name


def test_links_lead_somewhere():
    for path in [*DOCS.glob("methods/*.md"), DOCS / "choosing.md"]:
        for target in re.findall(r"\]\(([^)#]+?\.md)(?:#[\w-]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_markdown_of_a_docstring(generate):
    class Sample(nn.Module):
        """Formula :class:`KD`, ``x``.

        Per token::

            a = b

        Args:
            one: first
                and more.

        Example:
            >>> torch.ones(1).item()
            1.0
        """

    text = "\n\n".join(generate.body(Sample, "here"))
    assert "Formula [`KD`](kd.md), `x`." in text
    assert "Per token:\n\n```text\na = b\n```" in text
    assert "- `one`: first and more." in text
    assert "```python\nimport torch\n\ntorch.ones(1).item()\n# 1.0\n```" in text
    assert torch.ones(1).item() == 1.0
