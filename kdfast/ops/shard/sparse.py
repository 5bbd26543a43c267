r"""Sparse targets where the student's columns lie on several ranks.

Every rank has the targets of a token whole. With S the columns that were kept, each rank contributes the logits of S
that it holds and the log-sum of its columns beside them. All know then, in fp64 and bit for bit alike,

    log p of S,     log of the sum of p over the columns beside S,     and so D and tau dD/d log p of every outcome,

by the formulas of the specification itself. With s = tau dD/d log p of an outcome and the sum running over them all,

    tau dD/dz_k = s_k - p_k sum s            for k in S
    tau dD/dz_j = p_j (s_tail / p_tail - sum s)     for any other column

The columns of S are taken out of the logits (-inf) while a kernel reads them, so that their log-sum beside S needs no
difference of nearly equal numbers, and so that the kernel leaves 0 there, to which their own gradient is added. It runs
as a forward KL whose teacher is the student itself under a normaliser of infinity: that teacher has no mass, and the
gradient is one number times p.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops.dense import operators as dense
from kdfast.ops.dense.inputs import N_OBSERVED, Inputs, Wants
from kdfast.ops.head import operators as head
from kdfast.ops.shard import metrics
from kdfast.ops.shard.metrics import Part, Shard
from kdfast.ops.shard.operators import (
    ELSEWHERE,
    LN2,
    Factors,
    Statistics,
    cross_entropy,
    label_parts,
    local_labels,
    log2_sum,
    lost_labels,
    observed_buffer,
    rounded,
)
from kdfast.spec import reference
from kdfast.spec.divergence import Term
from kdfast.spec.head import Cap
from kdfast.spec.problem import NO_LABEL
from kdfast.spec.reduction import Observed

#: Bytes of logits that are copied at a time where they are not ours to change: a part of the cache.
_COPIED_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


class Kept(NamedTuple):
    """The kept columns of tokens (...), (..., K) each."""

    here: Tensor  # bool: on this rank
    column: Tensor  # int64, of this shard; 0 where it is elsewhere
    stored: Tensor  # as the student's tensor holds them; any column's where it is elsewhere

    @classmethod
    def of(cls, student: Tensor, inputs: Inputs, shard: Shard) -> Kept:
        """Those that the targets name."""
        assert inputs.kept_ids is not None
        column = inputs.kept_ids.long() - shard.start
        here = (inputs.kept_ids >= 0) & (column >= 0) & (column < student.shape[-1])
        column = torch.where(here, column, 0)
        return cls(here, column, student.gather(-1, column))

    def take_out(self, z: Tensor) -> None:
        """Puts -inf in their places: a minimum, which leaves the column that stands for the others as it is."""
        z.scatter_reduce_(-1, self.column, torch.where(self.here, -math.inf, math.inf).to(z.dtype), "amin")

    def of_tokens(self, tokens: slice) -> Kept:
        """Those of a range of tokens, counted in one line."""
        count, k = self.here.shape[:-1].numel(), self.here.shape[-1]
        return Kept(*(x.reshape(count, k)[tokens] for x in self))


class SparseStatistics(NamedTuple):
    """Of tokens (...), over the columns of all ranks; fp64."""

    common: Statistics
    kept: Kept
    gradient: Tensor  # (..., K): tau dD/dz
    pull: Tensor  # (...): tau dD/dz_j over p_j of the other columns
    softmax: Tensor  # (..., K): softmax(z)
    present: Tensor  # (..., K) bool: the logit is not -inf


def statistics(student: Tensor, inputs: Inputs, shard: Shard, wants: Wants, *, ours: bool) -> SparseStatistics:
    """Per-token terms of logits (..., columns here) and targets of the whole vocabulary.

    Where the logits are ``ours``, the kept columns stay taken out of them, ready for :func:`gradient_into`.
    """
    assert inputs.kept_ids is not None
    _check_ids(inputs)
    kept = Kept.of(student, inputs, shard)
    labels = local_labels(inputs, shard, student.shape[-1])
    at_label, found = label_parts(student, inputs._replace(labels=labels))
    seen = observed_buffer(student, wants)
    local = _sums_beside(student, _as_dense(inputs, student, labels), kept, seen, ours=ours)
    width = torch.full_like(found, student.shape[-1])
    mine = torch.where(kept.here, inputs.student_cap.logits(kept.stored.double()), 0.0)
    several = torch.stack([local[..., 2], local[..., 3], at_label, found, width], -1)
    beside, sums = log2_sum(local[..., :2], torch.cat([several, mine], -1), shard.group)
    (logit_sum, present, at_label, found, width), z = sums[..., :5].unbind(-1), sums[..., 5:]

    usable = _valid(inputs)
    z = torch.where(usable, z, -math.inf)
    tau = inputs.temperature.to(z)
    at_tau, at_one = beside[..., :1] * LN2, beside[..., 1:] * LN2
    lse_tau = torch.logsumexp(torch.cat([at_tau, z / tau], -1), -1, keepdim=True)
    lse = torch.logsumexp(torch.cat([at_one, z], -1), -1)
    soft, gradient, pull = _outcomes(inputs, usable, z / tau - lse_tau, at_tau - lse_tau, tau)
    wrong = _wrong(inputs, width)
    soft, pull = (torch.where(wrong, math.nan, x) for x in (soft, pull))

    there = z > -math.inf
    logit_sum = logit_sum + torch.where(there, z, 0.0).sum(-1)
    present = present + there.sum(-1)
    hard, lost = torch.zeros_like(lse), None
    if labels is not None:
        lost = lost_labels(labels, found)
        hard = cross_entropy(inputs._replace(labels=labels), lost, lse, at_label, logit_sum / present)
    no_mass = torch.full_like(lse, math.inf)  # of the teacher that the kernel is given
    totals = torch.stack([lse_tau[..., 0] / LN2, lse / LN2, logit_sum, present, no_mass], -1)
    z2 = lse.square() if wants.z else torch.zeros_like(lse)
    if seen is not None:
        at_shard = local[..., 0] * LN2, at_tau[..., 0]
        seen = _observed(student, inputs, seen, at_shard, lse_tau[..., 0], z, shard)
    common = Statistics(soft, hard, z2, None, totals, torch.full_like(lse, -1.0), lost, seen)
    return SparseStatistics(common, kept, gradient, pull, (z - lse[..., None]).exp(), there)


def gradient_into(grad: Tensor, z: Tensor, inputs: Inputs, shard: Shard, found: SparseStatistics, by: Factors) -> None:
    """Fills ``grad``, which may be ``z``, with the gradient; the kept columns are taken out of ``z``."""
    launcher, y = dense.launcher(inputs.backend), inputs.labels
    labels = local_labels(inputs, shard, z.shape[-1])
    c_soft, c_hard, c_z = rounded(by, found.common.lost)
    kept = torch.zeros_like(found.gradient)  # of the kept columns
    if c_soft is not None:
        factor = c_soft.double() / inputs.temperature.to(kept)
        # without weight the gradient is left out, not multiplied by 0: it may be infinite
        kept = torch.where(factor[..., None] != 0, factor[..., None] * found.gradient, 0.0)
        pulled = torch.where(c_soft != 0, c_soft * found.pull, 0.0)
        c_soft = pulled.clamp(-_LARGEST, _LARGEST).float()  # p is 0 where that matters
    one = torch.zeros_like(found.pull)  # factor of softmax(z)
    if c_hard is not None:
        assert y is not None
        assert labels is not None
        hard = torch.where(labels == NO_LABEL, 0.0, c_hard.double())
        one = one + hard
        is_label = _valid(inputs) & (inputs.kept_ids == y[..., None])
        smoothed = inputs.label_smoothing * hard
        kept = kept - torch.where(is_label, (hard - smoothed)[..., None], 0.0)
        if inputs.label_smoothing > 0:
            share = smoothed / found.common.totals[..., 3]
            kept = kept - torch.where(found.present, share[..., None], 0.0)
        labels = torch.where(is_label.any(-1) & (labels != NO_LABEL), ELSEWHERE, labels)
    if c_z is not None:
        one = one + 2 * LN2 * c_z.double() * found.common.totals[..., 1]
    kept = kept + torch.where(one[..., None] != 0, one[..., None] * found.softmax, 0.0)
    if inputs.counted is not None:
        kept = torch.where(inputs.counted[..., None], kept, 0.0)
    as_dense = _as_dense(inputs, z, labels)
    stats = launcher.stats_of(found.common.totals, found.common.sum_student, as_dense)
    launcher.run(z, as_dense, stats=stats, grad=grad, c_soft=c_soft, c_hard=c_hard, c_z=c_z)
    kept = kept * inputs.student_cap.slope(found.kept.stored.double())
    grad.scatter_add_(-1, found.kept.column, torch.where(found.kept.here, kept, 0.0).to(grad.dtype))


def _as_dense(inputs: Inputs, z: Tensor, labels: Tensor | None) -> Inputs:
    """The call that kernels are given, see above; its labels are local."""
    return inputs._replace(
        teachers=[z],
        labels=labels,
        names=["forward_kl"],
        weights=[1.0],
        parameters=[0.0],
        kept_ids=None,
        kept_values=None,
        kept_per_row=None,
        kept_columns=0,
        tail_rule="",
        caps=(inputs.student_cap, Cap()),  # whatever that teacher's logits
    )


def _observed(
    student: Tensor, inputs: Inputs, here: Tensor, beside: tuple[Tensor, Tensor], total: Tensor, z: Tensor, shard: Shard
) -> Tensor:
    """What metrics are made of over all ranks, from what a kernel observed here beside the kept columns.

    ``beside``: log-sums at the temperature of these columns here and on all ranks; ``total``: with the kept ones, whose
    logits are ``z``, (..., K), -inf where there is none.
    """
    assert inputs.kept_ids is not None
    seen = Observed(*here.unbind(-1))
    largest = metrics.logit_at(student, inputs.student_cap, seen.student_top)
    part = Part.of(largest, seen.student_top, seen.student_entropy, shard.start, *beside)
    (others,) = metrics.over_ranks([part], torch.where(beside[1] == -math.inf, 0.0, beside[1])[None], shard.group)
    best = others.largest if z.shape[-1] == 0 else torch.maximum(others.largest, z.amax(-1))
    ids = torch.where(z == best[..., None], inputs.kept_ids.double(), math.inf)
    column = torch.where(others.largest == best, others.column, math.inf)
    if z.shape[-1]:
        column = torch.minimum(column, ids.amin(-1))
    column = torch.where(total.isfinite(), column, math.inf)
    log_p, weight = z / inputs.temperature.to(z) - total[..., None], (beside[1] - total).exp()
    spread = torch.where(weight == 0, 0.0, weight * (others.spread + (total - beside[1]))) + reference.entropy(log_p)
    return metrics.packed(Part(best, column, spread))


def _sums_beside(student: Tensor, inputs: Inputs, kept: Kept, seen: Tensor | None, *, ours: bool) -> Tensor:
    """Pass 1 over the columns that are here and were not kept."""
    launcher = dense.launcher(inputs.backend)
    if ours:
        kept.take_out(student)
        return launcher.sums(student, inputs, seen)
    columns, count = student.shape[-1], kept.here.shape[:-1].numel()
    rows = max(1, _COPIED_BYTES.get(student.device.type, _COPIED_BYTES["cuda"]) // (columns * student.element_size()))
    out = []
    for begin in range(0, count, rows):
        tokens = slice(begin, min(begin + rows, count))
        z = head.token_rows(student, tokens).clone(memory_format=torch.contiguous_format)
        kept.of_tokens(tokens).take_out(z)
        labels, counted = (None if x is None else x.reshape(-1)[tokens] for x in (inputs.labels, inputs.counted))
        part = None if seen is None else seen.view(-1, N_OBSERVED)[tokens]
        out.append(launcher.sums(z, inputs._replace(teachers=[z], labels=labels, counted=counted), part))
    parts = torch.cat(out) if out else torch.zeros(0, 5, dtype=torch.float64, device=student.device)
    return parts.reshape(*student.shape[:-1], -1)


def _outcomes(
    inputs: Inputs, usable: Tensor, log_p: Tensor, beside: Tensor, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """D, tau dD/dz of the kept columns, and that of another over its p; from log p of both, (..., K) and (..., 1)."""
    assert inputs.kept_values is not None
    terms = tuple(Term(*term) for term in zip(inputs.names, inputs.weights, inputs.parameters, strict=True))
    complete = usable.sum(-1, keepdim=True) == inputs.kept_columns
    per_row = None if inputs.kept_per_row is None else inputs.kept_per_row.double()
    k = log_p.shape[-1]
    with torch.enable_grad():
        outcomes = torch.cat([torch.where(usable, log_p, -math.inf), beside], -1).detach().requires_grad_()
        of_kept, of_others = outcomes.split([k, 1], -1)
        soft = reference.kept_divergence(
            terms, inputs.tail_rule, inputs.kept_values, per_row, usable, complete, of_kept, of_others, tau
        )
        (student,) = torch.autograd.grad(soft.sum(), outcomes)
    student, p = student.detach(), outcomes.detach().exp()
    total = student.sum(-1)
    gradient = student[..., :k] - p[..., :k] * total[..., None]
    return soft.detach(), gradient, student[..., k] / p[..., k].clamp(min=_SMALLEST) - total


def _valid(inputs: Inputs) -> Tensor:
    assert inputs.kept_ids is not None
    return (inputs.kept_ids >= 0) & (inputs.kept_ids < inputs.kept_columns)


def _check_ids(inputs: Inputs) -> None:
    """Raises for ids that cannot be meant, where they are at hand: on the CPU."""
    ids = inputs.kept_ids
    assert ids is not None
    if ids.device.type == "cpu":
        reference.check_ids(ids if inputs.counted is None else ids[inputs.counted], inputs.kept_columns)


def _wrong(inputs: Inputs, width: Tensor) -> Tensor:
    """Tokens of which nothing can be said: the shards are not the targets' vocabulary, or their ids cannot be meant."""
    ids = inputs.kept_ids
    assert ids is not None
    wrong = width != inputs.kept_columns
    if wrong.device.type == "cpu":
        if bool(wrong.any()):
            msg = (
                f"teacher has {inputs.kept_columns} columns, all shards of the student {int(width.max())}: give the "
                "targets that vocab_size, with logits of -inf in columns that only pad"
            )
            raise ValueError(msg)
        return wrong
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    return wrong | twice.any(-1) | ((ids < -1) | (ids >= inputs.kept_columns)).any(-1)
