"""What every relation shares: which tensors it compares, as rows (B, F), and arithmetic that autocast leaves alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.methods.layers import parse
from kdfast.methods.loss import Loss, Value
from kdfast.methods.schedule import Setting
from kdfast.methods.step import Step

FEWEST = 2  # samples between which there is a relation


class Relation(Loss):
    """A loss of how samples lie to each other within each model: the two spaces may differ in width.

    The features of a sample are flattened, (B, ...) to (B, F), those of a sequence (B, S, H) with its tokens first and
    zeros for padding, so that neither what padding holds nor its side or amount matters. Arithmetic is fp32 whatever
    the inputs and autocast say, fp64 for fp64 inputs. A batch of fewer than two samples has no relations: 0, with zero
    gradients. Samples are compared whatever their labels say: a label of -100 drops a sample from the label terms
    alone. The value depends on which samples share a batch, so that micro-batches do not sum to the large batch; under
    DistributedDataParallel samples are compared within each rank.

    Args:
        student: pattern of the student's layer, see :mod:`kdfast.methods.layers`.
        teacher: pattern of the teacher's layer; None for both: the logits.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        ValueError: one pattern without the other; in ``forward`` or ``prepare``, batches that differ.
    """

    def __init__(
        self, student: str | None = None, teacher: str | None = None, *, weight: Setting = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight=weight, name=name)
        if (student is None) != (teacher is None):
            which = "student" if student is None else "teacher"
            msg = (
                f"{type(self).__name__}: {which} is None, the other is {student or teacher!r}: name a layer of both, "
                'as in student="fc:input", teacher="fc:input", or of neither for the logits'
            )
            raise ValueError(msg)
        self.student_layers = () if student is None else (student,)
        self.teacher_layers = () if teacher is None else (teacher,)

    def features(self, step: Step) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's features (B, F) and (B, G), in fp32, or fp64 where one of them is."""
        if self.student_layers:
            student, teacher = step.student.layer(self.student_layers[0]), step.teacher.layer(self.teacher_layers[0])
            of_source = parse(self.student_layers[0]).of_source
            mask = step.target_mask if step.encoder_decoder and not of_source else step.mask
        else:
            # A column that is absent, as of padding in a model of spans, is alike for all samples.
            logits = (step.student_logits(), step.teacher_logits())
            student, teacher = (x.masked_fill(x == -math.inf, 0.0) for x in logits)
            mask = step.counts
        if student.dim() < 1 or teacher.dim() < 1 or student.shape[0] != teacher.shape[0]:
            msg = (
                f"{type(self).__name__}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be "
                "(B, ...) with the same B: name layers whose first dimension is the batch"
            )
            raise ValueError(msg)
        wide = torch.float64 in (student.dtype, teacher.dtype)
        dtype = torch.float64 if wide else torch.float32
        sides = {"student": student, "teacher": teacher}
        one, other = (rows(self._tokens_first(x, mask, who)).to(dtype) for who, x in sides.items())
        return one, other

    def _tokens_first(self, x: Tensor, mask: Tensor | None, who: str) -> Tensor:
        if mask is None or x.dim() != 3:
            return x
        if mask.shape != x.shape[:2]:
            msg = (
                f"{type(self).__name__}: the mask is {tuple(mask.shape)}, and the {who}'s layer {tuple(x.shape)}: a "
                "layer with other positions than the tokens needs a batch without attention_mask, or a split that "
                "leaves mask out"
            )
            raise ValueError(msg)
        mask = mask.to(x.device)
        first = (~mask).to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(2)
        x = x.masked_fill(~mask.unsqueeze(2), 0.0)  # what stands there, even NaN, reaches no gradient
        return x.gather(1, first.expand_as(x))

    def forward(self, step: Step) -> Value:
        student, teacher = self.features(step)
        with torch.autocast(student.device.type, enabled=False):
            if student.shape[0] < FEWEST:
                return (student * 0.0).sum()
            return self.compare(student, teacher)

    def compare(self, student: Tensor, teacher: Tensor) -> Value:
        """The loss of features (B, F) and (B, G), B of at least two."""
        raise NotImplementedError


def rows(x: Tensor) -> Tensor:
    """(B, ...) as (B, F)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def unit_scale(x: Tensor) -> Tensor:
    """X over its largest absolute entry, a constant to autograd: for losses that no scaling of the whole changes.

    Squares and products of what comes out neither overflow nor fall below the ``eps`` of a normalisation.
    """
    return x / _largest(x)


def unit_rows(x: Tensor) -> Tensor:
    """Rows (B, F) over their L2 norm, of any magnitude; a row of zeros stays zero, with a zero gradient."""
    return torch.nn.functional.normalize(x / _largest(x, dim=1), dim=1)


def _largest(x: Tensor, dim: int | tuple[int, ...] = ()) -> Tensor:
    largest = x.detach().abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, torch.inf, largest)  # 0 / inf is 0, and so is the gradient
