"""The compiled CPU kernel of the dense loss: tensors in, tensors filled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.ops.dense import Inputs, stats_size

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
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def detail() -> str:
    """What the kernel runs with."""
    isas = ", ".join(_core.supported_isas())
    return f"C++ kernel, {_core.isa()} of {isas}, {torch.get_num_threads()} threads"


def _view(x: Tensor) -> _core.View:
    there = int(x.untyped_storage().nbytes()) - int(x.storage_offset()) * x.element_size()
    return _core.View(x.data_ptr(), _DTYPE_NAMES[x.dtype], x.shape, x.stride(), there)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _call(
    passes: str, student: Tensor, inputs: Inputs, outputs: dict[str, Tensor | None], *, dtemperature: bool = False
) -> None:
    """``outputs`` are the kernel's named outputs and coefficients, (...) or (..., V) tensors or None."""
    per_token = {
        k: getattr(inputs, k).contiguous()
        for k in ("labels", "counted", "teacher_weights", "kept_ids", "kept_values", "kept_per_row")
        if getattr(inputs, k) is not None
    }
    teachers = [_contiguous_rows(t) for t in inputs.teachers]
    held = per_token | {k: v if k == "grad" else v.contiguous() for k, v in outputs.items() if v is not None}
    _core.dense(
        passes=passes,
        student=_view(student),
        teachers=[_view(t) for t in teachers],
        temperature=inputs.temperature.item(),
        names=inputs.names,
        weights=inputs.weights,
        parameters=inputs.parameters,
        mix_logits=inputs.mix_logits,
        columns=inputs.columns,
        label_smoothing=inputs.label_smoothing,
        kept_columns=inputs.kept_columns,
        tail_rule=inputs.tail_rule,
        values_with_dtemperature=dtemperature,
        threads=torch.get_num_threads(),
        **{k: _view(v) for k, v in held.items()},
    )


def run(student: Tensor, inputs: Inputs, **outputs: Tensor | None) -> None:
    """One call; ``stats`` together with ``grad`` asks for the gradient of an earlier one."""
    later = outputs.get("stats") is not None and outputs.get("grad") is not None
    _call("gradient" if later else "all", student, inputs, outputs)


# The kernel's row of stats: at tau (high, low), at 1 (high, low), sum student, columns present; (high, low) of each
# teacher. High and low add up to the log2 of a sum of exponentials.


def sums(student: Tensor, inputs: Inputs) -> Tensor:
    """Pass 1 over the columns that are here; see :class:`kdfast.ops.dense.Launcher`."""
    student = _contiguous_rows(student)
    shape = student.shape[:-1]
    stats = torch.empty((*shape, stats_size(inputs)), dtype=torch.float32)
    logit_sum = torch.empty(shape, dtype=torch.float32)
    _call("sums", student, inputs, {"stats": stats, "logit_sum": logit_sum})
    s = stats.double()

    def together(high: Tensor, low: Tensor) -> Tensor:  # -inf, of columns without mass, has no low part
        return torch.where(high == -math.inf, high, high + low)

    parts = [together(s[..., 0], s[..., 1]), together(s[..., 2], s[..., 3]), logit_sum.double(), s[..., 5]]
    return torch.stack([*parts, *together(s[..., 6::2], s[..., 7::2]).unbind(-1)], -1)


def stats_of(totals: Tensor, sum_student: Tensor, inputs: Inputs) -> Tensor:
    """The kernel's stats from totals over all columns; see :class:`kdfast.ops.dense.Launcher`."""

    def halves(x: Tensor) -> list[Tensor]:
        high = x.float()
        return [high, torch.where(high.isfinite(), x - high.double(), 0.0).float()]

    weight = inputs.weights[0] if len(inputs.weights) == 1 else 1.0  # the kernel multiplies by a single term's later on
    known = (sum_student / weight if weight else sum_student).float()
    columns = [*halves(totals[..., 0]), *halves(totals[..., 1]), known, totals[..., 3].float()]
    for k in range(4, totals.shape[-1]):
        columns += halves(totals[..., k])
    return torch.stack(columns, -1)


def values(student: Tensor, inputs: Inputs, totals: Tensor, *, dtemperature: bool) -> Tensor:
    """Pass 2 over the columns that are here; see :class:`kdfast.ops.dense.Launcher`."""
    student = _contiguous_rows(student)
    out = torch.empty((*student.shape[:-1], 7), dtype=torch.float32)
    stats = stats_of(totals, torch.zeros(student.shape[:-1], dtype=torch.float64), inputs)
    _call("values", student, inputs, {"stats": stats, "values": out}, dtemperature=dtemperature)
    return out


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


def sort_rows(x: Tensor, values: Tensor, order: Tensor | None) -> None:
    """Fills ``values``, and ``order`` where asked for, (n, V) contiguous each, with the rows of x sorted descending."""
    _core.sort_rows(_view(x), _view(values), None if order is None else _view(order), torch.get_num_threads())


def transpose(x: Tensor, out: Tensor) -> None:
    """Fills ``out`` (n, columns, rows) with the transposed matrices of ``x`` (n, rows, columns)."""
    _core.transpose(_view(x), _view(out), torch.get_num_threads())
