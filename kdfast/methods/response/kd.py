"""Hinton's distillation and plain cross-entropy: the engine's own loss, as terms of a Distiller."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from torch import Tensor

from kdfast.loss import distill_loss, option_names
from kdfast.methods.loss import Loss, Value
from kdfast.methods.response.tokens import labelling
from kdfast.methods.schedule import Setting, checked, value
from kdfast.methods.step import Step
from kdfast.spec.divergence import DivergenceLike

#: What options are called elsewhere.
_MEANT = dict.fromkeys(("T", "t", "tau", "temp"), "temperature")
_OWN = ("temperature", "alpha", "divergence", "weight", "name")


class KD(Loss):
    """Knowledge distillation, :func:`kdfast.distill_loss`: on the engine's kernels, of one teacher or an ensemble.

    alpha * tau^2 * D(q, p) + (1 - alpha) * CE(z, y), nats per counted token; D is 0 where the student equals the
    teacher. Terms ``soft`` = tau^2 * D and ``hard`` = CE are logged, ``z`` where there is a z-loss, and with
    ``return_metrics=True`` those of :class:`kdfast.Metrics`. Without labels alpha is 1 (label-free), and so it is for a
    token that the Distiller's ``unlabelled`` marks.

    When to use:
        First, and as what every other loss is measured against: language models over any vocabulary,
        classifiers, one teacher or several, a teacher on disk. Tune the temperature before anything else; for
        language models it is 1 more often than 4, the value for images. With few labels or none ``alpha`` is
        near 1.

    Cost:
        The teacher's forward pass, or reading its soft targets from disk. One read of both logits and one write
        of the gradient; with an :class:`kdfast.LMHead` no logits are stored at all.

    Args:
        temperature: > 0, a number, a schedule or a learned temperature.
        alpha: weight of the distillation term in [0, 1], a number or a schedule; None: 0.5 with labels.
        divergence: see :func:`kdfast.distill_loss`.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.
        options: others of :func:`kdfast.distill_loss`, as ``tail``, ``teacher_weights`` or ``return_metrics``.

    Raises:
        TypeError: an option that the Distiller decides: student, teacher, labels, weights, reduction, num_items; one
            that :func:`kdfast.distill_loss` does not have; or a setting that is neither a number nor a schedule.
        ValueError: a temperature or alpha out of range.

    Source:
        Hinton et al., "Distilling the knowledge in a neural network", arXiv 1503.02531 (there tau 4 and alpha 0.9 are
        usual).

    Example:
        >>> from kdfast import Distiller
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [KD(temperature=2.0, alpha=0.9)]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['kd', 'kd.hard', 'kd.soft', 'loss']
    """

    default_name: ClassVar[str] = "kd"

    def __init__(
        self,
        *,
        temperature: Setting = 4.0,
        alpha: Setting | None = 0.9,
        divergence: DivergenceLike = "forward_kl",
        weight: Setting = 1.0,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight=weight, name=name)
        decided = {"student", "teacher", "labels", "weights", "reduction", "num_items", "return_terms"} & options.keys()
        if decided:
            msg = f"KD: {', '.join(sorted(decided))} come with the batch: see Distiller"
            raise TypeError(msg)
        taken = option_names()
        for option in options:
            if option not in taken:
                meant = _MEANT.get(option) or next(iter(difflib.get_close_matches(option, [*_OWN, *taken], 1)), None)
                hint = f": did you mean {meant}?" if meant else f"; it takes {', '.join([*_OWN, *sorted(taken)])}"
                msg = f"KD got an unknown option {option!r}{hint}"
                raise TypeError(msg)
        self.temperature = checked("temperature", temperature, 0.0, open_low=True)
        self.alpha = None if alpha is None else checked("alpha", alpha, 0.0, 1.0)
        self.divergence = divergence
        self.options = options

    def forward(self, step: Step) -> Value:
        teachers = [teacher.logits for teacher in step.teachers]
        if not teachers or any(logits is None for logits in teachers):
            msg = "KD needs a teacher's logits: give Distiller a teacher, or use CrossEntropy() for labels alone"
            raise ValueError(msg)
        labels, alpha, weights = labelling(step, 0.5 if self.alpha is None else self.alpha)
        student: Any = step.student_described()
        target: Any = teachers[0] if len(teachers) == 1 else teachers
        terms = distill_loss(
            student,
            target,
            labels,
            divergence=self.divergence,
            temperature=value(self.temperature, step.number),
            alpha=alpha,
            weights=weights,
            return_terms=True,
            **self.options,
        )
        parts = {"soft": terms.soft, "hard": terms.hard, "z": terms.z}
        if terms.metrics is not None:
            parts |= terms.metrics._asdict()
        return terms.loss, {part: term for part, term in parts.items() if term is not None}


class CrossEntropy(Loss):
    """Cross-entropy with the labels, -log p_y in nats per counted token: the label term beside feature losses.

    When to use:
        Beside losses that have no label term of their own: features, relations, DKD, NKD, DIST.

    Cost:
        One read of the student's logits; the teacher is not asked.

    Args:
        label_smoothing: in [0, 1].
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Example:
        >>> from kdfast import Distiller
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy()]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'loss']
    """

    default_name: ClassVar[str] = "ce"
    labelled_only: ClassVar[bool] = True

    def __init__(self, *, label_smoothing: float = 0.0, weight: Setting = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        self.label_smoothing = label_smoothing

    def forward(self, step: Step) -> Tensor:
        if step.labels is None:
            msg = 'CrossEntropy needs labels: a batch of (inputs, labels), or a mapping with "labels"'
            raise ValueError(msg)
        student: Any = step.student_described()
        return distill_loss(student, labels=step.labels, weights=step.weights, label_smoothing=self.label_smoothing)
