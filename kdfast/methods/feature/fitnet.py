"""Hints: a student's layer, projected, is a teacher's layer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdfast.methods.feature.pairs import ChannelsLast, LayerLoss, LayerMap, Pair, Patterns
from kdfast.methods.feature.projectors import channels, pointwise
from kdfast.methods.feature.tensors import check_same, mean, pooled, tokens, without_padding
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step


class FitNet(LayerLoss):
    """FitNets' hint loss, and hidden-state distillation of transformers: sum over pairs of layers of MSE(r(S), T).

    r is learned with the student, one for each pair and made by ``prepare``: a linear map of the features of (B, F) or
    of each token of (B, S, H), a 1x1 convolution of (B, C, H, W), with a bias. Its parameters are the Distiller's. The
    squared difference is averaged over features (channels), positions and examples; over the tokens that count where
    the batch has a mask. Feature maps of other sizes meet at the smaller one: the larger is averaged down (adaptive
    average pooling), each of height and width apart. Plain PyTorch; 0 where r(S) equals T.

    When to use:
        A student of another width or depth whose inner layers should go the teacher's way: the first choice for
        a layer each of two CNNs, or for hidden states of transformers. Watch the term: with its weight of 100 a
        wide layer can drown the labels, and narrow students may not train at all.

    Cost:
        Both layers' outputs stay in memory until the loss; a linear map or 1x1 convolution is trained along.

    Args:
        student: patterns of layers, see :mod:`kdfast.methods.layers`.
        teacher: likewise.
        layer_map: which layers are paired where there are several: "uniform", TinyBERT's g(m) = m N / M of layers
            counted from 1 ("hidden_states" begin with the embeddings, which are layer 0 and paired); "last", the
            teacher's last M; a list of the teacher's positions, from 0, one for each layer of the student, or of
            (student, teacher) pairs.
        identity: no projector where both widths agree.
        channels_last: whether maps are (B, H, W, C), as a Swin transformer's; a pair for student and teacher. None:
            they are (B, C, H, W), and maps that look otherwise raise.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: layers that cannot be paired, or of different kinds, batches or sequences; both are named.

    Source:
        Romero et al., "FitNets: hints for thin deep nets", arXiv 1412.6550 (there half a sum of squares; the mean and
        its weight of 100 are those of Tian et al., arXiv 1910.10699).

    Example:
        >>> from torch import nn
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> def network(width):
        ...     return nn.Sequential(
        ...         nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
        ...         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5),
        ...     )
        >>> batch = torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))
        >>> with Distiller(network(4), network(16), [CrossEntropy(), FitNet("2", "2")]) as d:
        ...     d.prepare(batch)  # makes the projector; its parameters are in d.parameters()
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'fitnet', 'loss']
    """

    default_name: ClassVar[str] = "fitnet"
    needs_shapes: ClassVar[bool] = True

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        layer_map: LayerMap = "uniform",
        identity: bool = False,
        channels_last: ChannelsLast = None,
        weight: Setting = 100.0,
        name: str | None = None,
    ) -> None:
        super().__init__(student, teacher, layer_map=layer_map, channels_last=channels_last, weight=weight, name=name)
        self.identity = identity
        self.projectors = nn.ModuleList()

    def prepare(self, step: Step) -> None:
        for pair in self.pairs(step):
            source, target = channels(pair)
            same = self.identity and source == target
            self.projectors.append(nn.Identity() if same else pointwise(source, target, pair, bias=True))
        self.prepared = True

    def compare(self, number: int, pair: Pair, mask: Tensor | None) -> Tensor:
        pair = pooled(pair)
        counted = tokens(mask, pair.student)
        student, teacher = (without_padding(layer.tensor, counted) for layer in pair)
        found = pair.with_tensors(self.projectors[number](student), teacher)
        check_same(found, "the teacher's layer is not as wide as the one that prepare saw")
        squares = (found.student.tensor - teacher).square()
        return mean(squares, None if counted is None else counted.unsqueeze(-1))
