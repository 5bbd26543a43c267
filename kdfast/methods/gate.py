"""Factors of 0 that silence a loss's gradient, too, without a look at their value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.methods.step import Outputs
from kdfast.spec.head import LMHead


class _Gate(torch.autograd.Function):
    """The identity, whose gradient is 0 where a factor is 0, whatever arrives: 0 times an infinite one would be NaN."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.factor = inputs[1].detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.factor.to(upstream.device) != 0, upstream, 0.0), None


def gated(x: Tensor, factor: float | Tensor) -> Tensor:
    """``x``, from which a loss that is multiplied by ``factor`` gets no gradient where that is 0.

    Args:
        x: what the loss is computed from.
        factor: a number or one a token, which leave x as it is (weights of 0 drop tokens), or a 0-d tensor.
    """
    if not isinstance(factor, Tensor) or factor.dim() > 0 or not x.requires_grad:
        return x
    gate: Tensor = _Gate.apply(x, factor)  # type: ignore[no-untyped-call]
    return gate


def gated_outputs(outputs: Outputs, factor: float | Tensor) -> Outputs:
    """The same of a model's logits and captured layers; what it returned is as it was."""
    if not isinstance(factor, Tensor):
        return outputs
    logits = outputs.logits
    if isinstance(logits, LMHead):
        logits = logits.map(lambda x: gated(x, factor))
    elif isinstance(logits, Tensor):
        logits = gated(logits, factor)
    captured = {name: [gated(x, factor) for x in layers] for name, layers in outputs.captured.items()}
    return Outputs(logits, outputs.raw, captured)


def nothing_of(*tensors: Tensor) -> Tensor:
    """0, whose gradient to each of the tensors is 0, whatever they hold: what a loss of weight 0 adds."""
    total = torch.zeros(())
    for x in tensors:
        if x.requires_grad:
            never = torch.zeros((), dtype=torch.bool, device=x.device)
            total = total.to(x.device) + torch.where(never, x, 0.0).sum(dtype=torch.float32)
    return total
