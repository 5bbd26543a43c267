r"""Universal logit distillation: a loss between vocabularies that have nothing in common.

With p = softmax(student / tau) and q = softmax(teacher / tau), both sorted descending and the shorter one padded with
probability 0, the loss of a token is L = sum_j |p_j - q_j|. Three facts make it cheap:

- softmax keeps the order, so each row of logits is sorted once and becomes probabilities afterwards;
- with s_j = sign(p_j - q_j) at the rank of column j, dL/dz_j = p_j (s_j - sum_i s_i p_i) / tau. All that the sort leaves
  for backward is s: one byte per logit, where autograd would keep the sorted rows and their int64 permutations;
- tokens do not depend on one another, so sorts and temporaries exist for a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from kdfast import reference
from kdfast.ops.sort import sort_rows
from kdfast.problem import Problem, Reduction, build_problem

#: Elements of one chunk's rows: a few MB per temporary on a CPU, enough rows to fill a GPU elsewhere.
CHUNK = {"cpu": 1 << 18}
CHUNK_ELSEWHERE = 1 << 24


def uld_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Universal logit distillation: distance of sorted probabilities, for models whose tokenizers differ.

    With p = softmax(student / temperature) and q = softmax(teacher / temperature), both sorted descending and the
    shorter one padded with probability 0, per token::

        loss = sum_j |p_j - q_j|        in [0, 2]

    Tokens must be aligned first: row i of both must predict what follows the same piece of text, see
    :mod:`kdfast.integrations.alignment`. The loss compares how certain two models are, never of what, so it is an
    addition to a loss on labels and cannot replace one. There is no factor temperature^2: this gradient falls with
    1 / temperature.

    The gradient goes through the order of the student's logits: it is taken at the order they have, equal logits are
    ranked by column, and sign(0) = 0. The teacher is detached.

    Args:
        student: (..., V) floating point logits; fp32 arithmetic, fp64 for fp64.
        teacher: (..., U) floating point logits of the same tokens; U and V are independent.
        temperature: > 0, a float or a 0-d tensor, which may require grad.
        weights: (...) per token; 0 drops the token, whatever its logits hold.
        reduction: "mean": sum(w * loss) / sum(w) over counted tokens; "sum"; "none": w * loss per token.
        num_items: replaces the denominator of the mean, as in :func:`kdfast.distill_loss`.

    Returns:
        The loss, fp32 (fp64 for an fp64 student): 0-d, or (...) with ``reduction="none"``.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or value that cannot be meant.

    Source:
        Boizard et al., "Towards cross-tokenizer distillation: the universal logit distillation loss for LLMs",
        arXiv 2402.12030.

    Example:
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 0.0, 1.0, -3.0, -4.0]])
        >>> loss = uld_loss(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), tuple(student.grad.shape)
        (0.0121, (1, 3))
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            msg = f"{name} must be a tensor of logits (..., V), got {type(value).__name__}"
            if hasattr(value, "logits"):
                msg += f": pass {name}.logits() of a kdfast.LMHead, {name}.logits of a model's output"
            raise TypeError(msg)
    problem = build_problem(
        student,
        teacher,
        temperature=temperature,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
        vocab="truncate",  # sizes may differ; nothing is cut here
    )
    reference._check_values(problem, student)
    loss = _token_losses(student, teacher.detach(), problem)
    return reference.weighted(reference.token_weights(problem), loss, reduction)


def _token_losses(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    signed = torch.is_grad_enabled() and student.requires_grad
    loss, *_ = _Tokens.apply(  # type: ignore[no-untyped-call]
        student, teacher, problem.temperature, problem.counted, signed, problem.learns_temperature
    )
    return reference._keep(loss, problem.counted)


class _Tokens(torch.autograd.Function):
    """Per-token losses (...), and what backward reads beside the student: signs, (top, total, centre), d loss / d tau."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, temperature: Tensor, counted: Tensor | None, signed: bool, wants_dtau: bool
    ) -> tuple[Tensor, ...]:
        v, u = student.shape[-1], teacher.shape[-1]
        leading, n = student.shape[:-1], student.shape[:-1].numel()
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        tau = temperature.to(dtype=dtype, device=student.device)
        loss = torch.empty(n, dtype=dtype, device=student.device)
        stats = torch.empty((n, 3), dtype=dtype, device=student.device)
        dtau = torch.empty(n if wants_dtau else 0, dtype=dtype, device=student.device)
        signs = torch.empty((n, v if signed else 0), dtype=torch.int8, device=student.device)
        for rows in _chunks(n, max(v, u), student.device):
            z, order = sort_rows(_rows(student, rows, counted, dtype), ordered=signed)
            t, _ = sort_rows(_rows(teacher, rows, counted, dtype), ordered=False)
            top = z[:, :1].clone()
            p, total = _softmax(z, tau)
            q, _ = _softmax(t, tau)
            gap = pad(p, (0, max(u - v, 0))) - pad(q, (0, max(v - u, 0)))
            s = gap.sign()
            loss[rows] = gap.abs_().sum(-1)
            # A NaN of the teacher, too, must come out: the sign of NaN is 0.
            centre = (s[:, :v] * p).sum(-1) + 0 * loss[rows]
            stats[rows] = torch.cat([top, total, centre[:, None]], -1)
            if signed:
                signs[rows].scatter_(-1, order, s[:, :v].to(torch.int8))
            if wants_dtau:
                dtau[rows] = (_dtau(q, t, s[:, :u]) - _dtau(p, z, s[:, :v])) / tau
        return loss.view(leading), signs, stats, dtau.view(leading if wants_dtau else -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, _, temperature, counted, _, _ = inputs
        _, signs, stats, dtau = output
        ctx.mark_non_differentiable(signs, stats, dtau)
        ctx.save_for_backward(student, temperature, counted, signs, stats, dtau)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        student, temperature, counted, signs, stats, dtau = ctx.saved_tensors
        to_student = to_temperature = None
        if ctx.needs_input_grad[0]:
            to_student = _gradient(student, temperature, counted, signs, stats, upstream)
        if ctx.needs_input_grad[2]:
            to_temperature = (upstream * reference._keep(dtau, counted)).sum().to(temperature)
        return to_student, None, to_temperature, None, None, None


def _gradient(
    student: Tensor, temperature: Tensor, counted: Tensor | None, signs: Tensor, stats: Tensor, upstream: Tensor
) -> Tensor:
    """The gradient of the student's logits, in their dtype, from the signs."""
    v = student.shape[-1]
    tau = temperature.to(dtype=stats.dtype, device=stats.device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    flat, factor = grad.view(-1, v), (upstream / tau).reshape(-1, 1)
    for rows in _chunks(flat.shape[0], v, student.device):
        top, total, centre = stats[rows].split(1, -1)
        p = _rows(student, rows, counted, stats.dtype).sub(top).div_(tau).exp_()
        g = p.mul_(signs[rows] - centre).mul_(factor[rows] / total)
        flat[rows] = g if counted is None else torch.where(counted.reshape(-1, 1)[rows], g, 0.0)
    return grad


def _chunks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of [0, n): as many rows as a chunk holds, and one for each thread at least."""
    step = max(CHUNK.get(device.type, CHUNK_ELSEWHERE) // width, torch.get_num_threads())
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _rows(x: Tensor, rows: slice, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Some rows of (..., V) as (n, V), copied alone where the axes do not merge; 0 in those of dropped tokens."""
    if x.is_contiguous():
        part = x.view(-1, x.shape[-1])[rows]
    else:
        part = x[torch.unravel_index(torch.arange(rows.start, rows.stop, device=x.device), x.shape[:-1])]
    part = part.to(dtype)
    return part if counted is None else torch.where(counted.reshape(-1, 1)[rows], part, 0.0)


def _softmax(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of rows that are sorted descending, and sum(exp((x - max) / tau)); x becomes (x - max) / tau."""
    x.sub_(x[:, :1].clone()).div_(tau)
    e = x.exp()
    total = e.sum(-1, keepdim=True)
    return e.div_(total), total


def _dtau(p: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """sum_j x_j p_j (s_j - sum_i s_i p_i), with x the logits over tau: minus tau times d(sum s p) / d tau."""
    present = p > 0
    return torch.where(present, x * p * (s - (s * p).sum(-1, keepdim=True)), 0.0).sum(-1)
