"""Autograd over shards of the vocabulary: of stored logits, and of heads whose weights lie on several ranks.

Stored logits save a few numbers per token, and backward reads the logits again under the upstream gradient. Heads run
as they do on one rank (``head_autograd``), with two operators that exchange statistics of each chunk in the place of
the local ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.ops.dense import autograd as dense_autograd
from kdfast.ops.dense import operators as dense
from kdfast.ops.dense.autograd import PerToken, Spec
from kdfast.ops.dense.inputs import N_INPUTS, Inputs, Wants
from kdfast.ops.dense.operators import absent, wants_of
from kdfast.ops.eager import outside_graphs
from kdfast.ops.head import autograd as head_autograd
from kdfast.ops.head import operators as head
from kdfast.ops.head.operators import N_HEADS, Chunks, Gradients, Heads
from kdfast.ops.shard import operators as shard_dense
from kdfast.ops.shard import sparse as shard_sparse
from kdfast.ops.shard.metrics import Shard
from kdfast.ops.shard.operators import Factors, Statistics
from kdfast.ops.shard.sparse import SparseStatistics
from kdfast.spec.problem import Problem
from kdfast.spec.reduction import DistillTerms, assemble, token_weights
from kdfast.views import contiguous_rows


@outside_graphs
def distill_loss(problem: Problem, backend: str, shard: Shard) -> DistillTerms:
    """The loss over the columns of all ranks; labels and sparse targets are of the whole vocabulary.

    A compiler goes around it: between the kernels there are collectives, and checks that read values.
    """
    if head_autograd.has_head(problem):
        return head_autograd.distill_loss(problem, backend, HeadsOverRanks(shard))
    teachers: tuple[Tensor, ...] = problem.teachers  # type: ignore[assignment]
    spec, per_token = dense_autograd.spec_of(problem, backend), PerToken.of(problem)
    out = _Stored.apply(problem.student, problem.temperature, per_token, spec, shard, *teachers)  # type: ignore[no-untyped-call]
    columns = None if problem.kept is None else problem.kept.vocab_size
    return assemble(problem, dense_autograd.token_terms(problem, out, columns), token_weights(problem))


def _statistics(
    student: Tensor, inputs: Inputs, shard: Shard, wants: Wants, *, ours: bool
) -> tuple[Statistics, SparseStatistics | None]:
    if inputs.kept_ids is None:
        return shard_dense.statistics(student, inputs, shard, wants), None
    found = shard_sparse.statistics(student, inputs, shard, wants, ours=ours)
    return found.common, found


# --- Stored logits ----------------------------------------------------------------------------------------------------


class _Stored(torch.autograd.Function):
    """Per-token (soft, hard, z2, observed) over all shards; the gradient of the columns that are here."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        temperature: Tensor,
        per_token: PerToken,
        spec: Spec,
        shard: Shard,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = spec.inputs(teachers, per_token, temperature.detach())
        found, sparse = _statistics(student, inputs, shard, spec.wants, ours=False)
        ctx.save_for_backward(student, *inputs.tensors)
        ctx.spec, ctx.inputs, ctx.shard, ctx.found, ctx.sparse = spec, inputs, shard, found, sparse
        ctx.set_materialize_grads(False)
        observed = found.seen(per_token.counted)
        ctx.mark_non_differentiable(observed)
        return *found.terms(per_token.counted), observed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        student, *_ = ctx.saved_tensors  # raises where one was changed since
        spec, inputs, found = ctx.spec, ctx.inputs, ctx.found
        there = (inputs.taught, inputs.labels is not None, spec.wants.z)
        soft, hard, z = (g if yes else None for g, yes in zip(upstream[:3], there, strict=True))
        to_student = to_temperature = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                grad = _gradient(ctx, student, (soft, hard, z))
            sources = [g for g in (soft, hard, z) if g is not None]
            to_student = dense_autograd.only_once(grad, *sources, student)
        if ctx.needs_input_grad[1] and found.dtau is not None and soft is not None:
            counted = soft if inputs.counted is None else soft.masked_fill(~inputs.counted, 0.0)
            moved = (counted * torch.where(counted == 0, 0.0, found.dtau)).sum().to(inputs.temperature)
            to_temperature = dense_autograd.only_once(moved, soft, student)
        return to_student, to_temperature, *[None] * (3 + len(inputs.teachers))


def _gradient(ctx: Any, student: Tensor, factors: Factors) -> Tensor:
    source = contiguous_rows(student)
    grad = dense.launcher(ctx.spec.backend).fresh_gradient(source)
    if ctx.sparse is None:
        shard_dense.gradient_into(grad, source, ctx.inputs, ctx.shard, ctx.found, factors)
    else:  # a copy without the kept columns, whose place the gradient takes
        ctx.sparse.kept.take_out(grad.copy_(source))
        shard_sparse.gradient_into(grad, grad, ctx.inputs, ctx.shard, ctx.sparse, factors)
    return grad


# --- Heads ------------------------------------------------------------------------------------------------------------


class HeadsOverRanks:
    """``kdfast.ops.head``'s two operators, for ranks that hold some rows of the weights each.

    A chunk's logits, and their gradient, stay on their rank: a product for each head, three all-reduces of numbers per
    token, the gradient in the logits' place, and two products more. What a rank's columns contribute to the gradient of
    the hidden states is summed over ranks in fp32 while the next chunk runs, so that every rank has that of the whole
    loss; the weight's and the bias' concern its own rows and stay.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def forward(self, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Terms of each token; arguments as in ``head_forward``."""
        inputs, heads = Inputs(*args[:N_INPUTS]), Heads(*args[N_INPUTS : N_INPUTS + N_HEADS])
        wants, _ = wants_of(args[N_INPUTS + N_HEADS :])
        chunks = Chunks(student, inputs, heads, columns=self.shard.widest)
        out = chunks.token_outputs(wants)
        for tokens in chunks:
            z, part = chunks.logits(0, tokens), chunks.inputs_of(tokens)
            found, _ = _statistics(z, part, self.shard, wants, ours=True)
            _fill(out, found, part, tokens)
        return head.finished(chunks, out)

    def fused(self, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Terms of each token and finished gradients; arguments as in ``head_fused``."""
        inputs, heads = Inputs(*args[:N_INPUTS]), Heads(*args[N_INPUTS : N_INPUTS + N_HEADS])
        wants, (*coefficients, wanted) = wants_of(args[N_INPUTS + N_HEADS :], 4)
        chunks = Chunks(student, inputs, heads, columns=self.shard.widest)
        out = chunks.token_outputs(wants)
        factors = [None if x is None else chunks.compact(x).float() for x in coefficients]
        gradients = _SummedGradients(chunks, wanted, self.shard.group)
        for tokens in chunks:
            z, part = chunks.logits(0, tokens), chunks.inputs_of(tokens)
            found, sparse = _statistics(z, part, self.shard, wants, ours=True)
            _fill(out, found, part, tokens)
            g = gradients.of_logits(z, tokens)
            c_soft, c_hard, c_z = (None if x is None else x[tokens] for x in factors)
            if sparse is None:
                shard_dense.gradient_into(g, z, part, self.shard, found, (c_soft, c_hard, c_z))
            else:
                shard_sparse.gradient_into(g, z, part, self.shard, sparse, (c_soft, c_hard, c_z))
            gradients.add(g, tokens)
        return head.finished(chunks, out, *gradients.finished())


def _fill(out: dict[str, Tensor], found: Statistics, inputs: Inputs, tokens: slice) -> None:
    soft, hard, z2 = found.terms(inputs.counted)
    dtau = found.dtau
    if dtau is not None and inputs.counted is not None:
        dtau = dtau.masked_fill(~inputs.counted, 0.0)
    for into, x in zip(out.values(), (soft, hard, z2, dtau, found.seen(inputs.counted)), strict=True):
        if not absent(into) and x is not None:
            into[tokens] = x


class _SummedGradients(Gradients):
    """The gradients of a head's shard; that of its hidden states over the columns of all ranks."""

    def __init__(self, chunks: Chunks, wanted: list[bool], group: dist.ProcessGroup) -> None:
        super().__init__(chunks, wanted)
        self.group = group
        self.on_its_way: tuple[Any, Tensor, slice] | None = None

    def add(self, g: Tensor, tokens: slice) -> None:
        super().add(g, tokens)
        if self.weight is None or self.d_student is None:
            return
        self._arrive()
        part = self.d_student[tokens].float()  # of fp32, the rows themselves
        self.on_its_way = dist.all_reduce(part, group=self.group, async_op=True), part, tokens

    def _arrive(self) -> None:
        if self.on_its_way is None or self.d_student is None:
            return
        work, part, tokens = self.on_its_way
        work.wait()
        self.d_student[tokens] = part
        self.on_its_way = None

    def finished(self) -> tuple[Tensor, ...]:
        self._arrive()
        return super().finished()
