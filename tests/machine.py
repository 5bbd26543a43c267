"""What this run tests: the backends of this machine, and the kernels among them.

With TRITON_INTERPRET=1 in the environment the kernels are those of Triton, on the CPU, and nothing else is tested: the
interpreter has to be chosen before Triton is imported, and would slow the rest down. With KDFAST_TEST_DEVICE=cuda they
run on the GPU, and tensors are made there.
"""

from __future__ import annotations

import os

import pytest
import torch

try:
    from kdfast import _core
    from kdfast.ops.eager import TRACING
except ImportError:
    _core, TRACING = None, (0, 0)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("KDFAST_TEST_DEVICE", "cpu")
TRITON = INTERPRETING or DEVICE == "cuda"
ISAS = _core.supported_isas() if _core is not None else []

#: The backend whose kernels are tested, and its variants: instruction sets, or the one there is.
KERNEL = "triton" if TRITON else "cpu"
VARIANTS = ["triton"] if TRITON else ISAS
BACKENDS = ["triton"] if TRITON else ["reference", *(f"cpu-{isa}" for isa in ISAS)]

#: Marks of tests around the kernels, to which it makes no difference whose they are.
ONCE = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(INTERPRETING, reason="whose kernels they are makes no difference"),
]
#: The same, of tests that start processes and give each a device of its own.
ONCE_ON_THE_CPU = [*ONCE, pytest.mark.skipif(DEVICE != "cpu", reason="several processes and one GPU")]

#: Whether torch's compiler takes a loss into its graph; it goes around the loss before.
TRACES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= TRACING


def choose(variant, monkeypatch):
    """Make calls of the tested kernels take this variant."""
    if not TRITON:
        monkeypatch.setenv("KDFAST_FORCE_ISA", variant)
