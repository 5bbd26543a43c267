"""Autograd around the dense operators, and what its backends serve.

Weights, alpha, tau^2 and the reduction are plain PyTorch on (N,) vectors, shared with the reference, so that their
gradients come from autograd; the Functions here carry those of the logits and of the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.dense.inputs import KERNEL_DTYPES, Inputs, Wants
from kdfast.spec import reference
from kdfast.spec.divergence import Term
from kdfast.spec.problem import Problem
from kdfast.spec.reduction import (
    DistillTerms,
    TokenTerms,
    assemble,
    coefficients,
    reduced_terms,
    token_weights,
    weighted,
)

_ops = torch.ops.kdfast

# What dense_fused is asked for where only its gradient is, and where that stands among its outputs.
_GRADIENT, _GRAD = (False, False), 4


class PerToken(NamedTuple):
    """The tensors of a call, beside the logits, that have an entry per token, or None; and what packed ones lie in."""

    labels: Tensor | None
    counted: Tensor | None
    teacher_weights: Tensor | None  # fp32
    kept_ids: Tensor | None
    kept_values: Tensor | None
    kept_per_row: Tensor | None
    kept_packed: Tensor | None

    @classmethod
    def of(cls, problem: Problem) -> PerToken:
        """Those of a problem."""
        weights = problem.teacher_weights
        if weights is not None:
            weights = weights.detach().float()
        kept: tuple[Tensor | None, ...] = (None, None, None, None)
        if problem.sparse is not None:
            ids, values, per_row = reference.kept_entries(problem, problem.sparse)
            kept = ids, values.float(), None if per_row is None else per_row.float(), None
        elif problem.packed is not None:
            offset, k_eff = problem.packed.offset, problem.packed.k_eff
            if k_eff is None:
                k_eff = torch.full_like(offset, problem.packed.kept)
            per_row = reference.captured_normaliser(problem, problem.packed)
            kept = torch.stack([offset, k_eff], -1), problem.packed.top, per_row, problem.packed.data
        return cls(problem.labels, problem.counted, weights, *kept)


_N_PER_TOKEN = len(PerToken._fields)


class Spec(NamedTuple):
    """What of a call is not a tensor."""

    terms: tuple[Term, ...]
    mix_logits: bool
    columns: int
    label_smoothing: float
    wants: Wants
    overwrite: bool
    kept_columns: int
    tail_rule: str
    kept_size: int  # and grid of packed targets, or 0
    kept_grid: int
    backend: str

    def inputs(self, teachers: tuple[Tensor, ...], per_token: PerToken, temperature: Tensor) -> Inputs:
        """The operators' arguments."""
        taught = bool(teachers) or per_token.kept_ids is not None
        names, weights, parameters = ([t[k] for t in self.terms if taught] for k in range(3))
        return Inputs(
            list(teachers),
            per_token.teacher_weights,
            per_token.labels,
            per_token.counted,
            temperature,
            names,  # type: ignore[arg-type]
            weights,  # type: ignore[arg-type]
            parameters,  # type: ignore[arg-type]
            self.mix_logits,
            self.columns,
            self.label_smoothing,
            self.backend,
            per_token.kept_ids,
            per_token.kept_values,
            per_token.kept_per_row,
            self.kept_columns,
            self.tail_rule,
            per_token.kept_packed,
            self.kept_size,
            self.kept_grid,
        )


class _OnlyOnce(torch.autograd.Function):
    """Identity on a gradient that names the remedy where somebody differentiates it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        msg = (
            "kdfast: the kernels have no second derivative (create_graph=True was differentiated again): "
            'pass backend="reference" to distill_loss'
        )
        raise RuntimeError(msg)


def only_once(grad: Tensor, *sources: Tensor) -> Tensor:
    """The gradient, which raises where somebody differentiates it again and would get it wrong."""
    needed = torch.is_grad_enabled() and any(s.requires_grad for s in sources)
    return _OnlyOnce.apply(grad, *sources) if needed else grad  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """Scalar loss with the gradient made in the forward call; returns (loss, soft, hard, z2, observed if wanted)."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        temperature: Tensor,
        c_soft: Tensor | None,
        c_hard: Tensor | None,
        c_z: Tensor | None,
        spec: Spec,
        inputs: Inputs,
    ) -> tuple[Tensor, ...]:
        coefficients = (c_soft, c_hard, c_z)
        arguments = (*inputs.arguments, spec.wants.z, spec.wants.dtau, *coefficients, spec.wants.observed)
        if spec.overwrite:
            *tokens, dtau, observed = _ops.dense_fused_(student, *arguments)
            torch.autograd.graph.increment_version(student)
            ctx.grad = student.detach()
        else:
            *tokens, dtau, ctx.grad, observed = _ops.dense_fused(student, *arguments)
            ctx.save_for_backward(student, *inputs.tensors)
        ctx.spec, ctx.inputs, ctx.coefficients, ctx.tokens, ctx.dtau = spec, inputs, coefficients, tokens, dtau
        terms = [weighted(c, x, "sum") for c, x in zip(coefficients, tokens, strict=True) if c is not None]
        reported = [*tokens, observed] if spec.wants.observed else tokens
        ctx.mark_non_differentiable(*reported)
        return sum(terms[1:], terms[0]), *reported

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Fused.gradients(ctx, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            sources = (upstream, *ctx.saved_tensors[:1])
            grads = tuple(None if g is None else only_once(g, *sources) for g in grads)
        return *grads, None, None

    @staticmethod
    def gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """To the student, the temperature and the coefficients."""
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if ctx.spec.overwrite:
                msg = "kdfast: a second backward needs the logits that overwrite_logits=True gave away"
                raise RuntimeError(msg)
            student, *_ = ctx.saved_tensors  # raises where one was changed since
            grad = _ops.dense_fused(student, *ctx.inputs.arguments, *_GRADIENT, *ctx.coefficients)[_GRAD]
        _ops.scale_(grad, upstream, ctx.spec.backend)
        to_coefficients = [
            None if c is None or not needed else upstream * torch.where((c != 0) | x.isfinite(), x, 0.0)
            for c, x, needed in zip(ctx.coefficients, ctx.tokens, ctx.needs_input_grad[2:5], strict=True)
        ]
        dtau = None
        if ctx.needs_input_grad[1] and ctx.spec.wants.dtau:
            dtau = (upstream * weighted(ctx.coefficients[0], ctx.dtau, "sum")).to(ctx.inputs.temperature.dtype)
        return grad, dtau, *to_coefficients


class _Tokens(torch.autograd.Function):
    """Per-token (soft, hard, z2, dtau, stats, observed), with a backward that reads the logits again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        spec: Spec,
        student: Tensor,
        temperature: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        inputs = spec.inputs(tensors[_N_PER_TOKEN:], PerToken(*tensors[:_N_PER_TOKEN]), temperature)
        return _ops.dense_forward(student, *inputs.arguments, *spec.wants)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, student, temperature, *tensors = inputs
        dtau, stats, observed = output[3:]
        ctx.mark_non_differentiable(dtau, stats, observed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, temperature, dtau, stats, *tensors)
        ctx.spec = spec

    @staticmethod
    def backward(
        ctx: Any, g_soft: Tensor | None, g_hard: Tensor | None, g_z: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        student, temperature, dtau, stats, *tensors = ctx.saved_tensors
        spec: Spec = ctx.spec
        per_token, teachers = PerToken(*tensors[:_N_PER_TOKEN]), tensors[_N_PER_TOKEN:]
        inputs = spec.inputs(tuple(teachers), per_token, temperature)
        # A term that the call does not have has an output without elements, whose upstream may be None or as empty.
        coefficients = [
            g if there else None
            for g, there in ((g_soft, inputs.taught), (g_hard, inputs.labels is not None), (g_z, spec.wants.z))
        ]
        g_soft = coefficients[0]
        upstream = [g for g in coefficients if g is not None]
        to_student: Tensor | None = None
        to_temperature: Tensor | None = None
        to_teachers: list[Tensor | None] = [None] * len(teachers)
        if any(ctx.needs_input_grad[3 + _N_PER_TOKEN :]) and g_soft is not None:
            # The same divergence with its arguments, and so its roles, exchanged.
            swapped = inputs._replace(teachers=[student], labels=None, **_exchanged(spec.terms))
            grad = _ops.dense_fused(teachers[0], *swapped.arguments, *_GRADIENT, g_soft, None, None)[_GRAD]
            to_teachers[0] = only_once(grad, *upstream, student, teachers[0])
        if ctx.needs_input_grad[2] and spec.wants.dtau and g_soft is not None:
            moved = weighted(g_soft, dtau, "sum").to(temperature.dtype)
            to_temperature = only_once(moved, *upstream, student, temperature)
        if ctx.needs_input_grad[1] and upstream:
            if spec.overwrite:
                with torch.no_grad():
                    _ops.dense_backward_(student, *inputs.arguments, stats, *coefficients)
                torch.autograd.graph.increment_version(student)
                to_student = student.detach()
            else:
                grad = _ops.dense_backward(student, *inputs.arguments, stats, *coefficients)
                to_student = only_once(grad, *upstream, student)
        return None, to_student, to_temperature, *[None] * _N_PER_TOKEN, *to_teachers


_EXCHANGED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "skew_forward_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_forward_kl",
}
_COMPLEMENT = ("jsd", "alpha_div")  # D(q, p; x) = D(p, q; 1 - x)


def _exchanged(terms: tuple[Term, ...]) -> dict[str, Any]:
    """The terms of D(p, q), written as a divergence of exchanged arguments."""
    return {
        "names": [_EXCHANGED.get(t.name, t.name) for t in terms],
        "weights": [t.weight for t in terms],
        "parameters": [1 - t.parameter if t.name in _COMPLEMENT else t.parameter for t in terms],
    }


# --- Rows of the registry ---------------------------------------------------------------------------------------------


def declines(problem: Problem, devices: tuple[str, ...]) -> str | None:
    """Why the dense kernels of these devices cannot serve this call."""
    if problem.kept is not None and problem.learns_temperature:
        return "a learned temperature with sparse targets"
    for x in (problem.student, *problem.teachers):
        stored = x if isinstance(x, Tensor) else x.hidden
        if stored.device.type not in devices:
            return f"logits on {stored.device}"
        if stored.dtype not in KERNEL_DTYPES:
            return f"{stored.dtype} logits (it takes float32, bfloat16 and float16)"
    if problem.temperature.device.type not in ("cpu", *devices):
        return f"temperature on {problem.temperature.device}"
    several = len(problem.teachers) > 1
    if several and problem.teacher_grad:
        return "gradients to an ensemble of teachers"
    if problem.teacher_weights is not None and problem.teacher_weights.requires_grad:
        return "gradients to teacher_weights"
    if several and problem.ensemble == "prob" and problem.learns_temperature:
        return "a learned temperature under ensemble='prob'"
    return None


def spec_of(problem: Problem, backend: str) -> Spec:
    """What of this call is not a tensor."""
    return Spec(
        problem.terms,
        problem.ensemble == "logit" and len(problem.teachers) > 1,
        problem.columns,
        problem.label_smoothing,
        Wants(
            problem.has_z_loss, problem.learns_temperature and bool(problem.teachers), observed=problem.return_metrics
        ),
        problem.overwrite_logits,
        0 if problem.kept is None else problem.kept.vocab_size,
        "" if problem.kept is None else reference.tail_rule(problem, problem.kept),
        0 if problem.packed is None else problem.packed.kept,
        0 if problem.packed is None else problem.packed.grid,
        backend,
    )


def distill_loss(problem: Problem, backend: str) -> DistillTerms:
    """The loss through the kernels of a backend."""
    student = problem.student
    assert isinstance(student, Tensor)
    teachers: tuple[Tensor, ...] = problem.teachers  # type: ignore[assignment]
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    spec = spec_of(problem, backend)
    spec = spec._replace(overwrite=spec.overwrite and not transformed)
    per_token = PerToken.of(problem)
    w = token_weights(problem)
    in_forward = (
        torch.is_grad_enabled()
        and student.requires_grad
        and student.dtype != torch.float16
        and problem.reduction != "none"
        and not problem.teacher_grad
        and not transformed
    )
    if not in_forward:
        tensors = (student, problem.temperature, *per_token, *teachers)
        # Where nothing requires grad, a compiler traces forward alone, and may pass it a context that it does not take.
        traced = torch.compiler.is_compiling() and not _needs_gradient(student, problem.temperature, *teachers)
        out = (_Tokens.forward if traced else _Tokens.apply)(spec, *tensors)  # type: ignore[arg-type]
        return assemble(problem, token_terms(problem, out), w)
    inputs = spec.inputs(teachers, per_token, problem.temperature.detach())
    c = coefficients(problem, w)
    loss, *out = _Fused.apply(student, problem.temperature, *c, spec, inputs)  # type: ignore[no-untyped-call]
    return DistillTerms(loss, *reduced_terms(problem, token_terms(problem, out), w))


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def token_terms(problem: Problem, out: Sequence[Tensor], columns: int | None = None) -> TokenTerms:
    """What an operator returned, without the terms that the call does not have, and with what sparse targets tell.

    ``out``: soft, hard, z2, then what is not reported, and observed where that was wanted. ``columns``: those under the
    distillation term, on all ranks; None: the problem's.
    """
    there = (problem.has_teacher, problem.labels is not None, problem.has_z_loss)
    terms = TokenTerms(*(x if yes else None for x, yes in zip(out[:3], there, strict=True)))
    if not problem.return_metrics:
        return terms
    return terms._replace(observed=reference.observe_kept(problem, out[-1], columns or problem.columns))
