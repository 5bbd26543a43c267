"""The compiled CPU kernel of the dense loss: tensors in, tensors filled."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.dense import Inputs

#: Why there is no compiled kernel, or None where there is.
EXTENSION_MISSING: str | None = None
try:
    from kdfast import _core
except ImportError as error:  # a source tree whose extension was not built; the registry says so and goes on without
    _core = None  # type: ignore[assignment]
    EXTENSION_MISSING = f"the compiled extension is missing ({error})"

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.bool: "bool",
}


def detail() -> str:
    """What the kernel runs with."""
    isas = ", ".join(_core.supported_isas())
    return f"C++ kernel, {_core.isa()} of {isas}, {torch.get_num_threads()} threads"


def _view(x: Tensor) -> _core.View:
    return _core.View(x.data_ptr(), _DTYPE_NAMES[x.dtype], x.shape, x.stride())


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def run(student: Tensor, inputs: Inputs, **outputs: Tensor | None) -> None:
    """One call; ``outputs`` are the kernel's named outputs and coefficients, (...) or (..., V) tensors or None."""
    backward = outputs.get("stats") is not None and outputs.get("grad") is not None
    labels, counted, weights = (
        x if x is None else x.contiguous() for x in (inputs.labels, inputs.counted, inputs.teacher_weights)
    )
    teachers = [_contiguous_rows(t) for t in inputs.teachers]
    held = {k: v if k == "grad" else v.contiguous() for k, v in outputs.items() if v is not None}
    _core.dense(
        backward=backward,
        student=_view(student),
        teachers=[_view(t) for t in teachers],
        teacher_weights=None if weights is None else _view(weights),
        labels=None if labels is None else _view(labels),
        counted=None if counted is None else _view(counted),
        temperature=inputs.temperature.item(),
        names=inputs.names,
        weights=inputs.weights,
        parameters=inputs.parameters,
        mix_logits=inputs.mix_logits,
        columns=inputs.columns,
        label_smoothing=inputs.label_smoothing,
        threads=torch.get_num_threads(),
        **{k: _view(v) for k, v in held.items()},
    )


def fresh_gradient(student: Tensor) -> Tensor:
    """Memory for a gradient, in huge pages where the system has them."""
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _core.advise_huge_pages(_view(grad))
    return grad


def scale(grad: Tensor, factor: Tensor) -> None:
    """``grad *= factor`` in place; nothing is done for a factor of 1."""
    value = factor.item()
    if value != 1.0:
        _core.scale(_view(grad), value, torch.get_num_threads())
