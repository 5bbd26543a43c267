"""The loss over ranks: a shard of the vocabulary, or of the tokens, on each.

Logits stay where they are; ranks that share the vocabulary exchange a few numbers of each token. Every rank of a group
returns the same value, and the gradient of its own columns; that of a head's hidden states, which all of them hold, is
summed over the group inside.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops import _registry
from kdfast.ops.head import autograd as head_autograd
from kdfast.ops.shard import autograd as shard_autograd
from kdfast.ops.shard.metrics import Shard
from kdfast.spec.divergence import Term
from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.problem import Logits, Problem, Teacher, build_problem, device_of
from kdfast.spec.reduction import DistillTerms, Metrics, metric_tokens, token_weights
from kdfast.spec.sparse import SparseTargets


def distill_loss(
    student: Logits,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    *,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    token_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
    return_terms: bool = False,
    return_metrics: bool = False,
    **options: Any,
) -> Tensor | DistillTerms:
    """:func:`kdfast.distill_loss` where ranks hold shards: the same value and gradient as one rank with everything.

    Args:
        student: (..., V / ranks) logits, this rank's columns of this rank's tokens; or a :class:`kdfast.LMHead` of the
            whole hidden states (..., H) and this rank's rows of the weight (V / ranks, H) and of the bias. Its logits
            are made in chunks of tokens. The gradient of ``hidden`` is summed over ``vocab_group`` inside, as a
            column-parallel linear layer does: each rank has that of the whole loss, and sums it no further. Those of
            the weight and the bias are of this rank's rows. What all ranks hold (``hidden``, and a loss's upstream
            gradient) must be the same on them, and require grad on all or on none.
        teacher: the same columns of the teacher's logits, an LMHead of them, or a sequence of both; or
            :class:`kdfast.SparseTargets` of the whole vocabulary, the same on every rank of ``vocab_group``; None for
            plain cross-entropy.
        labels: (...) int64, columns of the whole vocabulary; the same on every rank of ``vocab_group``, as ``weights``
            and ``alpha`` are.
        vocab_group: ranks that share the vocabulary of the same tokens, in the order of their columns. None: this rank
            has all columns.
        vocab_start: the first of this rank's columns; None: all shards are as wide as this one. Heads with shards of
            their own width agree on the size of their chunks by one number, for which the host waits.
        token_group: ranks that share the tokens. The mean's denominator counts the tokens of all of them, and the value
            is the sum over all; a gradient needs no division by the number of ranks, and a sum over them
            (``DistributedDataParallel`` averages: multiply the loss by its number of ranks). None: this rank has all.
        backend: "cpu", "triton", or None for the one that serves the call.
        return_terms: return :class:`kdfast.DistillTerms`.
        return_metrics: return them with :class:`kdfast.Metrics` of the tokens of all ranks.
        **options: those of :func:`kdfast.distill_loss` but ``overwrite_logits``, ``teacher_grad``, ``class_dim`` and
            ``vocab="truncate"``, which raise.

    Returns:
        The loss, the same on every rank of both groups; 0-d, or (...) with ``reduction="none"``.

    Raises:
        ValueError: as :func:`kdfast.distill_loss`; an option that is not served over ranks; shards of the vocabulary
            that no kernel serves, with the reason; targets of another vocabulary than the shards have together.
        RuntimeError: a named backend that cannot serve the call.
    """
    for name in ("overwrite_logits", "teacher_grad"):
        if options.get(name):
            msg = f"{name} is not served by kdfast.distributed: leave it False"
            raise ValueError(msg)
    _check_indices(labels)
    if options.pop("class_dim", -1) != -1:
        msg = "class_dim is not served by kdfast.distributed: make the classes the last axis, x.movedim(class_dim, -1)"
        raise ValueError(msg)
    if options.pop("vocab", "strict") != "strict":
        msg = "vocab='truncate' is not served by kdfast.distributed: cut both vocabularies before they are sharded"
        raise ValueError(msg)
    participants = [student, *teacher] if isinstance(teacher, (list, tuple)) else [student, teacher]
    if vocab_group is not None and any(isinstance(x, LMHead) and x.low_rank is not None for x in participants):
        msg = "LMHead: low_rank is not served where ranks share the vocabulary: add the product to the weight"
        raise ValueError(msg)
    if isinstance(teacher, PackedTargets):
        teacher = teacher.unpack()
    # Sparse targets have all columns, this rank's student a part of them: their sizes are compared over ranks.
    wider = vocab_group is not None and isinstance(teacher, SparseTargets)
    vocab: Literal["strict", "truncate"] = "truncate" if wider else "strict"
    shared = vocab_group is not None and dist.get_world_size(vocab_group) > 1
    problem = build_problem(
        student,
        teacher,
        labels,
        return_terms=return_terms,
        return_metrics=return_metrics,
        vocab=vocab,
        of_shard=shared,
        **options,
    )
    row = _registry.select(problem if vocab_group is None else _for_kernels(problem), backend)
    if vocab_group is not None and row.name == "reference":
        asked = _registry.backends(_for_kernels(problem)).rows
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in asked if r.name != "reference")
        msg = f"shards of a vocabulary are served by kernels only, and none takes this call ({reasons})"
        raise ValueError(msg)
    if token_group is not None and problem.reduction == "mean" and problem.num_items is None:
        problem = dataclasses.replace(problem, num_items=_count_tokens(problem, token_group))
    if vocab_group is None:
        terms = row.distill_loss(problem)
    else:
        terms = shard_autograd.distill_loss(problem, row.name, _shard(problem, vocab_group, vocab_start))
    if token_group is not None and problem.reduction != "none":
        everywhere = [None if x is None else _value_of_all(x, token_group) for x in terms[:4]]
        terms = DistillTerms(*everywhere)._replace(metrics=terms.metrics)  # type: ignore[arg-type]
    if token_group is not None and terms.metrics is not None:
        terms = terms._replace(metrics=_metrics_of_all(problem, terms.metrics, token_group))
    return terms if return_terms or return_metrics else terms.loss


def _check_indices(labels: Tensor | None) -> None:
    if isinstance(labels, Tensor) and labels.is_floating_point():
        msg = "labels: class probabilities are not served by kdfast.distributed: pass class indices, int64"
        raise ValueError(msg)


def _for_kernels(problem: Problem) -> Problem:
    """What the kernels are asked for: over shards, sparse targets take a dense teacher's passes, see shard_sparse."""
    if problem.sparse is None:
        return problem
    if problem.learns_temperature:
        msg = "a learned temperature with sparse targets is not served over shards of the vocabulary: pass a number"
        raise ValueError(msg)
    terms = (Term("forward_kl", 1.0, 0.0),)
    return dataclasses.replace(problem, sparse=None, teachers=(problem.student,), terms=terms)


def _shard(problem: Problem, group: dist.ProcessGroup, start: int | None) -> Shard:
    width = problem.vocab_size
    if start is None:
        return Shard(group, dist.get_rank(group) * width, width)
    if head_autograd.has_head(problem):
        widest = torch.tensor(width, device=device_of(problem.student))
        dist.all_reduce(widest, dist.ReduceOp.MAX, group=group)
        width = int(widest)
    return Shard(group, start, width)


def distill_dtensors(student: Any, teacher: Any, labels: Tensor | None, **options: Any) -> Tensor | DistillTerms:
    """What :func:`kdfast.distill_loss` does with DTensors: finds the groups by placements, never gathers.

    The student's last axis may be sharded over one mesh axis and its leading axes over others; teachers are placed as
    the student is, tensors per token, sparse targets among them, as its leading axes are. Of an :class:`kdfast.LMHead`
    the hidden states are placed as the leading axes of its logits and replicated over the vocabulary's mesh axis, along
    which weight and bias are ``Shard(0)``; over the other axes they are replicated, and their gradient is partial where
    tokens are sharded. The two of ``low_rank`` are placed as hidden states and weight are. The loss is a plain tensor,
    per token that of the local rows.

    Raises:
        ValueError: another placement, a plain tensor beside a DTensor, or a vocabulary too small for its mesh axis.
    """
    from torch.distributed.tensor import DTensor

    _check_indices(labels)
    whose: Any = student.hidden if isinstance(student, LMHead) else student
    mesh = whose.device_mesh
    where = _logits_placements("student", student, mesh)
    last, vocab_size = len(student.shape) - 1, student.shape[-1]
    groups: dict[str, Any] = {}
    for axis, placement in enumerate(where):
        kind = _kind(placement, last)
        if (kind is None and not placement.is_replicate()) or kind in groups:
            msg = (
                f"student is placed as {where}: one mesh axis may shard the vocabulary and one the tokens, the others "
                "replicate; redistribute it"
            )
            raise ValueError(msg)
        if kind is not None:
            groups[kind] = mesh.get_group(axis)
        if kind == "vocab_group" and vocab_size % mesh.size(axis):
            chunk = -(-vocab_size // mesh.size(axis))
            if chunk * (mesh.size(axis) - 1) >= vocab_size:
                msg = f"student has {vocab_size} columns, too few for each of {mesh.size(axis)} ranks to hold some"
                raise ValueError(msg)
            groups["vocab_start"] = mesh.get_local_rank(axis) * chunk
    rows = _Rows(mesh, where, last)

    def per_token(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or (x.dim() == 0 and not isinstance(x, DTensor)):
            return x
        return rows.local(name, x, rows.per_token())

    def participant(name: str, x: Any) -> Any:
        if isinstance(x, LMHead):
            return rows.head(name, x)
        if isinstance(x, PackedTargets):
            msg = (
                f"{name}: packed targets are not served beside DTensors: pass their unpack(), placed as the tokens are"
            )
            raise TypeError(msg)
        if isinstance(x, SparseTargets):
            return x.map(lambda t: per_token(name, t))
        return rows.local(name, x, where) if isinstance(x, Tensor) else x

    for name in ("weights", "alpha", "temperature", "z_loss", "num_items"):
        if name in options:
            options[name] = per_token(name, options[name])
    teachers = [participant("teacher", t) for t in teacher] if isinstance(teacher, list | tuple) else teacher
    return distill_loss(
        participant("student", student),
        teachers if isinstance(teacher, list | tuple) else participant("teacher", teacher),
        per_token("labels", labels),
        **groups,
        **options,
    )


def _kind(placement: Any, last: int) -> str | None:
    """The group that a placement of logits with axes 0 ... last makes of a mesh axis; None where it makes none."""
    from torch.distributed.tensor import Shard as ShardOf

    if type(placement) is not ShardOf:  # a subclass holds its columns in another order
        return None
    return "vocab_group" if placement.dim % (last + 1) == last else "token_group"


def _logits_placements(name: str, x: Any, mesh: Any) -> tuple[Any, ...]:
    """How logits are placed; of a head, how those that it describes would be."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ShardOf

    if not isinstance(x, LMHead):
        return tuple(x.placements)
    if not isinstance(x.weight, DTensor) or x.weight.device_mesh != mesh:
        msg = f"{name}: LMHead.weight must be a DTensor on {mesh}, as hidden is: see distribute_tensor"
        raise ValueError(msg)
    hidden: Any = x.hidden
    last, out = hidden.dim() - 1, []
    for of_hidden, of_weight in zip(hidden.placements, x.weight.placements, strict=True):
        if of_weight.is_replicate() and _kind(of_hidden, last) != "vocab_group":
            out.append(of_hidden)
        elif type(of_weight) is ShardOf and of_weight.dim % 2 == 0 and of_hidden.is_replicate():
            out.append(ShardOf(last))
        else:
            msg = (
                f"{name}: LMHead.hidden is placed as {hidden.placements} and weight as {x.weight.placements}: over "
                "each mesh axis either weight is Shard(0), its rows, and hidden replicated, or hidden shards its "
                "leading axes and weight is replicated; redistribute them"
            )
            raise ValueError(msg)
    return tuple(out)


class _Rows:
    """Takes DTensors that are placed as the student's logits are to what of them is here."""

    def __init__(self, mesh: Any, placements: tuple[Any, ...], last: int) -> None:
        self.mesh, self.placements, self.last = mesh, placements, last

    def per_token(self, vocabulary: Any = None) -> tuple[Any, ...]:
        """Placements of a tensor without the vocabulary's axis, or with it as ``vocabulary``."""
        from torch.distributed.tensor import Replicate

        instead = Replicate() if vocabulary is None else vocabulary
        return tuple(instead if _kind(p, self.last) == "vocab_group" else p for p in self.placements)

    def local(self, name: str, x: Any, placements: tuple[Any, ...], gradient: tuple[Any, ...] | None = None) -> Tensor:
        """The local part of x; its gradient is placed as x is, unless told otherwise."""
        from torch.distributed.tensor import DTensor

        if not isinstance(x, DTensor):
            msg = f"{name} must be a DTensor as the student is, placed as {placements}: see distribute_tensor"
            raise ValueError(msg)
        if x.dim() and (x.device_mesh != self.mesh or tuple(x.placements) != placements):
            msg = f"{name} is placed as {x.placements} on {x.device_mesh}, expected {placements} on {self.mesh}"
            raise ValueError(msg)
        part: Tensor = x.to_local(grad_placements=gradient)
        return part

    def head(self, name: str, x: LMHead) -> LMHead:
        """The shard of a head; each token's rank adds to the gradient of what they all hold."""
        from torch.distributed.tensor import Partial, Replicate
        from torch.distributed.tensor import Shard as ShardOf

        kinds = [_kind(p, self.last) for p in self.placements]
        of_weight = tuple(ShardOf(0) if k == "vocab_group" else Replicate() for k in kinds)
        gradient = tuple(Partial() if k == "token_group" else p for k, p in zip(kinds, of_weight, strict=True))
        hidden = self.local(f"{name}: LMHead.hidden", x.hidden, self.per_token())
        weight = self.local(f"{name}: LMHead.weight", x.weight, of_weight, gradient)
        bias = None if x.bias is None else self.local(f"{name}: LMHead.bias", x.bias, of_weight, gradient)
        low_rank = x.low_rank
        if low_rank is not None:
            a = self.local(f"{name}: LMHead.low_rank[0]", low_rank[0], self.per_token())
            low_rank = (a, self.local(f"{name}: LMHead.low_rank[1]", low_rank[1], of_weight, gradient))
        return dataclasses.replace(x, hidden=hidden, weight=weight, bias=bias, low_rank=low_rank)


def _count_tokens(problem: Problem, group: dist.ProcessGroup) -> Tensor:
    """Weight of the tokens of all ranks; 1 where there are none, so that the loss is 0 / 1."""
    total = token_weights(dataclasses.replace(problem, reduction="sum")).sum(dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return torch.where(total != 0, total, 1.0).float()


def _metrics_of_all(problem: Problem, mine: Metrics, group: dist.ProcessGroup) -> Metrics:
    """Means over the tokens of all ranks."""
    like = mine.student_entropy
    counted, labelled = (torch.as_tensor(n, dtype=torch.float64, device=like.device) for n in metric_tokens(problem))
    counts = {name: labelled if name == "accuracy" else counted for name in Metrics._fields}
    there = {name: x for name, x in mine._asdict().items() if x is not None}
    sums = [torch.where(counts[name] == 0, 0.0, x.double() * counts[name]) for name, x in there.items()]
    totals = torch.stack([*sums, *(counts[name] for name in there)])
    dist.all_reduce(totals, group=group)
    means = totals[: len(there)] / totals[len(there) :]
    return mine._replace(**{name: x.float() for name, x in zip(there, means, strict=True)})


def _value_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks as a value; the gradient is that of this rank's part."""
    total = x.detach().double()
    dist.all_reduce(total, group=group)
    return x + (total.to(x.dtype) - x.detach())
