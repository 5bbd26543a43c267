"""Attention transfer: where in its feature maps a network is active."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.methods.feature.pairs import ChannelsLast, LayerLoss, LayerMap, Pair, Patterns
from kdfast.methods.feature.tensors import check_maps, mean, pooled
from kdfast.methods.schedule import Setting


class AttentionTransfer(LayerLoss):
    """Attention transfer of feature maps, sum over pairs of layers of a distance of n(mean_c S^2) and n(mean_c T^2).

    The mean over channels of the squares is a map (B, H W), n divides it by its L2 norm over positions. With a, b such
    vectors, the value of a pair is the mean over examples of

    - "code", the authors' code: ||a - b||^2 / (H W), that is the mean over positions too;
    - "paper", its equation 2: 1/2 ||a - b||, not squared.

    The paper's weight is 1000 over the number of positions (and the batch, over which it sums): in "paper" mode give
    ``weight`` 1000 / (H W). Channels may differ. Feature maps of other sizes meet at the smaller one: the larger is
    averaged down (adaptive average pooling), each of height and width apart. Plain PyTorch; 0 at equality.

    When to use:
        CNNs of like architecture, beside KD: where the teacher looks is all that is asked of the student, so
        channels may differ. By itself it gives little.

    Cost:
        The chosen feature maps stay in memory; nothing is trained along.

    Args:
        student: patterns of layers (B, C, H, W), see :mod:`kdfast.methods.layers`.
        teacher: likewise.
        mode: "code" or "paper".
        layer_map: see :class:`FitNet`.
        channels_last: whether maps are (B, H, W, C), as a Swin transformer's; a pair for student and teacher. None:
            they are (B, C, H, W), and maps that look otherwise raise.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: another mode; layers that are no feature maps, cannot be paired or differ in the batch.

    Source:
        Zagoruyko and Komodakis, "Paying more attention to attention", arXiv 1612.03928.

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import KD
        >>> def network(width):
        ...     return nn.Sequential(
        ...         nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        ...         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5),
        ...     )
        >>> batch = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
        >>> with Distiller(network(4), network(16), [KD(), AttentionTransfer("{1,3}", "{1,3}")]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['attention_transfer', 'attention_transfer.0', 'attention_transfer.1', 'kd', 'kd.hard', 'kd.soft', 'loss']
    """

    default_name: ClassVar[str] = "attention_transfer"

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        mode: str = "code",
        layer_map: LayerMap = "uniform",
        channels_last: ChannelsLast = None,
        weight: Setting = 1000.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, layer_map=layer_map, channels_last=channels_last, weight=weight, name=name)
        if mode not in ("code", "paper"):
            msg = f'mode must be "code" or "paper", got {mode!r}'
            raise ValueError(msg)
        self.mode = mode

    def compare(self, number: int, pair: Pair, mask: Tensor | None) -> Tensor:
        check_maps(pair.student, "student", "AttentionTransfer")
        pair = pooled(pair)
        gap = _attention(pair.student.tensor) - _attention(pair.teacher.tensor)
        return mean(gap.square()) if self.mode == "code" else mean(torch.linalg.vector_norm(gap, dim=1)) / 2


def _attention(maps: Tensor) -> Tensor:
    """(B, H W), of norm 1."""
    return F.normalize(maps.square().mean(dim=1).flatten(1), dim=1)
