"""Transformed teacher matching: the teacher's probabilities to a power, the student's as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdfast.methods.gate import gated
from kdfast.methods.loss import Loss
from kdfast.methods.response import tokens
from kdfast.methods.schedule import Setting, checked, value
from kdfast.methods.step import Step
from kdfast.spec.problem import Reduction, _scalar
from kdfast.spec.reduction import token_weights


def ttm_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float | Tensor = 0.1,
    alpha: float | Tensor = 1.0,
    weighted: bool = False,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Transformed teacher matching (TTM), and weighted (WTTM).

    With p = softmax(student) and q = softmax(teacher), per token::

        loss = alpha * KL(q^gamma / Z, p) + (1 - alpha) * CE(student, labels)        Z = sum_j q_j^gamma
        weighted: Z times the KL, so that tokens whose teacher is less sure weigh more

    In nats. q^gamma / Z is softmax(gamma * teacher), so the KL is the engine's forward KL at temperature 1 against a
    scaled fp32 copy of the teacher; Z is plain PyTorch. No tau^2: the student has no temperature. The target is flatter
    than the teacher: the KL is 0 where student = gamma * teacher, not where they are equal. The mean divides by the
    number of counted tokens (the sum of ``weights``), never by the sum of Z.

    Args:
        student: (..., V) floating point logits; fp32 arithmetic, fp64 for fp64.
        teacher: (..., V) floating point logits; detached.
        labels: (...) int64, or None; with alpha = 1 they only drop tokens.
        gamma: > 0, the power: 1 / temperature of the teacher. A number, or a 0-d tensor without gradient.
        alpha: weight of the distillation term in [0, 1]; 1 without labels.
        weighted: WTTM.
        ignore_index: a token with this label is dropped.
        weights: (...) per token; 0 drops the token, whatever its logits hold.
        reduction: "mean": sum(w * loss) / sum(w) over counted tokens; "sum"; "none": w * loss per token.
        num_items: replaces the denominator of the mean, as in :func:`kdfast.distill_loss`.

    Returns:
        The loss, fp32 (fp64 for an fp64 student): 0-d, or (...) with ``reduction="none"``.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or value that cannot be meant.

    Source:
        Zheng and Yang, "Knowledge distillation based on transformed teacher matching", arXiv 2402.11148.

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[10.0, 0.0, -10.0]])
        >>> round(ttm_loss(student, teacher, gamma=0.1).item(), 6)
        0.0
    """
    problem = tokens.check(
        student,
        teacher,
        labels,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
    )
    _scalar("gamma", gamma, open_low=True)
    w = token_weights(problem)
    t = tokens.arithmetic(problem, tokens.teacher_of(problem))
    power = gamma * t
    z = gated(student, alpha)
    factor: float | Tensor = 1.0
    if weighted:
        factor = (torch.logsumexp(power, -1) - gamma * torch.logsumexp(t, -1)).exp()

    def soft(weights: Tensor) -> Tensor:
        return tokens.engine(problem, z, power, None, weights * factor)

    return tokens.blended(problem, student, labels, soft, w, alpha)


class TTM(Loss):
    """Transformed teacher matching, see :func:`ttm_loss`: on the engine's kernels, not 0 where the models are equal.

    Label-free; with ``alpha`` below 1, or a :class:`CrossEntropy` beside it, labels have a say.

    When to use:
        Where KD's temperature on the student's side is in the way: only the teacher is flattened, by the power
        gamma = 1 / tau, and the student is trained as it will be used, at temperature 1.

    Cost:
        As :class:`KD`.

    Args:
        gamma: > 0, power of the teacher's probabilities, a number or a schedule.
        alpha: weight of the distillation term in [0, 1], a number or a schedule; 1 where a batch has no labels.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range.

    Source:
        Zheng and Yang, arXiv 2402.11148.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy(), TTM()]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'loss', 'ttm']
    """

    default_name: ClassVar[str] = "ttm"
    weighted: ClassVar[bool] = False

    def __init__(
        self, *, gamma: Setting = 0.1, alpha: Setting = 1.0, weight: Setting = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.gamma = checked("gamma", gamma, 0.0, open_low=True)
        self.alpha = checked("alpha", alpha, 0.0, 1.0)

    def forward(self, step: Step) -> Tensor:
        labels, alpha, weights = tokens.labelling(step, self.alpha)
        return ttm_loss(
            step.student_logits(),
            step.teacher_logits(),
            labels,
            gamma=value(self.gamma, step.number),
            alpha=alpha,
            weighted=self.weighted,
            weights=weights,
        )


class WTTM(TTM):
    """Weighted transformed teacher matching: :class:`TTM` whose tokens are weighed by Z = sum q^gamma.

    When to use:
        As :class:`TTM`, and examples of which the teacher is less sure should count more: Z is larger for
        flatter rows. Of the two it is the better one in our comparison.

    Cost:
        As :class:`KD`, and one pass over the teacher's logits for Z.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy(), WTTM()]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'loss', 'wttm']
    """

    default_name: ClassVar[str] = "wttm"
    weighted: ClassVar[bool] = True
