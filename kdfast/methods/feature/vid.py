"""Variational information distillation: a student's layer predicts a teacher's, with a variance for each channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.methods.feature.pairs import ChannelsLast, LayerLoss, LayerMap, Pair, Patterns
from kdfast.methods.feature.projectors import channels, pointwise
from kdfast.methods.feature.tensors import check_same, mean, pooled, tokens, without_padding
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step


class VID(LayerLoss):
    """Variational information distillation, sum over pairs of layers of 1/2 [(mu(S) - T)^2 / s2 + log s2].

    The negative log-likelihood of the teacher's features, without its constant, in nats, averaged over features
    (channels), positions and examples; over the tokens that count where the batch has a mask. mu is three pointwise
    linear maps without bias (1x1 convolutions of (B, C, H, W)) with ReLU between, as wide as the teacher's layer;
    s2 = softplus(.) + eps is learned for each of its channels. Both belong to the Distiller, and are made by
    ``prepare``. Feature maps of other sizes meet at the smaller one: the larger is averaged down (adaptive average
    pooling), each of height and width apart. Plain PyTorch. A likelihood is no distance: the value at equality is
    1/2 log s2, and it may be negative.

    When to use:
        CNNs or transformers, where a plain MSE (FitNet) lets noisy channels of the teacher pull too hard: a
        variance is learned for each channel, and those that cannot be foretold count less.

    Cost:
        Three 1x1 convolutions as wide as the teacher's layer are trained along, often more arithmetic than the
        student's own layer.

    Args:
        student: patterns of layers (B, F), (B, S, H) or (B, C, H, W), see :mod:`kdfast.methods.layers`.
        teacher: likewise.
        variance: > eps, s2 at the start.
        eps: > 0, the least variance.
        layer_map: see :class:`FitNet`.
        channels_last: whether maps are (B, H, W, C), as a Swin transformer's; a pair for student and teacher. None:
            they are (B, C, H, W), and maps that look otherwise raise.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: a variance that is not above eps > 0; layers that cannot be paired, or of different kinds, batches
            or sequences.

    Source:
        Ahn et al., "Variational information distillation for knowledge transfer", arXiv 1904.05835, and the authors'
        code.

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
        >>> with Distiller(network(4), network(16), [KD(), VID("3", "3")]) as d:
        ...     d.prepare(batch)  # makes the projector; its parameters are in d.parameters()
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss', 'vid']
    """

    default_name: ClassVar[str] = "vid"
    needs_shapes: ClassVar[bool] = True

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        variance: float = 5.0,
        eps: float = 1e-5,
        layer_map: LayerMap = "uniform",
        channels_last: ChannelsLast = None,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, layer_map=layer_map, channels_last=channels_last, weight=weight, name=name)
        if not 0 < eps < variance:
            msg = f"variance must be above eps, and eps above 0, got variance={variance} and eps={eps}"
            raise ValueError(msg)
        self.variance = variance
        self.eps = eps
        self.means = nn.ModuleList()
        self.scales = nn.ParameterList()  # (C,) each, before softplus

    def prepare(self, step: Step) -> None:
        for pair in self.pairs(step):
            source, target = channels(pair)
            layers = [
                pointwise(source, target, pair, bias=False),
                nn.ReLU(),
                pointwise(target, target, pair, bias=False),
                nn.ReLU(),
                pointwise(target, target, pair, bias=False),
            ]
            self.means.append(nn.Sequential(*layers))
            like = pair.student.tensor
            start = math.log(math.expm1(self.variance - self.eps))
            self.scales.append(nn.Parameter(torch.full((target,), start, dtype=like.dtype, device=like.device)))
        self.prepared = True

    def compare(self, number: int, pair: Pair, mask: Tensor | None) -> Tensor:
        pair = pooled(pair)
        counted = tokens(mask, pair.student)
        student, teacher = (without_padding(layer.tensor, counted) for layer in pair)
        found = pair.with_tensors(self.means[number](student), teacher)
        check_same(found, "the teacher's layer is not as wide as the one that prepare saw")
        variance = F.softplus(self.scales[number]) + self.eps
        if teacher.dim() == 4:
            variance = variance.view(-1, 1, 1)
        likelihood = ((found.student.tensor - teacher).square() / variance + variance.log()) / 2
        return mean(likelihood, None if counted is None else counted.unsqueeze(-1))
