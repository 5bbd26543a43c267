"""Neuron selectivity transfer: the distribution of a layer's channels."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdfast.methods.feature.pairs import ChannelsLast, LayerLoss, LayerMap, Pair, Patterns
from kdfast.methods.feature.tensors import check_maps, mean, pooled
from kdfast.methods.schedule import Setting


class NST(LayerLoss):
    """Neuron selectivity transfer, sum over pairs of layers of the MMD^2 between the channels' maps.

    Each channel is a vector of its H W activations, divided by its L2 norm (a channel of zeros stays zero). With the
    kernel k(a, b) = (a'b)^2, the value of a pair is the mean over examples of

        mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(s_i, t_j),

    which is || T'T / C_T - S'S / C_S ||^2 with the normalised maps as rows of T and S, and computed so where that is
    smaller: no (B, C, C, H W). Channels may differ in number. Feature maps of other sizes meet at the smaller one: the
    larger is averaged down (adaptive average pooling), each of height and width apart. Plain PyTorch; 0 at equality.

    When to use:
        CNNs, where AT is too coarse: which patterns the channels select, whatever their number and order.

    Cost:
        Products of each example's maps, (B, C_S, C_T) or (B, H W, H W), the smaller; dear for wide early
        layers.

    Args:
        student: patterns of layers (B, C, H, W), see :mod:`kdfast.methods.layers`.
        teacher: likewise.
        layer_map: see :class:`FitNet`.
        channels_last: whether maps are (B, H, W, C), as a Swin transformer's; a pair for student and teacher. None:
            they are (B, C, H, W), and maps that look otherwise raise.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: layers that are no feature maps, cannot be paired or differ in the batch.

    Source:
        Huang and Wang, "Like what you like: knowledge distill via neuron selectivity transfer", arXiv 1707.01219, with
        its polynomial kernel (d 2, c 0); the weight is that of Tian et al., arXiv 1910.10699.

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
        >>> with Distiller(network(4), network(16), [KD(), NST("3", "3")]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss', 'nst']
    """

    default_name: ClassVar[str] = "nst"

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        layer_map: LayerMap = "uniform",
        channels_last: ChannelsLast = None,
        weight: Setting = 50.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, layer_map=layer_map, channels_last=channels_last, weight=weight, name=name)

    def compare(self, number: int, pair: Pair, mask: Tensor | None) -> Tensor:
        check_maps(pair.student, "student", "NST")
        pair = pooled(pair)
        s, t = (F.normalize(layer.tensor.flatten(2), dim=2) for layer in pair)
        t = t.to(s.dtype)
        c_s, c_t, positions = s.shape[1], t.shape[1], s.shape[2]
        if positions**2 <= c_s**2 + c_t**2 + c_s * c_t:
            gap = t.mT @ t / c_t - s.mT @ s / c_s  # (B, H W, H W)
            return mean(gap.square().sum(dim=(1, 2)))
        kernels = (mean((a @ b.mT).square()) for a, b in ((t, t), (s, s), (s, t)))
        tt, ss, st = kernels
        return tt + ss - 2 * st
