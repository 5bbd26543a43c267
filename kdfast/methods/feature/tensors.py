"""What the losses of layers have in common: sizes brought together, padding left out, means."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdfast.methods.feature.pairs import Layer, Pair


def check_same(pair: Pair, why: str) -> None:
    """Checks that both layers have one shape.

    Raises:
        ValueError: they do not; names both layers and shapes, and ``why`` they must.
    """
    if pair.student.tensor.shape != pair.teacher.tensor.shape:
        msg = f"{pair.shapes()}: {why}"
        raise ValueError(msg)


def check_maps(layer: Layer, who: str, loss: str) -> None:
    """Checks that a layer is a feature map (B, C, H, W).

    Raises:
        ValueError: it is not.
    """
    if layer.tensor.dim() != 4:
        msg = f"{loss} needs feature maps (B, C, H, W), and {who} {layer.name} is {tuple(layer.tensor.shape)}"
        raise ValueError(msg)


def same_positions(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two feature maps (B, C, H, W) at one size: the larger is averaged down to the smaller, height and width apart."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, size), _pooled(b, size)


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)


def pooled(pair: Pair) -> Pair:
    """A pair with feature maps at one size; other layers as they are."""
    if pair.student.tensor.dim() != 4:
        return pair
    return pair.with_tensors(*same_positions(pair.student.tensor, pair.teacher.tensor))


def tokens(mask: Tensor | None, layer: Layer) -> Tensor | None:
    """The mask where a layer (B, S, H) has tokens, on its device.

    Raises:
        ValueError: batch or sequence differ from the mask's.
    """
    if mask is None or layer.tensor.dim() != 3:
        return None
    check_mask(mask, layer, layer.tensor.shape[1])
    return mask.to(layer.tensor.device)


def check_mask(mask: Tensor, layer: Layer, length: int) -> None:
    """Checks that a mask (B, S) is one of a layer's ``length`` tokens.

    Raises:
        ValueError: it is not.
    """
    if mask.shape != (layer.tensor.shape[0], length):
        msg = (
            f"the mask is {tuple(mask.shape)}, and layer {layer.name} is {tuple(layer.tensor.shape)}: a layer with "
            "other positions than the tokens needs a batch without attention_mask, or a split that leaves mask out"
        )
        raise ValueError(msg)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """A layer (B, S, H) with zeros at padded positions, so that what stands there, even NaN, reaches no gradient."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def mean(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean over all values, or those counted; 0 where there is none.

    Args:
        values: any shape.
        counted: bool, broadcastable to ``values``; None: all.
    """
    if counted is None:
        return values.sum() / max(values.numel(), 1)
    counted = counted.expand_as(values)
    return values.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
