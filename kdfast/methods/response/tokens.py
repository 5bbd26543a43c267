"""What the losses of this folder have in common: arguments checked as the engine's, and tokens weighed as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.loss import distill_loss
from kdfast.methods.gate import gated
from kdfast.methods.schedule import Setting, value
from kdfast.methods.step import IGNORED, Step
from kdfast.spec import reference
from kdfast.spec.divergence import DivergenceLike
from kdfast.spec.problem import Problem, _scalar, build_problem, check_plain_logits
from kdfast.spec.reduction import weighted


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any) -> Problem:
    """The arguments of a loss of logits, checked with the messages of :func:`kdfast.distill_loss`.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or value that cannot be meant.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check_plain_logits(name, x)
    # Terms are asked for so that the labels stay, though their own term has no weight here.
    problem = build_problem(student, teacher, labels, alpha=1.0, return_terms=True, **options)
    if problem.probabilities is not None:
        msg = "labels must be class indices, int64: this loss tells the label's class from the others"
        raise ValueError(msg)
    reference._check_values(problem, student)
    return problem


def teacher_of(problem: Problem) -> Tensor:
    """The teacher's logits (..., V), detached."""
    (teacher,) = problem.teachers
    assert isinstance(teacher, Tensor)
    return teacher


def not_negative(**factors: float) -> None:
    """Raises for factors that are not finite numbers >= 0."""
    for name, factor in factors.items():
        _scalar(name, factor)


def arithmetic(problem: Problem, x: Tensor) -> Tensor:
    """Logits in fp32, or fp64 for an fp64 student; those of a dropped token are 0, so that a NaN there goes nowhere."""
    double = isinstance(problem.student, Tensor) and problem.student.dtype == torch.float64
    return reference._logits(x, problem.counted, torch.float64 if double else torch.float32)


def temperature(problem: Problem, like: Tensor) -> Tensor:
    """The temperature in the dtype and on the device of a tensor."""
    return problem.temperature.to(dtype=like.dtype, device=like.device)


def column_of_label(problem: Problem) -> Tensor:
    """(..., 1) int64; 0 for a dropped token, whose label may be none."""
    labels = problem.labels
    assert labels is not None
    return (labels if problem.counted is None else torch.where(problem.counted, labels, 0))[..., None]


def engine(
    problem: Problem,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    *,
    divergence: DivergenceLike = "forward_kl",
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """tau^2 D(teacher, student), or the cross-entropy, by :func:`kdfast.distill_loss`: sum of weights * loss.

    Args:
        problem: says whether tokens are summed.
        student: (..., V) logits.
        teacher: (..., V) logits; None with labels.
        labels: (...) int64; None with a teacher.
        weights: (...), denominators included; 0 drops the token.
        divergence: see :func:`kdfast.distill_loss`.
        temperature: > 0.
    """
    loss: Tensor = distill_loss(
        student,
        teacher,
        None if labels is None else column_of_label(problem).squeeze(-1),
        divergence=divergence,
        temperature=temperature,
        weights=weights,
        reduction="none" if problem.reduction == "none" else "sum",
    )
    return loss


def reduced(problem: Problem, weights: Tensor, x: Tensor) -> Tensor:
    """Sum of weights * x over the tokens, or the products themselves, as the problem's reduction says."""
    return weighted(weights, x, problem.reduction)


def blended(
    problem: Problem,
    student: Tensor,
    labels: Tensor | None,
    soft: Callable[[Tensor], Tensor],
    weights: Tensor,
    alpha: float | Tensor,
) -> Tensor:
    """Alpha * soft + (1 - alpha) * CE(student, labels), the labels' term by the engine; soft alone where alpha is 1.

    Args:
        problem: says whether tokens are summed.
        student: (..., V) logits.
        labels: (...) int64, or None.
        soft: of weights (...), the distillation term with these.
        weights: (...), denominators included.
        alpha: a number, 0-d, or (...) per token.

    Raises:
        ValueError: alpha is below 1, and there are no labels; or it is of another shape.
    """
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        if labels is None or alpha.shape != problem.leading:
            wanted = "" if labels is None else f" or {tuple(problem.leading)}, one a token"
            msg = f"alpha must be a number, 0-d{wanted}, got {tuple(alpha.shape)}"
            raise ValueError(msg)
        return soft(weights * alpha) + engine(problem, student, None, labels, weights * (1 - alpha))
    _scalar("alpha", alpha, 0.0, 1.0)
    if not isinstance(alpha, Tensor) and alpha == 1:
        return soft(weights)
    if labels is None:
        msg = f"alpha must be 1 without labels, got {alpha!r}: pass labels too"
        raise ValueError(msg)
    if not isinstance(alpha, Tensor) and alpha == 0:
        return engine(problem, student, None, labels, weights)
    rest = 1 - alpha
    hard = engine(problem, gated(student, rest), None, labels, weights)
    return weighed(alpha, soft(weights)) + weighed(rest, hard)


def weighed(factor: float | Tensor, x: Tensor) -> Tensor:
    """The product of a part of a loss and its factor; a factor of 0 silences an infinite part.

    The gradient is silenced where the part is computed from what :func:`kdfast.methods.gate.gated` returned, or where
    the factor is a number, which leaves the part out.
    """
    if isinstance(factor, Tensor):
        return weighted(factor.to(x), x, "none")
    return torch.zeros_like(x) if factor == 0 else factor * x


def labelling(step: Step, alpha: Setting) -> tuple[Tensor | None, float | Tensor, Tensor | None]:
    """Labels, weight of the distillation term and weights of the tokens: alpha is 1 for what has no label.

    That is a whole batch, or the tokens that are marked so: alpha is per token then, and their label, 0, is not read.
    """
    labels, unlabelled, weights = step.labels, step.unlabelled, step.weights
    if labels is None:
        return None, 1.0, weights
    amount = value(alpha, step.number)
    if unlabelled is None:
        return labels, amount, weights
    if not isinstance(amount, Tensor) and amount == 1:  # labels say which tokens count, and nothing else
        counted = (labels != IGNORED) | unlabelled
        return None, 1.0, counted.float() if weights is None else torch.where(counted, weights, 0.0)
    given = amount if isinstance(amount, Tensor) else torch.tensor(amount)
    return labels.masked_fill(unlabelled, 0), torch.where(unlabelled, 1.0, given.to(labels.device)), weights


def labels_of(step: Step, who: str) -> Tensor:
    """The labels of a batch.

    Raises:
        ValueError: it has none.
    """
    if step.labels is None:
        msg = f'{who} needs labels: a batch of (inputs, labels), or a mapping with "labels"'
        raise ValueError(msg)
    return step.labels
