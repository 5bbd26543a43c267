"""The loss of tokens whose columns lie on several ranks: statistics over all, and the gradient of the columns here.

Ranks that share the vocabulary exchange numbers of each token three times: the maxima of their log-sums, the sums under
them together with the label's logit, and the sums of the divergence. Combining is in fp64, in the collective's order,
so every rank of a group has the same statistics, bit for bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops.dense import operators as dense
from kdfast.ops.dense.inputs import N_OBSERVED, Inputs, Wants
from kdfast.ops.shard import metrics
from kdfast.ops.shard.metrics import Shard
from kdfast.spec.problem import NO_LABEL

#: Stands for a label in a column that another rank holds; the kernels know it.
ELSEWHERE = NO_LABEL + 1

LN2 = math.log(2.0)


class Statistics(NamedTuple):
    """Of tokens (...), over the columns of all ranks; fp64."""

    soft: Tensor
    hard: Tensor
    z2: Tensor
    dtau: Tensor | None  # of soft; None where it was not asked for
    totals: Tensor  # (..., 4 + softmaxes of teachers, and 2 where sided), see :class:`kdfast.ops.dense.Launcher`
    sum_student: Tensor
    lost: Tensor | None  # bool: no rank has the label; None without labels
    observed: Tensor | None = None  # (..., 5); None where it was not asked for

    def terms(self, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(soft, hard, z2), fp32, 0 for a token that does not count."""
        out = (self.soft, self.hard, self.z2)
        return tuple((x if counted is None else x.masked_fill(~counted, 0.0)).float() for x in out)  # type: ignore[return-value]

    def seen(self, counted: Tensor | None) -> Tensor:
        """What was observed, 0 for a token that does not count; as a dense operator returns it where nothing was."""
        if self.observed is None:
            return self.soft.new_empty(0, 0)
        return self.observed if counted is None else torch.where(counted[..., None], self.observed, 0.0)


#: Upstream gradients, or coefficients, of soft, hard and z2, (...) each; None for a term that the call does not have.
Factors = tuple[Tensor | None, Tensor | None, Tensor | None]


def statistics(student: Tensor, inputs: Inputs, shard: Shard, wants: Wants) -> Statistics:
    """Per-token terms of logits (..., columns here) and of teachers' as wide; labels are of the whole vocabulary."""
    launcher = dense.launcher(inputs.backend)
    inputs = inputs._replace(labels=local_labels(inputs, shard, student.shape[-1]))
    seen = observed_buffer(student, wants)
    local = launcher.sums(student, inputs, seen)
    zeros = torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
    logs_here = torch.cat([local[..., :2], local[..., 4:]], -1)
    at_label, found = label_parts(student, inputs)
    logs, sums = log2_sum(logs_here, torch.stack([local[..., 2], local[..., 3], at_label, found], -1), shard.group)
    logit_sum, present, at_label, found = sums.unbind(-1)
    totals = torch.cat([logs[..., :2], logit_sum[..., None], present[..., None], logs[..., 2:]], -1)
    soft, sum_student, dtau, lost = zeros, zeros, None, None
    if inputs.teachers:
        v = launcher.values(student, inputs, totals, dtemperature=wants.dtau).double()
        dist.all_reduce(v, group=shard.group)
        soft, sum_student = v[..., 0], v[..., 1]
        if wants.dtau:
            moved = (v[..., 2] - v[..., 1] * v[..., 3]) + (v[..., 5] - v[..., 4] * v[..., 6])
            dtau = -LN2 / inputs.temperature.to(v) * moved
    lse, hard = logs[..., 1] * LN2, zeros
    if inputs.labels is not None:
        lost = lost_labels(inputs.labels, found)
        hard = cross_entropy(inputs, lost, lse, at_label, logit_sum / present)
    if seen is not None:
        here, all_ranks = (x[..., : 2 + inputs.softmaxes] * LN2 for x in (logs_here, logs))
        seen = metrics.combined(student, inputs, seen, here, all_ranks, shard)
    return Statistics(soft, hard, lse.square() if wants.z else zeros, dtau, totals, sum_student, lost, seen)


def observed_buffer(student: Tensor, wants: Wants) -> Tensor | None:
    """Memory for what a kernel observes of the columns that are here."""
    if not wants.observed:
        return None
    return torch.empty(*student.shape[:-1], N_OBSERVED, dtype=torch.float64, device=student.device)


def gradient_into(
    grad: Tensor, student: Tensor, inputs: Inputs, shard: Shard, found: Statistics, factors: Factors
) -> None:
    """Fills ``grad``, which may be the student's memory, with the gradient of the columns that are here."""
    launcher = dense.launcher(inputs.backend)
    inputs = inputs._replace(labels=local_labels(inputs, shard, student.shape[-1]))
    stats = launcher.stats_of(found.totals, found.sum_student, inputs)
    c_soft, c_hard, c_z = rounded(factors, found.lost)
    launcher.run(student, inputs, stats=stats, grad=grad, c_soft=c_soft, c_hard=c_hard, c_z=c_z)


# --- What the dense and the sparse loss share -------------------------------------------------------------------------


def local_labels(inputs: Inputs, shard: Shard, columns: int) -> Tensor | None:
    """Labels as columns of this shard; ELSEWHERE for those of another, NO_LABEL for those that are not to be read."""
    y = inputs.labels
    if y is None:
        return None
    here = (y >= shard.start) & (y < shard.start + columns)
    unread = y == NO_LABEL
    if inputs.counted is not None:
        unread = unread | ~inputs.counted
    return torch.where(unread, NO_LABEL, torch.where(here, y - shard.start, ELSEWHERE))


def label_parts(student: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Of labels, local ones: their logits, and 1 where they are; 0 elsewhere."""
    labels = inputs.labels
    zeros = torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
    if labels is None:
        return zeros, zeros
    here = labels >= 0
    stored = student.gather(-1, torch.where(here, labels, 0)[..., None])[..., 0].double()
    return torch.where(here, inputs.student_cap.logits(stored), 0.0), here.double()


def log2_sum(local: Tensor, extra: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Over ranks: log2 sum 2^local, (..., n), and the sums of ``extra``, (..., m); two all-reduces."""
    top = torch.where(local.isnan(), -math.inf, local)  # a maximum that is NaN on one rank only would differ
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    at = torch.where(top == -math.inf, 0.0, top)
    both = torch.cat([torch.exp2(local - at), extra], -1)
    dist.all_reduce(both, group=group)
    n = local.shape[-1]
    return at + torch.log2(both[..., :n]), both[..., n:]


def lost_labels(labels: Tensor, found: Tensor) -> Tensor:
    """Tokens whose label no rank holds; raises for them on the CPU."""
    lost = (labels != NO_LABEL) & (found == 0)
    if lost.device.type == "cpu" and bool(lost.any()):
        msg = f"labels must be columns of the whole vocabulary or ignore_index: {int(lost.sum())} are on no rank"
        raise ValueError(msg)
    return lost


def cross_entropy(inputs: Inputs, lost: Tensor, lse: Tensor, at_label: Tensor, mean_logit: Tensor) -> Tensor:
    """Per token, nats."""
    smoothing, labels = inputs.label_smoothing, inputs.labels
    assert labels is not None
    ce = (lse - at_label).clamp(min=0)  # where it is below, it is 0 to the rounding of fp32 sums
    if smoothing > 0:
        ce = (1 - smoothing) * ce + smoothing * (lse - mean_logit)
    return torch.where(labels == NO_LABEL, 0.0, torch.where(lost, math.nan, ce))


def rounded(factors: Factors, lost: Tensor | None) -> Factors:
    """Factors as the kernels take them, NaN for a token whose label is on no rank."""
    soft, hard, z = (None if x is None else x.float() for x in factors)
    return soft, hard if hard is None or lost is None else torch.where(lost, math.nan, hard), z
