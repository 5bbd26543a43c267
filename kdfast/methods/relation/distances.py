"""Pairwise distances whose gradient is defined where samples coincide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # From differences, not from |a|^2 + |b|^2 - 2ab: equal samples are at exactly 0, near ones keep their digits.
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, distances)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, distances = ctx.saved_tensors
        # sum_j m_ij (x_i - x_j) as two products: torch's own backward has (B, B, F) of scratch on a GPU.
        m = torch.where(distances == 0, 0.0, grads[0] / distances)
        m = m + m.T
        gradient: Tensor = x * m.sum(dim=1, keepdim=True) - m @ x
        return gradient


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances (B, B) in fp64 of rows (B, F); where two rows are equal, 0 with a zero gradient.

    fp64, as near samples far from the origin, and angles from distances, lose digits. O(B^2 F) arithmetic, O(B^2 + B F)
    memory.
    """
    # Distances do not see where the origin lies; the two products of the backward pass do.
    x = x.double()
    distances: Tensor = _Distances.apply(x - x.detach().mean(dim=0))  # type: ignore[no-untyped-call]
    return distances
