"""What `import kdfast` brings and what it leaves for later; what earlier versions of it had kept."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast

FORMER = Path(__file__).parent / "former"


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_is_left_until_something_needs_it():
    code = "import kdfast, kdfast.cli, sys; dir(kdfast); kdfast.__version__; print('torch' in sys.modules)"
    assert in_a_process(code) == "False"


@pytest.mark.parametrize(
    "order",
    [
        "import kdfast; import torch",
        "import torch; import kdfast",
        "from kdfast.integrations import huggingface; import kdfast, torch; kdfast.PackedTargets",
    ],
)
def test_the_operators_are_there_in_any_order_and_dynamo_is_not(order):
    code = f"""{order}
import sys
ops, unpack = torch.ops.kdfast, torch._C._dispatch_dump("kdfast::unpack")
print(ops.dense_fused, ops.head_fused, ops.uld_forward, "CPU: registered" in unpack, "torch._dynamo" in sys.modules)"""
    assert in_a_process(code) == "kdfast.dense_fused kdfast.head_fused kdfast.uld_forward True False"


def test_every_public_name_is_an_attribute():
    names = [*kdfast.__all__, "cache.job", "integrations"]
    each = ", ".join(f"kdfast.{name}" for name in names)
    assert in_a_process(f"import kdfast; print(all(x is not None for x in [{each}]))") == "True"
    assert set(kdfast.__all__) <= set(dir(kdfast))


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'kdfast' has no attribute 'distil_loss'"):
        kdfast.distil_loss  # noqa: B018


def test_the_function_stands_before_the_module_of_its_name():
    from kdfast.soft_targets import Method  # noqa: F401  # which makes the module an attribute of the package

    assert kdfast.soft_targets is sys.modules["kdfast.soft_targets"].soft_targets


def test_public_classes_are_pickled_under_the_package():
    for name in ("CacheError", "DistillLoss", "DistillTerms", "Distiller", "Divergence", "LMHead", "SparseTargets"):
        assert getattr(kdfast, name).__module__ == "kdfast"
        assert pickle.loads(pickle.dumps(getattr(kdfast, name))) is getattr(kdfast, name)


def test_pickles_of_the_first_layout():
    found = pickle.loads((FORMER / "objects.pkl").read_bytes())
    assert found["sparse"].dense().tolist() == [[0, pytest.approx(0.5), 0, pytest.approx(0.25), 0]]
    assert found["head"].logits().tolist() == [[pytest.approx(3 * torch.tanh(torch.tensor(2 / 3)).item())] * 5]
    assert found["divergence"] == kdfast.Divergence("jsd", beta=0.25)
    assert found["terms"].loss == pytest.approx(0, abs=1e-6)
    assert type(found["terms"]) is kdfast.DistillTerms
    assert found["loss"].options == {"temperature": 2.0}
    assert found["packed"].shape == (1, 2)
    assert (found["error"].code, found["error"].key) == ("corrupt", "k")


def test_a_program_exported_from_the_first_layout():
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13):
        pytest.skip("the program was written by torch 2.13")
    code = f"""import kdfast, torch
step = torch.export.load({str(FORMER / "program.pt2")!r}).module()
s, t, y = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([0, -100, 6])
print(torch.equal(step(s, t, y), kdfast.distill_loss(s, t, y, temperature=2.0)))"""
    assert in_a_process(code) == "True"
