"""What a loss sees of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets

IGNORED = -100  # a label that drops its token from every term


@dataclass(frozen=True)
class Outputs:
    """What one model made of a batch; a teacher's tensors are detached.

    Attributes:
        logits: (..., V), an LMHead that describes them, or a cached teacher's targets; None where the model has none.
        raw: what the model returned; None for a cached teacher.
        captured: by layer pattern, the tensors of its layers in the order of the forward pass.
    """

    logits: Tensor | LMHead | SparseTargets | PackedTargets | None
    raw: Any = None
    captured: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def layers(self, pattern: str) -> Sequence[Tensor]:
        """The tensors of a pattern that the loss asked for, see :mod:`kdfast.methods.layers`."""
        if pattern not in self.captured:
            msg = f"layer {pattern!r} was not captured: a loss names its layers in student_layers and teacher_layers"
            raise KeyError(msg)
        return self.captured[pattern]

    def layer(self, pattern: str) -> Tensor:
        """The one tensor of a pattern.

        Raises:
            ValueError: the pattern has several.
        """
        tensors = self.layers(pattern)
        if len(tensors) != 1:
            msg = f"layer {pattern!r} must be one tensor, but has {len(tensors)}: name one layer"
            raise ValueError(msg)
        return tensors[0]


@dataclass(frozen=True)
class Step:
    """One batch, seen by the student and its teachers.

    Attributes:
        student: its outputs, with gradient.
        teachers: the outputs of each teacher, detached.
        labels: (...) int64, aligned with the logits; -100 drops a token, one of padding too; None without labels. Or
            class probabilities (..., V).
        weights: (...) per-token weights; None: 1. Without labels 0 at positions that do not count.
        mask: (B, S) bool, the tokens that are not padding; None where there is no padding. Of an encoder-decoder
            model those of the source.
        target_mask: (B, S') bool, of an encoder-decoder model the decoder's tokens; None where nothing says.
        documents: (B, S) int64, the document of each token of packed rows; None: one a row.
        counts: (...) bool, the positions of the logits that are about a token, whatever the labels say, see
            :mod:`kdfast.methods.positions`; None: all.
        encoder_decoder: whether the logits are a decoder's, whose positions are not those of ``mask``.
        unlabelled: (...) bool, the tokens without a hard label, -100 in ``labels``, that have soft terms; None where
            the Distiller was given no label to tell them by.
        index: (B,) int64, each sample's position in the data set, for losses with a memory of samples.
        number: the optimizer step, from 0.
    """

    student: Outputs
    teachers: tuple[Outputs, ...] = ()
    labels: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    index: Tensor | None = None
    number: int = 0
    target_mask: Tensor | None = None
    documents: Tensor | None = None
    counts: Tensor | None = None
    unlabelled: Tensor | None = None
    encoder_decoder: bool = False

    @property
    def teacher(self) -> Outputs:
        """The only teacher.

        Raises:
            ValueError: there is none, or there are several.
        """
        if len(self.teachers) != 1:
            msg = f"this loss needs one teacher, got {len(self.teachers)}"
            raise ValueError(msg)
        return self.teachers[0]

    def student_described(self) -> Any:
        """The student's logits (..., V), or the LMHead that describes them.

        Raises:
            ValueError: the student returned none.
        """
        if self.student.logits is None:
            msg = (
                "the student returned no logits: a model that Liger or Unsloth has patched may leave them out; give "
                "the Distiller its head, or use it as it was"
            )
            raise ValueError(msg)
        return self.student.logits

    def student_logits(self) -> Tensor:
        """The student's logits as a tensor (..., V), for losses that are not computed by the engine.

        Raises:
            TypeError: the student has none; a head is made whole.
        """
        return _dense("student", self.student.logits)

    def teacher_logits(self) -> Tensor:
        """The only teacher's logits as a tensor (..., V).

        Raises:
            TypeError: it has none, or only stored targets, which do not hold every logit.
        """
        return _dense("teacher", self.teacher.logits)


def logits_of(out: Any) -> Any:
    """What of a model's output are its logits; None where it has none.

    ``start_logits`` and ``end_logits`` (B, S), of where an answer begins and ends in a text, are (B, 2, S).
    """
    if isinstance(out, (Tensor, LMHead, SparseTargets, PackedTargets)):
        return out
    found = _named(out, "logits")
    if found is None and isinstance(_named(out, "start_logits"), Tensor):
        return torch.stack([_named(out, "start_logits"), _named(out, "end_logits")], 1)
    if found is None and isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    return found


def _named(out: Any, name: str) -> Any:
    return out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)


def _dense(who: str, logits: Any) -> Tensor:
    if isinstance(logits, LMHead):
        return logits.logits()
    if not isinstance(logits, Tensor):
        what = "none" if logits is None else type(logits).__name__
        msg = f"this loss needs the {who}'s logits as a tensor (..., V), got {what}"
        raise TypeError(msg)
    return logits
