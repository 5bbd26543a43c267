"""Which of the student's layers is compared with which of the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdfast.methods.layers import expand, parse
from kdfast.methods.loss import Loss, Value
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Outputs, Step

#: Path patterns, see :mod:`kdfast.methods.layers`.
Patterns: TypeAlias = str | Sequence[str]
#: "uniform", "last", or the teacher's position of each of the student's layers, or pairs of positions.
LayerMap: TypeAlias = str | Sequence[int] | Sequence[tuple[int, int]]
#: Whether maps are (B, H, W, C), of both models or of each; None: they are (B, C, H, W), and must look like it.
ChannelsLast: TypeAlias = bool | tuple[bool, bool] | None
_CHANNELS = 16  # so many at least, behind a square: (B, H, W, C), as hardly a map has of its channels and height


class Layer(NamedTuple):
    """One layer's tensor and what to call it."""

    tensor: Tensor  # (B, ...) fp32, or fp64 as it came
    name: str
    of_source: bool = False  # of an encoder-decoder model: whether its tokens are the source's


class Pair(NamedTuple):
    """Two layers that are compared."""

    student: Layer
    teacher: Layer

    def shapes(self) -> str:
        """Both layers with their shapes, for messages."""
        s, t = self
        return f"student {s.name} is {tuple(s.tensor.shape)}, teacher {t.name} is {tuple(t.tensor.shape)}"

    def with_tensors(self, student: Tensor, teacher: Tensor) -> Pair:
        """The same layers with other tensors."""
        return Pair(self.student._replace(tensor=student), self.teacher._replace(tensor=teacher))


def check_map(layer_map: LayerMap) -> LayerMap:
    """Checks what can be said of a layer map before the layers are seen.

    Raises:
        ValueError: another name, no pair.
        TypeError: something else than positions.
    """
    if isinstance(layer_map, str):
        if layer_map not in ("uniform", "last"):
            msg = f'layer_map must be "uniform", "last" or a list, as [1, 3] or [(0, 1), (1, 3)], got {layer_map!r}'
            raise ValueError(msg)
        return layer_map
    one: Any
    for one in layer_map:
        pair = isinstance(one, (tuple, list)) and len(one) == 2 and all(isinstance(i, int) for i in one)
        if not pair and not isinstance(one, int):
            msg = f"layer_map must be a list of positions in the teacher, or of (student, teacher) pairs, got {one!r}"
            raise TypeError(msg)
    if not layer_map:
        msg = "layer_map is empty: name at least one pair of layers"
        raise ValueError(msg)
    return layer_map


def positions(layer_map: LayerMap, students: int, teachers: int, what: str) -> list[tuple[int, int]]:
    """The pairs of positions, from 0, that a map makes of so many layers.

    "uniform" is TinyBERT's g(m) = m N / M over layers counted from 1, "last" is g(m) = m + N - M.

    Args:
        layer_map: see :data:`LayerMap`.
        students: M.
        teachers: N.
        what: the layers' names, for messages.

    Raises:
        ValueError: the map does not fit these numbers.
    """
    if layer_map == "uniform":
        if students > teachers or teachers % students:
            msg = (
                f'{what}: {students} and {teachers} layers cannot be paired by "uniform", g(m) = m N / M with N a '
                f'multiple of M: give layer_map="last" or a list of {students} positions in the teacher'
            )
            raise ValueError(msg)
        return [(m, (m + 1) * teachers // students - 1) for m in range(students)]
    if layer_map == "last":
        if students > teachers:
            msg = f"{what}: the student has {students} layers, the teacher only {teachers}: give layer_map a list"
            raise ValueError(msg)
        return [(m, m + teachers - students) for m in range(students)]
    given: list[Any] = list(layer_map)
    if isinstance(given[0], int) and len(given) != students:
        msg = f"{what}: layer_map has {len(given)} positions for {students} layers: name pairs, as [(0, 1)], of some"
        raise ValueError(msg)
    pairs = [(m, one) if isinstance(one, int) else (one[0], one[1]) for m, one in enumerate(given)]
    for s, t in pairs:
        if not (-students <= s < students and -teachers <= t < teachers):
            msg = f"{what}: layer_map has the pair {(s, t)}, and there are {students} and {teachers} layers, from 0"
            raise ValueError(msg)
    return pairs


def each_channels_last(given: ChannelsLast) -> tuple[bool | None, bool | None]:
    """What is said of the student's maps, and of the teacher's.

    Raises:
        TypeError: something else.
    """
    pair = given if isinstance(given, tuple) else (given, given)
    if len(pair) != 2 or not all(one is None or isinstance(one, bool) for one in pair):
        msg = f"channels_last must be True, False, None, or a pair of them (student, teacher), got {given!r}"
        raise TypeError(msg)
    return pair


def channels_first(layers: Sequence[Layer], last: bool | None) -> list[Layer]:
    """Feature maps as (B, C, H, W), other layers as they are.

    Raises:
        ValueError: maps of which nothing is said that look like (B, H, W, C), as those of a Swin transformer.
    """
    found = []
    for layer in layers:
        x = layer.tensor
        if x.dim() == 4 and last is None and x.shape[1] == x.shape[2] != x.shape[3] >= _CHANNELS:
            msg = (
                f"{layer.name} is {tuple(x.shape)}, which looks like (B, H, W, C): pass channels_last=True if its "
                "last axis has the channels, False if its second has"
            )
            raise ValueError(msg)
        found.append(layer._replace(tensor=x.permute(0, 3, 1, 2)) if x.dim() == 4 and last else layer)
    return found


def embeddings_first(patterns: Sequence[str]) -> bool:
    """Whether the first tensor is the embeddings' output, as in all of a transformer's hidden_states."""
    return parse(patterns[0]).part.endswith("hidden_states.*")


def layers_of(outputs: Outputs, patterns: Sequence[str]) -> list[Layer]:
    """The tensors of patterns, in fp32 at least, and their names."""
    found = []
    for pattern in patterns:
        tensors = outputs.layers(pattern)
        for i, tensor in enumerate(tensors):
            name = repr(pattern) if len(tensors) == 1 else f"{pattern!r}[{i}]"
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            found.append(Layer(wide, name, parse(pattern).of_source))
    return found


def pair_layers(
    students: Sequence[Layer],
    teachers: Sequence[Layer],
    layer_map: LayerMap,
    *,
    embeddings: bool = False,
    several: bool = True,
) -> list[Pair]:
    """Pairs layers by a map.

    Args:
        students: of the student.
        teachers: of the teacher.
        layer_map: see :data:`LayerMap`.
        embeddings: the first of both are the embeddings, layer 0 of a named map.
        several: both sides are meant as several layers; otherwise a named map does not pair one with one of many.

    Raises:
        ValueError: the map does not fit, or batches differ.
    """
    what = f"{students[0].name} and {teachers[0].name}"
    if isinstance(layer_map, str) and not several and (len(students) == 1) != (len(teachers) == 1):
        msg = (
            f"{what}: {len(students)} student layers and {len(teachers)} teacher layers where one side names a single "
            "layer: write * on both sides, or give layer_map a list, as [(0, 11)]"
        )
        raise ValueError(msg)
    if isinstance(layer_map, str) and embeddings and min(len(students), len(teachers)) > 1:
        inner = positions(layer_map, len(students) - 1, len(teachers) - 1, what)
        found = [(0, 0), *((s + 1, t + 1) for s, t in inner)]
    else:
        found = positions(layer_map, len(students), len(teachers), what)
    pairs = [Pair(students[s], teachers[t]) for s, t in found]
    for pair in pairs:
        check_batch(pair)
    return pairs


def check_batch(pair: Pair) -> None:
    """Checks that both layers have as many dimensions, and the same batch and sequence.

    Raises:
        ValueError: they do not; names both layers and shapes.
    """
    s, t = pair.student.tensor, pair.teacher.tensor
    if s.dim() != t.dim():
        msg = f"{pair.shapes()}: layers of one kind are needed, (B, F), (B, S, H) or (B, C, H, W)"
    elif s.shape[:1] != t.shape[:1]:
        msg = f"{pair.shapes()}: they differ in the batch; both models must see the same examples"
    elif s.dim() == 3 and s.shape[1] != t.shape[1]:
        msg = f"{pair.shapes()}: they differ in the sequence; both models must see the same tokens"
    else:
        return
    raise ValueError(msg)


def mask_of(step: Step, layer: Layer) -> Tensor | None:
    """The mask (B, S) of the tokens that a layer is of, or None: of an encoder-decoder model the side's."""
    return step.target_mask if step.encoder_decoder and not layer.of_source else step.mask


class LayerLoss(Loss):
    """Base of the losses that are a sum over pairs of layers.

    A subclass says in ``compare`` what one pair contributes. With several pairs each one's value is logged by its
    number. Arithmetic is in fp32, in fp64 where a layer is, whatever autocast says.

    Args:
        student: patterns of the student's layers.
        teacher: patterns of the teacher's.
        layer_map: see :data:`LayerMap`.
        channels_last: see :data:`ChannelsLast`.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.
    """

    def __init__(
        self,
        student: Patterns,
        teacher: Patterns,
        *,
        layer_map: LayerMap = "uniform",
        channels_last: ChannelsLast = None,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.student_layers = expand(student, "student")
        self.teacher_layers = expand(teacher, "teacher")
        self.layer_map = check_map(layer_map)
        self.channels_last = each_channels_last(channels_last)

    def pairs(self, step: Step) -> list[Pair]:
        """The pairs of layers of a batch."""
        sides = (self.student_layers, self.teacher_layers)
        first = [embeddings_first(side) for side in sides]
        if isinstance(self.layer_map, str) and any(first) and not all(first):
            msg = (
                f"student {self.student_layers[0]!r} and teacher {self.teacher_layers[0]!r}: the hidden states begin "
                "with the embeddings: name hidden states of both, or give layer_map a list"
            )
            raise ValueError(msg)
        return pair_layers(
            channels_first(layers_of(step.student, self.student_layers), self.channels_last[0]),
            channels_first(layers_of(step.teacher, self.teacher_layers), self.channels_last[1]),
            self.layer_map,
            embeddings=all(first),
            several=all(len(side) > 1 or "*" in side[0] for side in sides),
        )

    def compare(self, number: int, pair: Pair, mask: Tensor | None) -> Tensor:
        """The value of one pair of layers, 0-d.

        Args:
            number: the pair's, from 0.
            pair: the layers.
            mask: (B, S) bool, the tokens that count of the layer's sequence, or None.
        """
        raise NotImplementedError

    def forward(self, step: Step) -> Value:
        pairs = self.pairs(step)
        with torch.autocast(pairs[0].student.tensor.device.type, enabled=False):
            found = [self.compare(k, pair, mask_of(step, pair.student)) for k, pair in enumerate(pairs)]
        total = torch.stack(found).sum()
        return total if len(found) == 1 else (total, {str(k): part for k, part in enumerate(found)})
