"""The dense loss over ranks: a shard of the vocabulary, or of the tokens, on each.

Logits stay where they are. Ranks that share the vocabulary exchange statistics of each token three times: the maxima of
their log-sums, the sums under them together with the label's logit, and the sums of the divergence. Combining is in
fp64, in the collective's order, so every rank of a group returns the same value, and the gradient of its own columns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import reference
from kdfast.ops import _registry, dense, dense_autograd
from kdfast.ops.dense import Inputs
from kdfast.ops.dense_autograd import PerToken, Spec
from kdfast.problem import NO_LABEL, Problem, Teacher, build_problem
from kdfast.reference import DistillTerms, TokenTerms

#: Stands for a label in a column that another rank holds; the kernels know it.
ELSEWHERE = NO_LABEL + 1

_LN2 = math.log(2.0)


def distill_loss(
    student: Tensor,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    *,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    token_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    return_terms: bool = False,
    **options: Any,
) -> Tensor | DistillTerms:
    """:func:`kdfast.distill_loss` where ranks hold shards: the same value and gradient as one rank with everything.

    Args:
        student: (..., V / ranks) logits: this rank's columns of this rank's tokens.
        teacher: the same columns of the teacher's logits, or a sequence of such; None for plain cross-entropy.
        labels: (...) int64, columns of the whole vocabulary; the same on every rank of ``vocab_group``.
        vocab_group: ranks that share the vocabulary of the same tokens, in the order of their columns. None: this rank
            has all columns.
        vocab_start: the first of this rank's columns; None: all shards are as wide as this one.
        token_group: ranks that share the tokens. The mean's denominator counts the tokens of all of them, and the value
            is the sum over all; a gradient needs no division by the number of ranks, and a sum over them
            (``DistributedDataParallel`` averages: multiply the loss by its number of ranks). None: this rank has all.
        backend: "cpu", "triton", or None for the one that serves the call.
        return_terms: return :class:`kdfast.DistillTerms`.
        **options: those of :func:`kdfast.distill_loss` but ``overwrite_logits``, ``teacher_grad`` and
            ``vocab="truncate"``, which raise.

    Returns:
        The loss, the same on every rank of both groups; 0-d, or (...) with ``reduction="none"``.

    Raises:
        ValueError: as :func:`kdfast.distill_loss`; an option that is not served over ranks; shards of the vocabulary
            that no kernel serves, with the reason.
        RuntimeError: a named backend that cannot serve the call.
    """
    for name in ("overwrite_logits", "teacher_grad"):
        if options.get(name):
            msg = f"{name} is not served by kdfast.distributed: leave it False"
            raise ValueError(msg)
    if options.get("vocab", "strict") != "strict":
        msg = "vocab='truncate' is not served by kdfast.distributed: cut both vocabularies before they are sharded"
        raise ValueError(msg)
    problem = build_problem(student, teacher, labels, return_terms=return_terms, **options)
    if vocab_group is not None and problem.sparse is not None:
        msg = "sparse targets are not served over shards of the vocabulary: gather the student's logits, or its head"
        raise ValueError(msg)
    row = _registry.select(problem, backend)
    if vocab_group is not None and row.name == "reference":
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in _registry.backends(problem).rows if r.name != "reference")
        msg = f"shards of a vocabulary are served by kernels only, and none takes this call ({reasons})"
        raise ValueError(msg)
    if token_group is not None and problem.reduction == "mean" and problem.num_items is None:
        problem = dataclasses.replace(problem, num_items=_count_tokens(problem, token_group))
    if vocab_group is None:
        terms = row.distill_loss(problem)
    else:
        tokens = _vocabulary_parallel(problem, row.name, vocab_group, vocab_start)
        terms = reference.assemble(problem, tokens, reference.token_weights(problem))
    if token_group is not None and problem.reduction != "none":
        everywhere = [None if x is None else _value_of_all(x, token_group) for x in terms]
        terms = DistillTerms(*everywhere)  # type: ignore[arg-type]
    return terms if return_terms else terms.loss


def distill_dtensors(student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> Tensor | DistillTerms:
    """What :func:`kdfast.distill_loss` does with DTensors: finds the groups by placements, never gathers.

    The student's last axis may be sharded over one mesh axis and its leading axes over others; teachers are placed as
    the student is, tensors per token as its leading axes are. The loss is a plain tensor, per token that of the local
    rows.

    Raises:
        ValueError: another placement, or a plain tensor beside a DTensor.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(student, DTensor)
    mesh, last = student.device_mesh, student.dim() - 1
    groups: dict[str, Any] = {}
    per_token: list[Any] = []
    for axis, placement in enumerate(student.placements):
        kind = None
        if isinstance(placement, Shard):
            kind = "vocab_group" if placement.dim % student.dim() == last else "token_group"
        if (kind is None and not placement.is_replicate()) or kind in groups:
            msg = (
                f"student is placed as {student.placements}: one mesh axis may shard the vocabulary and one the "
                "tokens, the others replicate; redistribute it"
            )
            raise ValueError(msg)
        if kind is not None:
            groups[kind] = mesh.get_group(axis)
        if kind == "vocab_group":
            chunk = -(-student.shape[-1] // mesh.size(axis))
            groups["vocab_start"] = min(mesh.get_local_rank(axis) * chunk, student.shape[-1])
        per_token.append(Replicate() if kind == "vocab_group" else placement)

    def local(name: str, x: Any, placements: Any) -> Any:
        if not isinstance(x, Tensor) or (x.dim() == 0 and not isinstance(x, DTensor)):
            return x
        if not isinstance(x, DTensor):
            msg = f"{name} must be a DTensor as the student is, placed as {tuple(placements)}: see distribute_tensor"
            raise ValueError(msg)
        if x.dim() and (x.device_mesh != mesh or tuple(x.placements) != tuple(placements)):
            msg = f"{name} is placed as {x.placements} on {x.device_mesh}, expected {tuple(placements)} on {mesh}"
            raise ValueError(msg)
        return x.to_local()

    several = isinstance(teacher, list | tuple)
    teachers = [local("teacher", t, student.placements) for t in (teacher if several else [teacher])]
    for name in ("weights", "alpha", "temperature", "z_loss", "num_items"):
        if name in options:
            options[name] = local(name, options[name], per_token)
    return distill_loss(
        student.to_local(),
        teachers if several else teachers[0],
        local("labels", labels, per_token),
        **groups,
        **options,
    )


def _count_tokens(problem: Problem, group: dist.ProcessGroup) -> Tensor:
    """Weight of the tokens of all ranks; 1 where there are none, so that the loss is 0 / 1."""
    total = reference.token_weights(dataclasses.replace(problem, reduction="sum")).sum(dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return torch.where(total != 0, total, 1.0).float()


def _value_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks as a value; the gradient is that of this rank's part."""
    total = x.detach().double()
    dist.all_reduce(total, group=group)
    return x + (total.to(x.dtype) - x.detach())


def _vocabulary_parallel(
    problem: Problem, backend: str, group: dist.ProcessGroup, vocab_start: int | None
) -> TokenTerms:
    student = problem.student
    assert isinstance(student, Tensor)
    start = dist.get_rank(group) * student.shape[-1] if vocab_start is None else vocab_start
    teachers: tuple[Tensor, ...] = problem.teachers  # type: ignore[assignment]
    spec = dense_autograd.spec_of(problem, backend)
    per_token = PerToken.of(problem)._replace(labels=_local_labels(problem, start))
    out = _Shard.apply(student, problem.temperature, per_token, spec, group, *teachers)  # type: ignore[no-untyped-call]
    return dense_autograd.token_terms(problem, *out)


def _local_labels(problem: Problem, start: int) -> Tensor | None:
    """Labels as columns of this shard; ELSEWHERE for those of another, NO_LABEL for those that are not to be read."""
    y = problem.labels
    if y is None:
        return None
    here = (y >= start) & (y < start + problem.vocab_size)
    local = torch.where(here, y - start, ELSEWHERE)
    unread = y == NO_LABEL
    if problem.counted is not None:
        unread = unread | ~problem.counted
    return torch.where(unread, NO_LABEL, local)


def _log2_sum(local: Tensor, group: dist.ProcessGroup, extra: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Over ranks: log2 sum 2^local, and the sums of ``extra``; two all-reduces."""
    top = torch.where(local.isnan(), -math.inf, local)  # a maximum that is NaN on one rank only would differ
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    at = torch.where(top == -math.inf, 0.0, top)
    both = torch.stack([*torch.exp2(local - at).unbind(-1), *extra], -1)
    dist.all_reduce(both, group=group)
    n = local.shape[-1]
    return at + torch.log2(both[..., :n]), list(both[..., n:].unbind(-1))


class _Shard(torch.autograd.Function):
    """Per-token (soft, hard, z2) over all shards; the gradient of the columns that are here."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        temperature: Tensor,
        per_token: PerToken,
        spec: Spec,
        group: dist.ProcessGroup,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        launcher = dense.launcher(spec.backend)
        inputs, labels = spec.inputs(teachers, per_token, temperature.detach()), per_token.labels
        local = launcher.sums(student, inputs)
        zeros = torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
        at_label, found = zeros, zeros
        if labels is not None:
            here = labels >= 0
            column = torch.where(here, labels, 0)[..., None]
            at_label = torch.where(here, student.gather(-1, column)[..., 0].double(), 0.0)
            found = here.double()
        logs = torch.cat([local[..., :2], local[..., 4:]], -1)
        logs, (logit_sum, present, at_label, found) = _log2_sum(
            logs, group, [local[..., 2], local[..., 3], at_label, found]
        )
        totals = torch.cat([logs[..., :2], logit_sum[..., None], present[..., None], logs[..., 2:]], -1)
        soft = hard = z2 = zeros
        sum_student, dtau, lost = zeros, None, None
        if teachers:
            v = launcher.values(student, inputs, totals, dtemperature=spec.wants_dtau).double()
            dist.all_reduce(v, group=group)
            soft, sum_student = v[..., 0], v[..., 1]
            if spec.wants_dtau:
                moved = (v[..., 2] - v[..., 1] * v[..., 3]) + (v[..., 5] - v[..., 4] * v[..., 6])
                dtau = -_LN2 / temperature.detach().to(v) * moved
        lse = logs[..., 1] * _LN2
        if labels is not None:
            lost = _lost(labels, found)
            hard = _cross_entropy(spec.label_smoothing, labels, lost, lse, at_label, logit_sum / present)
        if spec.wants_z:
            z2 = lse.square()
        ctx.save_for_backward(student, totals, sum_student, dtau, lost, *teachers)
        ctx.spec, ctx.inputs = spec, inputs
        ctx.set_materialize_grads(False)
        dropped = None if per_token.counted is None else ~per_token.counted
        return tuple((x if dropped is None else x.masked_fill(dropped, 0.0)).float() for x in (soft, hard, z2))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        student, totals, sum_student, dtau, lost, *teachers = ctx.saved_tensors
        spec, inputs = ctx.spec, ctx.inputs
        there = (bool(teachers), inputs.labels is not None, spec.wants_z)
        soft, hard, z = (g if yes else None for g, yes in zip(upstream, there, strict=True))
        if hard is not None:
            hard = torch.where(lost, math.nan, hard)
        to_student = to_temperature = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                grad = _gradient(spec.backend, student, inputs, totals, sum_student, (soft, hard, z))
            sources = [g for g in (soft, hard, z) if g is not None]
            to_student = dense_autograd.only_once(grad, *sources, student)
        if ctx.needs_input_grad[1] and dtau is not None and soft is not None:
            counted = soft if inputs.counted is None else soft.masked_fill(~inputs.counted, 0.0)
            moved = (counted * torch.where(counted == 0, 0.0, dtau)).sum().to(inputs.temperature)
            to_temperature = dense_autograd.only_once(moved, soft, student)
        return to_student, to_temperature, *[None] * (3 + len(teachers))


def _lost(labels: Tensor, found: Tensor) -> Tensor:
    """Tokens whose label no rank holds; raises for them on the CPU."""
    lost = (labels != NO_LABEL) & (found == 0)
    if lost.device.type == "cpu" and bool(lost.any()):
        msg = f"labels must be columns of the whole vocabulary or ignore_index: {int(lost.sum())} are on no rank"
        raise ValueError(msg)
    return lost


def _cross_entropy(
    smoothing: float, labels: Tensor, lost: Tensor, lse: Tensor, at_label: Tensor, mean_logit: Tensor
) -> Tensor:
    """Per token, nats."""
    ce = lse - at_label
    if smoothing > 0:
        ce = (1 - smoothing) * ce + smoothing * (lse - mean_logit)
    return torch.where(labels == NO_LABEL, 0.0, torch.where(lost, math.nan, ce))


def _gradient(
    backend: str,
    student: Tensor,
    inputs: Inputs,
    totals: Tensor,
    sum_student: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    launcher = dense.launcher(backend)
    source = student if student.stride(-1) == 1 else student.contiguous()
    grad = launcher.fresh_gradient(source)
    stats = launcher.stats_of(totals, sum_student, inputs)
    soft, hard, z = (None if g is None else g.float() for g in upstream)
    launcher.run(source, inputs, stats=stats, grad=grad, c_soft=soft, c_hard=hard, c_z=z)
    return grad
