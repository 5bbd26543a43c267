"""Flow of solution procedure: how one layer's channels go with another's."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdfast.methods.feature.pairs import (
    ChannelsLast,
    Layer,
    Pair,
    Patterns,
    channels_first,
    check_batch,
    each_channels_last,
    layers_of,
)
from kdfast.methods.feature.tensors import check_maps, check_same, mean, same_positions
from kdfast.methods.layers import expand
from kdfast.methods.loss import Loss
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step


class FSP(Loss):
    """FSP distillation: the mean over examples of || G_S - G_T ||^2 (Frobenius), G between two layers of a model.

    G_ij = sum over positions of F1_i F2_j / (H W), a matrix (C1, C2) for each example, with F1 and F2 the feature maps
    of the two layers. The squared difference is summed over the matrix, as in the paper; code that averages over its
    entries has a value C1 C2 times smaller (and weights to match). Layers of other sizes within a model meet at the
    smaller one: the larger is averaged down (adaptive average pooling; the paper takes maxima), each of height and
    width apart. The models' sizes may differ, their channels must agree. Several pairs of layers are several losses.
    Plain PyTorch; 0 at equality.

    When to use:
        As a first phase before training with labels, as in its paper: how features change between two layers is
        taught, and both models must have as many channels there. Beside labels from the start it has hurt in
        our comparison.

    Cost:
        A matrix (B, C1, C2) for each model.

    Args:
        student: two layers (B, C, H, W), as ("layer1", "layer2") or "{layer1,layer2}".
        teacher: two layers likewise.
        channels_last: whether maps are (B, H, W, C), as a Swin transformer's; a pair for student and teacher. None:
            they are (B, C, H, W), and maps that look otherwise raise.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: not two layers of each; other channels or batches.

    Source:
        Yim et al., "A gift from knowledge distillation: fast optimization, network minimization and transfer learning",
        CVPR 2017.

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> def network(width):
        ...     return nn.Sequential(
        ...         nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        ...         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5),
        ...     )
        >>> batch = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
        >>> with Distiller(network(8), network(8), [FSP(("1", "3"), ("1", "3"))]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['fsp', 'loss']
    """

    default_name: ClassVar[str] = "fsp"

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        channels_last: ChannelsLast = None,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.student_layers = expand(student, "student")
        self.teacher_layers = expand(teacher, "teacher")
        self.channels_last = each_channels_last(channels_last)
        for who, layers in (("student", self.student_layers), ("teacher", self.teacher_layers)):
            if len(layers) > 2 or (len(layers) == 1 and "*" not in layers[0]):
                msg = f'{who} must name two layers, as ("layer1", "layer2"), got {layers}'
                raise ValueError(msg)

    def forward(self, step: Step) -> Tensor:
        student = channels_first(layers_of(step.student, self.student_layers), self.channels_last[0])
        teacher = channels_first(layers_of(step.teacher, self.teacher_layers), self.channels_last[1])
        with torch.autocast(student[0].tensor.device.type, enabled=False):
            pair = Pair(_flow(student, "student"), _flow(teacher, "teacher"))
            check_batch(Pair(student[0], teacher[0]))
            check_same(pair, "(B, C1, C2) from the layers' channels, which must agree: choose other layers")
            return mean((pair.student.tensor - pair.teacher.tensor).square().sum(dim=(1, 2)))


def _flow(layers: list[Layer], who: str) -> Layer:
    """G, (B, C1, C2)."""
    names = " and ".join(layer.name for layer in layers)
    if len(layers) != 2:
        msg = f"FSP needs two {who} layers, and there are {len(layers)}: {names}"
        raise ValueError(msg)
    for layer in layers:
        check_maps(layer, who, "FSP")
    first, second = same_positions(layers[0].tensor, layers[1].tensor)
    a, b = first.flatten(2), second.flatten(2)
    return Layer(a @ b.mT / a.shape[2], f"matrix of {names}")
