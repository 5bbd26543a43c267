"""Autograd around the operators whose logits come from a head.

A scalar loss makes its gradients in the forward call, of the size of the hidden states and the weight, and backward
multiplies them by the upstream gradient. Per-token losses, and fp16, whose gradient must see a loss scale before it is
rounded, run through the chunks again in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kdfast.ops.dense import autograd as dense_autograd
from kdfast.ops.dense.autograd import PerToken, Spec, only_once
from kdfast.ops.head import operators as head
from kdfast.ops.head.operators import N_PARTS
from kdfast.spec.head import LMHead
from kdfast.spec.problem import Logits, Problem
from kdfast.spec.reduction import DistillTerms, assemble, coefficients, reduced_terms, token_weights, weighted

_N_PER_TOKEN = len(PerToken._fields)


class Operators(Protocol):
    """What runs a call: the operators of :mod:`kdfast.ops.head`, or what takes their place over ranks."""

    def forward(self, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Terms of each token."""

    def fused(self, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Terms of each token, and finished gradients."""


class HeadSpec(NamedTuple):
    """What of a call with heads is not a tensor; the student stands first."""

    dense: Spec
    softcaps: tuple[float, ...]
    scales: tuple[float, ...]
    memory_budget: int  # 0: the default of the device
    over_ranks: Operators | None = None  # None: this rank has all columns

    @property
    def operators(self) -> Operators:
        """What runs the call."""
        return head if self.over_ranks is None else self.over_ranks


class Tensors(NamedTuple):
    """The participants' tensors, the student first: logits, or hidden states where there is a weight."""

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    lows: tuple[Tensor | None, ...]  # of a low-rank product that is added: a row a token
    ups: tuple[Tensor | None, ...]  # and a row a column

    def flat(self) -> tuple[Tensor | None, ...]:
        """All of them, as a Function takes them."""
        return tuple(x for part in self for x in part)

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> Tensors:
        """From what ``flat`` returned."""
        n = len(flat) // N_PARTS
        return cls(*(flat[k * n : (k + 1) * n] for k in range(N_PARTS)))


def _arguments(tensors: Tensors, spec: HeadSpec, temperature: Tensor, per_token: PerToken) -> tuple[Any, ...]:
    """What both operators take before what is wanted."""
    student, *teachers = tensors.inputs
    inputs = spec.dense.inputs(tuple(teachers), per_token, temperature.detach())
    of_each = (*tensors[1:], spec.softcaps, spec.scales)
    return student, *inputs.arguments, *(list(part) for part in of_each), spec.memory_budget


def _to_student(tensors: Tensors, needs: tuple[bool, ...]) -> list[bool]:
    """Of the student's parts those that need a gradient; ``needs`` is that of the flat tensors."""
    return list(needs[:: len(tensors.inputs)])


def _flat_gradients(tensors: Tensors, wanted: list[bool], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """One gradient per flat tensor: those of the student where wanted, None for the teachers."""
    n = len(tensors.inputs)
    out: list[Tensor | None] = [None] * (N_PARTS * n)
    for k, (yes, grad) in enumerate(zip(wanted, grads, strict=True)):
        out[k * n] = grad if yes else None
    return tuple(out)


class _Fused(torch.autograd.Function):
    """Scalar loss with the gradients made in the forward call; returns (loss, soft, hard, z2, observed)."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: HeadSpec,
        temperature: Tensor,
        c_soft: Tensor | None,
        c_hard: Tensor | None,
        c_z: Tensor | None,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        per_token, flat = PerToken(*flat[:_N_PER_TOKEN]), flat[_N_PER_TOKEN:]
        tensors, coefficients = Tensors.of(flat), (c_soft, c_hard, c_z)
        wanted = _to_student(tensors, ctx.needs_input_grad[5 + _N_PER_TOKEN :])
        arguments = _arguments(tensors, spec, temperature, per_token)
        z, by_tau, observes = spec.dense.wants
        out = spec.operators.fused(*arguments, z, by_tau, *coefficients, wanted, observes)
        tokens, dtau, gradients, observed = out[:3], out[3], out[4:-1], out[-1]
        ctx.save_for_backward(*coefficients, *tokens, dtau, *gradients, *tensors.flat())
        ctx.spec, ctx.wanted = spec, wanted
        ctx.dtype = temperature.dtype
        ctx.mark_non_differentiable(*tokens, observed)
        ctx.set_materialize_grads(False)
        terms = [weighted(c, x, "sum") for c, x in zip(coefficients, tokens, strict=True) if c is not None]
        return sum(terms[1:], terms[0]), *tokens, observed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        coefficients, tokens, (dtau, *grads), flat = (
            ctx.saved_tensors[a:b] for a, b in ((0, 3), (3, 6), (6, 7 + N_PARTS), (7 + N_PARTS, None))
        )
        sources = [upstream, *(x for x in flat if x is not None)]
        scaled = tuple(only_once((upstream * g).to(g.dtype), *sources) for g in grads)
        to_coefficients = [
            None if c is None or not needed else upstream * torch.where((c != 0) | x.isfinite(), x, 0.0)
            for c, x, needed in zip(coefficients, tokens, ctx.needs_input_grad[2:5], strict=True)
        ]
        to_temperature = None
        if ctx.needs_input_grad[1] and ctx.spec.dense.wants.dtau:
            moved = upstream * weighted(coefficients[0], dtau, "sum")
            to_temperature = only_once(moved.to(ctx.dtype), *sources)
        to_tensors = _flat_gradients(Tensors.of(flat), ctx.wanted, scaled)
        return None, to_temperature, *to_coefficients, *[None] * _N_PER_TOKEN, *to_tensors


class _Tokens(torch.autograd.Function):
    """Per-token (soft, hard, z2, observed), with a backward that makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: HeadSpec,
        temperature: Tensor,
        *flat: Any,
    ) -> tuple[Tensor, ...]:
        per_token = PerToken(*flat[:_N_PER_TOKEN])
        arguments = _arguments(Tensors.of(flat[_N_PER_TOKEN:]), spec, temperature, per_token)
        *tokens, dtau, observed = spec.operators.forward(*arguments, *spec.dense.wants)
        ctx.save_for_backward(temperature, dtau, *flat)
        ctx.spec = spec
        ctx.mark_non_differentiable(observed)
        ctx.set_materialize_grads(False)
        return *tokens, observed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = upstream[:3]
        temperature, dtau, *flat = ctx.saved_tensors
        per_token, flat = PerToken(*flat[:_N_PER_TOKEN]), flat[_N_PER_TOKEN:]
        spec, tensors = ctx.spec, Tensors.of(tuple(flat))
        taught = len(tensors.inputs) > 1 or per_token.kept_ids is not None
        there = (taught, per_token.labels is not None, spec.dense.wants.z)
        coefficients = [g if yes else None for g, yes in zip(upstream, there, strict=True)]
        given = [g for g in coefficients if g is not None]
        others, nothing = (None,) * _N_PER_TOKEN, (None,) * len(flat)
        if not given:
            return None, None, *others, *nothing
        sources = [*given, *(x for x in flat if x is not None)]
        wanted = _to_student(tensors, ctx.needs_input_grad[2 + _N_PER_TOKEN :])
        to_tensors: tuple[Tensor | None, ...] = nothing
        if any(wanted):
            arguments = _arguments(tensors, spec, temperature, per_token)
            with torch.no_grad():
                grads = spec.operators.fused(*arguments, False, False, *coefficients, wanted)[4 : 4 + N_PARTS]
            to_tensors = _flat_gradients(tensors, wanted, tuple(only_once(g, *sources) for g in grads))
        to_temperature = None
        if ctx.needs_input_grad[1] and spec.dense.wants.dtau and coefficients[0] is not None:
            moved = weighted(coefficients[0], dtau, "sum").to(temperature.dtype)
            to_temperature = only_once(moved, *sources)
        return None, to_temperature, *others, *to_tensors


# --- What the registry asks -------------------------------------------------------------------------------------------


def has_head(problem: Problem) -> bool:
    """Whether anybody's logits come from a head."""
    return any(isinstance(x, LMHead) for x in (problem.student, *problem.teachers))


def declines(problem: Problem) -> str | None:
    """Why a call with heads cannot run in chunks, whatever the backend."""
    if problem.teacher_grad:
        return "gradients to a teacher beside an LMHead"
    if problem.overwrite_logits:
        return "overwrite_logits beside a teacher's LMHead"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms of an LMHead"
    return None


def _parts(x: Logits) -> tuple[Any, ...]:
    """Tensor, weight, bias, the low-rank two, softcap and scale of a participant.

    Under autocast a head computes as a linear layer.
    """
    if isinstance(x, Tensor):
        return x, *[None] * (N_PARTS - 1), 0.0, 1.0
    tensors = x.tensors()
    device = x.hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    return *tensors, x.cap.softcap, x.cap.scale


def distill_loss(problem: Problem, backend: str, over_ranks: Operators | None = None) -> DistillTerms:
    """The loss in chunks of tokens, through the kernels of a backend."""
    parts = [_parts(x) for x in (problem.student, *problem.teachers)]
    *of_each, softcaps, scales = zip(*parts, strict=True)
    tensors = Tensors(*of_each)
    spec = HeadSpec(dense_autograd.spec_of(problem, backend), softcaps, scales, problem.memory_budget or 0, over_ranks)
    per_token = PerToken.of(problem)
    w = token_weights(problem)
    mine = [part[0] for part in tensors if part[0] is not None]
    in_forward = (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in mine)
        and tensors.inputs[0].dtype != torch.float16
        and problem.reduction != "none"
    )
    columns = None if over_ranks is None or problem.kept is None else problem.kept.vocab_size
    with torch.autocast(tensors.inputs[0].device.type, enabled=False):
        if in_forward:
            c = coefficients(problem, w)
            loss, *out = _Fused.apply(spec, problem.temperature, *c, *per_token, *tensors.flat())  # type: ignore[no-untyped-call]
            tokens = dense_autograd.token_terms(problem, out, columns)
            return DistillTerms(loss, *reduced_terms(problem, tokens, w))
        out = _Tokens.apply(spec, problem.temperature, *per_token, *tensors.flat())  # type: ignore[no-untyped-call]
        return assemble(problem, dense_autograd.token_terms(problem, out, columns), w)
