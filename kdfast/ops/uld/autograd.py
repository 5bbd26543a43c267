"""Autograd around the operators of universal logit distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.uld import operators
from kdfast.spec.problem import Problem
from kdfast.spec.reduction import keep


def token_losses(student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """The loss of every token, (...), differentiable in the student and in a temperature that requires grad."""
    signed = torch.is_grad_enabled() and student.requires_grad
    loss, *_ = _Tokens.apply(  # type: ignore[no-untyped-call]
        student, teacher, problem.temperature, problem.counted, signed, problem.learns_temperature
    )
    return loss  # type: ignore[no-any-return]


class _Tokens(torch.autograd.Function):
    """(loss, signs, stats, dtau), with a backward that reads the student again."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return operators.forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, _, temperature, counted, _, _ = inputs
        _, signs, stats, dtau = output
        ctx.mark_non_differentiable(signs, stats, dtau)
        ctx.save_for_backward(student, temperature, counted, signs, stats, dtau)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        student, temperature, counted, signs, stats, dtau = ctx.saved_tensors
        to_student = to_temperature = None
        if ctx.needs_input_grad[0]:
            grad = operators.backward(student.detach(), temperature, counted, signs, stats, upstream.detach())
            to_student = _only_once(grad, student, temperature, upstream)
        if ctx.needs_input_grad[2]:
            grad = (upstream * keep(dtau, counted)).sum().to(temperature)
            to_temperature = _only_once(grad, student, temperature, upstream)
        return to_student, None, to_temperature, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that depends on what it was made from, but does not say how."""

    @staticmethod
    def forward(grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        msg = "kdfast: uld_loss has no second derivative (its gradient was made with create_graph=True): use the first"
        raise RuntimeError(msg)


def _only_once(grad: Tensor, *sources: Tensor) -> Tensor:
    """The gradient, which raises where somebody differentiates it again."""
    return _Once.apply(grad, *sources) if torch.is_grad_enabled() else grad  # type: ignore[no-untyped-call]
