r"""What metrics are made of, where the columns of a token lie on several ranks.

Each rank has its columns' largest logit, log-sum L_r and entropy H_r. The largest of all is at the lowest column among
the ranks that have it; and as a distribution over ranks, of which each is a distribution over its columns,

    H = sum_r w_r (H_r + L - L_r),     w_r = exp(L_r - L),     L = log sum_r exp(L_r),

whose terms are all >= 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops.dense.inputs import Inputs
from kdfast.spec.head import Cap
from kdfast.spec.reduction import Observed
from kdfast.spec.reference import entropy
from kdfast.spec.values import first_largest

#: Numbers of a mixture's columns that are looked at together where it is made anew, by type of device.
_LOOKED_AT = {"cpu": 1 << 20, "cuda": 64 << 20}


class Shard(NamedTuple):
    """The columns of this rank, and the ranks that have the others."""

    group: dist.ProcessGroup
    start: int  # the first of them
    widest: int  # columns of the widest shard: what every rank must do alike goes by it


class Part(NamedTuple):
    """Of tokens (...), one distribution over the columns of this rank, or over all; fp64."""

    largest: Tensor  # logit; -inf where there is none
    column: Tensor  # of the whole vocabulary; inf where there is none
    spread: Tensor  # what it adds to the entropy

    @classmethod
    def of(cls, logits: Tensor, column: Tensor, entropy: Tensor, start: int, local: Tensor, total: Tensor) -> Part:
        """From a kernel's column, which is below 0 where there is none, the logit there, and its entropy.

        ``local`` and ``total`` are the log-sums at the temperature, here and of all ranks, nats.
        """
        there, weight = column >= 0, (local - total).exp()
        spread = torch.where(weight == 0, 0.0, weight * (entropy + (total - local)))
        return cls(torch.where(there, logits, -math.inf), torch.where(there, column + start, math.inf), spread)


def combined(student: Tensor, inputs: Inputs, here: Tensor, local: Tensor, total: Tensor, shard: Shard) -> Tensor:
    """Observed over all ranks, (..., 5), from what a kernel observed here.

    ``local`` and ``total`` are log-sums here and of all ranks, (..., 2 + softmaxes) nats: of the student at the
    temperature and at 1, and of each distribution of the teachers.
    """
    seen, softmaxes = Observed(*here.unbind(-1)), total.shape[-1] - 2
    z = logit_at(student, inputs.student_cap, seen.student_top)
    parts = [Part.of(z, seen.student_top, seen.student_entropy, shard.start, local[..., 0], total[..., 0])]
    if softmaxes == 1:
        t = _teacher_logit_at(inputs, seen.teacher_top)
        parts.append(Part.of(t, seen.teacher_top, seen.teacher_entropy, shard.start, local[..., 2], total[..., 2]))
    elif softmaxes:
        parts.append(_mixture(inputs, total[..., 2:], shard.start))
    totals = torch.stack([total[..., 0], total[..., 2:].sum(-1)][: len(parts)])
    return packed(*over_ranks(parts, totals, shard.group))


def over_ranks(parts: list[Part], totals: Tensor, group: dist.ProcessGroup) -> list[Part]:
    """Each distribution over all ranks; three all-reduces. Where its log-sum (n, ...) is not finite none is largest."""
    mine = torch.stack([p.largest for p in parts])
    largest = mine.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    column = torch.where(mine == largest, torch.stack([p.column for p in parts]), math.inf)
    dist.all_reduce(column, dist.ReduceOp.MIN, group=group)
    spread = torch.stack([p.spread for p in parts])
    dist.all_reduce(spread, group=group)
    return [Part(*of) for of in zip(largest, torch.where(totals.isfinite(), column, math.inf), spread, strict=True)]


def packed(student: Part, teacher: Part | None = None) -> Tensor:
    """(..., 5) as kernels leave it, from what is known over all ranks."""
    top = torch.where(student.column == math.inf, -1.0, student.column)
    t_top, t_entropy = torch.full_like(top, -2.0), torch.zeros_like(top)
    if teacher is not None:
        t_top, t_entropy = torch.where(teacher.column == math.inf, -2.0, teacher.column), teacher.spread
    return torch.stack(Observed(top, top, student.spread, t_top, t_entropy), -1)


def logit_at(x: Tensor, cap: Cap, column: Tensor) -> Tensor:
    """The logits (..., V) at a column of each token, fp64; any where that is below 0."""
    return cap.logits(x.gather(-1, column.clamp(min=0).long()[..., None])[..., 0].double())


def _teacher_logit_at(inputs: Inputs, column: Tensor) -> Tensor:
    """The same of the teacher, or of the mixture of the teachers' logits."""
    caps = inputs.caps[1:] or (Cap(),) * len(inputs.teachers)
    each = [logit_at(t, cap, column) for t, cap in zip(inputs.teachers, caps, strict=True)]
    if not inputs.mix_logits:
        return each[0]
    assert inputs.teacher_weights is not None
    return sum(torch.where(w == 0, 0.0, w.double() * t) for w, t in zip(inputs.teacher_weights, each, strict=True))  # type: ignore[return-value]


def _mixture(inputs: Inputs, log_sums: Tensor, start: int) -> Part:
    """Of an ensemble of distributions, made anew from its teachers and their log-sums over all ranks, (..., n) nats."""
    n, columns, leading = len(inputs.teachers), inputs.teachers[0].shape[-1], log_sums.shape[:-1]
    teachers = [t.reshape(-1, columns) for t in inputs.teachers]
    caps = inputs.caps[1:] or (Cap(),) * n
    weights = inputs.teacher_weights
    assert weights is not None
    log_w = weights.double().log().reshape(n, -1).expand(n, leading.numel())
    lse, tau = log_sums.reshape(-1, n), inputs.temperature.to(log_sums)
    rows = max(1, _LOOKED_AT.get(log_sums.device.type, _LOOKED_AT["cuda"]) // columns)
    found = [torch.empty(3, 0, dtype=torch.float64, device=lse.device)]
    for begin in range(0, leading.numel(), rows):
        tokens = slice(begin, begin + rows)
        log_q = torch.full((lse[tokens].shape[0], columns), -math.inf, dtype=torch.float64, device=lse.device)
        for t, cap, w, of in zip(teachers, caps, log_w, lse.unbind(-1), strict=True):
            log_q_k = cap.logits(t[tokens].double()) / tau + (w - of)[tokens, None]
            log_q = torch.logaddexp(log_q, torch.where(w[tokens, None] == -math.inf, -math.inf, log_q_k))
        top = first_largest(log_q)
        found.append(torch.stack([log_q.amax(-1), torch.where(top >= 0, top + start, math.inf), entropy(log_q)]))
    return Part(*torch.cat(found, -1).reshape(3, *leading))
