"""Linear heads that bring student and teacher features into one space, made from a generator of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def embedding(features: Tensor, dim: int, generator: torch.Generator) -> nn.Linear:
    """``nn.Linear`` from the width of features (B, F) to ``dim``, in its default distribution U(-1/sqrt F, 1/sqrt F).

    Args:
        features: in the dtype and on the device that the head is to have.
        dim: width of the common space.
        generator: on the CPU, so that a seed gives the same head on every device.
    """
    width = features.shape[1]
    head = nn.utils.skip_init(nn.Linear, width, dim, device="cpu", dtype=torch.float32)
    bound = 1.0 / math.sqrt(width)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    made: nn.Linear = head.to(features)
    return made


def check_dim(who: str, dim: int) -> None:
    """Raises unless ``dim`` is a width."""
    if dim < 1:
        msg = f"{who}: dim must be at least 1, got {dim}"
        raise ValueError(msg)
