"""The compiled CPU kernel of the dense loss: tensors in, tensors filled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.ops.dense.inputs import Inputs, stats_size
from kdfast.views import _core, classes_apart, kernel_rows, view


def detail() -> str:
    """What the kernel runs with."""
    isas = ", ".join(_core.supported_isas())
    threads = torch.get_num_threads()
    return f"C++ kernel, {_core.isa()} of {isas}, {threads} thread{'s' * (threads != 1)}"


def _call(
    passes: str, student: Tensor, inputs: Inputs, outputs: dict[str, Tensor | None], *, dtemperature: bool = False
) -> None:
    """``outputs`` are the kernel's named outputs and coefficients, (...) or (..., V) tensors or None."""
    per_token = {
        k: getattr(inputs, k).contiguous()
        for k in ("labels", "counted", "teacher_weights", "kept_ids", "kept_values", "kept_per_row")
        if getattr(inputs, k) is not None
    }
    teachers = [kernel_rows(t) for t in inputs.teachers]
    held = per_token | {k: v if k == "grad" else v.contiguous() for k, v in outputs.items() if v is not None}
    _core.dense(
        passes=passes,
        student=view(student),
        teachers=[view(t) for t in teachers],
        temperature=inputs.temperature.item(),
        names=inputs.names,
        weights=inputs.weights,
        parameters=inputs.parameters,
        mix_logits=inputs.mix_logits,
        columns=inputs.columns,
        label_smoothing=inputs.label_smoothing,
        kept_columns=inputs.kept_columns,
        tail_rule=inputs.tail_rule,
        scales=[cap.scale for cap in inputs.caps],
        softcaps=[cap.softcap for cap in inputs.caps],
        values_with_dtemperature=dtemperature,
        threads=torch.get_num_threads(),
        **{k: view(v) for k, v in held.items()},
    )


def run(student: Tensor, inputs: Inputs, **outputs: Tensor | None) -> None:
    """One call; ``stats`` together with ``grad`` asks for the gradient of an earlier one."""
    later = outputs.get("stats") is not None and outputs.get("grad") is not None
    _call("gradient" if later else "all", student, inputs, outputs)


# The kernel's row of stats: at tau (high, low), at 1 (high, low), sum student, columns present; (high, low) of each
# teacher; and where the call is sided, the same of student and teacher from sums in fp64 under the exact log2(e) / tau.
# High and low add up to the log2 of a sum of exponentials.


def sums(student: Tensor, inputs: Inputs, observed: Tensor | None = None) -> Tensor:
    """Pass 1 over the columns that are here; see :class:`kdfast.ops.dense.Launcher`."""
    student = kernel_rows(student)
    shape = student.shape[:-1]
    stats = torch.empty((*shape, stats_size(inputs)), dtype=torch.float32)
    logit_sum = torch.empty(shape, dtype=torch.float32)
    _call("sums", student, inputs, {"stats": stats, "logit_sum": logit_sum, "observed": observed})
    s = stats.double()

    def together(high: Tensor, low: Tensor) -> Tensor:  # -inf, of columns without mass, has no low part
        return torch.where(high == -math.inf, high, high + low)

    at_tau, at_one = _scales(inputs)
    logs = [together(s[..., 0], s[..., 1]) * at_tau, together(s[..., 2], s[..., 3]) * at_one]
    pairs = together(s[..., 6::2], s[..., 7::2]).unbind(-1)
    teachers = [x * at_tau for x in pairs[: inputs.softmaxes]]
    return torch.stack([*logs, logit_sum.double(), s[..., 5], *teachers, *pairs[inputs.softmaxes :]], -1)


def _scales(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What the kernel's log-sums at tau and at 1 are multiplied by to be those of the exact log2(e) / tau, fp64.

    It has that in fp32. Its own numbers agree with each other; of large logits, whose level times the rounding shows,
    they do not agree with anybody else's.
    """
    log2e = torch.tensor(math.log2(math.e), dtype=torch.float64)
    tau = inputs.temperature.double() if inputs.taught else torch.ones((), dtype=torch.float64)
    ours = (1 / tau.float()) * log2e.float()
    return log2e / tau / ours.double(), log2e / log2e.float().double()


def stats_of(totals: Tensor, sum_student: Tensor, inputs: Inputs) -> Tensor:
    """The kernel's stats from totals over all columns; see :class:`kdfast.ops.dense.Launcher`."""

    def halves(x: Tensor) -> list[Tensor]:
        high = x.float()
        return [high, torch.where(high.isfinite(), x - high.double(), 0.0).float()]

    weight = inputs.weights[0] if len(inputs.weights) == 1 else 1.0  # the kernel multiplies by a single term's later on
    known = (sum_student / weight if weight else sum_student).float()
    at_tau, at_one = _scales(inputs)
    columns = [*halves(totals[..., 0] / at_tau), *halves(totals[..., 1] / at_one), known, totals[..., 3].float()]
    for k, total in enumerate(totals[..., 4:].unbind(-1)):
        columns += halves(total / at_tau if k < inputs.softmaxes else total)
    return torch.stack(columns, -1)


def values(student: Tensor, inputs: Inputs, totals: Tensor, *, dtemperature: bool) -> Tensor:
    """Pass 2 over the columns that are here; see :class:`kdfast.ops.dense.Launcher`."""
    student = kernel_rows(student)
    out = torch.empty((*student.shape[:-1], 7), dtype=torch.float32)
    stats = stats_of(totals, torch.zeros(student.shape[:-1], dtype=torch.float64), inputs)
    _call("values", student, inputs, {"stats": stats, "values": out}, dtemperature=dtemperature)
    return out


def fresh_gradient(student: Tensor) -> Tensor:
    """Memory for a gradient, in huge pages where the system has them; its classes lie apart where the student's do."""
    grad = torch.empty_like(student) if classes_apart(student) else student.new_empty(student.shape)
    _core.advise_huge_pages(view(grad))
    return grad


def scale(grad: Tensor, factor: Tensor) -> None:
    """``grad *= factor`` in place; nothing is done for a factor of 1."""
    value = factor.item()
    if value != 1.0:
        rows = grad.mT if classes_apart(grad) else grad
        _core.scale(view(rows), value, torch.get_num_threads())
