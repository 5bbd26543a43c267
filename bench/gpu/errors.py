"""How far a result lies from fp64, and where; and how far it may."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Most that a gradient may differ from fp64, over its largest element: a rounding of the dtype, and what sums over a
#: row add. Through a head the logits are rounded too, and sums of products run over the vocabulary.
GRADIENT = {"fp32": 2e-5, "fp16": 1.1 * 2.0**-11, "bf16": 1.1 * 2.0**-8}
HEAD = {"fp32": 1e-3, "bf16": 2e-2}
#: Most that a log-normaliser may, in nats; inputs are exact.
NORMALISER = 1e-5


def worst(got: Tensor, want: Tensor, scale: float | None = None) -> dict[str, Any]:
    """The element that lies farthest from fp64.

    Args:
        got: any shape.
        want: fp64, of the same shape.
        scale: what differences are divided by; the largest element of `want` where None.

    Returns:
        value, None where it is not finite; index of the element; what it has and should have.
    """
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not want.numel():
        msg = f"shape {tuple(got.shape)} beside {tuple(want.shape)}"
        raise ValueError(msg)
    over = want.abs().max().item() if scale is None else scale
    difference = (got - want).abs()
    difference = torch.where(difference.isfinite(), difference, math.inf)
    at = int(difference.argmax())
    value = difference.flatten()[at].item() / over if over else math.inf
    return {
        "value": value if math.isfinite(value) else None,
        "index": [int(i) for i in torch.unravel_index(torch.tensor(at), got.shape)],
        "got": repr(got.flatten()[at].item()),
        "want": repr(want.flatten()[at].item()),
    }


def larger(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The worse of two; the first among equals."""
    size = [math.inf if x["value"] is None else x["value"] for x in (a, b)]
    return a if size[0] >= size[1] else b
