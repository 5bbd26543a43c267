"""Noise-contrastive estimation against rows of a memory: scores, value and gradient without (B, K, d) in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

GATHERED = 1 << 24  # elements of the memory's rows that are gathered at a time
DENSE = 8  # up to so many times K rows of memory, a product with all of it is faster than gathering K rows a sample


def scores(anchors: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
    """anchors_b . memory[positions_bk], (B, K), of anchors (B, d), memory (N, d), positions (B, K)."""
    if _whole(memory, positions):
        return (anchors @ memory.T).gather(1, positions)
    return torch.cat([torch.einsum("bkd,bd->bk", memory[p], a) for a, p in _parts(anchors, memory, positions)])


def combined(weights: Tensor, memory: Tensor, positions: Tensor) -> Tensor:
    """sum_k weights_bk memory[positions_bk], (B, d)."""
    if _whole(memory, positions):
        spread = weights.new_zeros(len(weights), len(memory))
        return spread.scatter_add_(1, positions, weights) @ memory
    return torch.cat([torch.einsum("bk,bkd->bd", w, memory[p]) for w, p in _parts(weights, memory, positions)])


def _whole(memory: Tensor, positions: Tensor) -> bool:
    # scatter_add_ adds in any order on a GPU, and a run should be repeated to the bit where it is asked for.
    repeatable = memory.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled()
    return len(memory) <= DENSE * positions.shape[1] and repeatable


def _parts(x: Tensor, memory: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = max(1, GATHERED // (positions.shape[1] * memory.shape[1]))
    return list(zip(x.split(size), positions.split(size), strict=True))


class _WithGradient(torch.autograd.Function):
    """``value``, whose gradient with respect to ``x`` is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None


def contrast(
    anchors: Tensor, memory: Tensor, positions: Tensor, raw: Tensor, log_normalizer: Tensor, temperature: float
) -> Tensor:
    """-1/B sum_b [log h_b0 + sum_{k >= 1} log(1 - h_bk)], h = p / (p + K / N), p = exp(raw / temperature) / Z.

    That is the logistic loss of raw / temperature - log Z - log(K / N). The gradient is made with the value, so that
    the memory may be written to before the backward pass; memory and Z are constants to it.

    Args:
        anchors: (B, d), to which the gradient goes.
        memory: (N, d).
        positions: (B, 1 + K) int64, the positive first.
        raw: (B, 1 + K), ``scores`` of the three.
        log_normalizer: 0-d, log Z.
        temperature: > 0.
    """
    negatives = positions.shape[1] - 1
    share = torch.tensor(negatives / len(memory), dtype=raw.dtype, device=raw.device)
    h = raw / temperature - log_normalizer - share.log()
    value = (softplus(-h[:, 0]).sum() + softplus(h[:, 1:]).sum()) / len(h)
    slope = h.sigmoid()
    slope[:, 0] -= 1.0
    gradient = combined(slope / (temperature * len(h)), memory, positions)
    known: Tensor = _WithGradient.apply(anchors, value, gradient)  # type: ignore[no-untyped-call]
    return known
