"""Projectors from a student's layer to a teacher's, by the shapes of both."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.methods.feature.pairs import Pair


def channels(pair: Pair) -> tuple[int, int]:
    """The widths of both layers: F of (B, F), H of (B, S, H), C of (B, C, H, W).

    Raises:
        ValueError: layers of another number of dimensions.
    """
    dims = pair.student.tensor.dim()
    if dims not in (2, 3, 4):
        msg = f"{pair.shapes()}: a projector is made for (B, F), (B, S, H) and (B, C, H, W)"
        raise ValueError(msg)
    along = 1 if dims == 4 else -1
    return pair.student.tensor.shape[along], pair.teacher.tensor.shape[along]


def pointwise(source: int, target: int, pair: Pair, *, bias: bool) -> nn.Module:
    """A linear map of each position's features, as suits the layers of ``pair``, on their device, fp32 (fp64 as they).

    Args:
        source: features in.
        target: features out.
        pair: layers (B, F), (B, S, H) or (B, C, H, W).
        bias: whether one is added.
    """
    like = pair.student.tensor
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if like.dim() == 4:
        return nn.Conv2d(source, target, kernel_size=1, bias=bias, device=like.device, dtype=dtype)
    return nn.Linear(source, target, bias=bias, device=like.device, dtype=dtype)
