"""Logit standardisation: distillation of the shape of the logits, whatever their mean and scale."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdfast.methods.gate import gated
from kdfast.methods.loss import Loss
from kdfast.methods.response import tokens
from kdfast.methods.schedule import Setting, checked, value
from kdfast.methods.step import Step
from kdfast.spec import reference
from kdfast.spec.divergence import DivergenceLike, divergence_terms
from kdfast.spec.problem import Reduction
from kdfast.spec.reduction import token_weights

EPSILON = 1e-7  # the authors', added to the deviation


def standardised_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: DivergenceLike = "forward_kl",
    temperature: float | Tensor = 2.0,
    alpha: float | Tensor = 1.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Distillation of standardised logits.

    With n(z) = (z - mean(z)) / (std(z) + 1e-7), over the columns whose logit is not -inf and with the unbiased standard
    deviation, p = softmax(n(student) / temperature) and q = softmax(n(teacher) / temperature), per token::

        loss = alpha * temperature^2 * D(q, p) + (1 - alpha) * CE(student, labels)

    In nats; D is 0 where student and teacher are equal, and where they differ by a shift and a positive factor only. CE
    sees the logits themselves. D is on the engine's kernels; the standardisation is plain PyTorch, to fp32 copies.

    Args:
        student: (..., V) floating point logits, V >= 2; fp32 arithmetic, fp64 for fp64.
        teacher: (..., V) floating point logits; detached.
        labels: (...) int64, or None; with alpha = 1 they only drop tokens.
        divergence: see :func:`kdfast.distill_loss`.
        temperature: > 0, a number or a 0-d tensor, which may require grad.
        alpha: weight of the distillation term in [0, 1]; 1 without labels.
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
        Sun et al., "Logit standardization in knowledge distillation", arXiv 2403.01427.

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[9.0, 5.0, 1.0]])
        >>> round(standardised_loss(student, teacher).item(), 6)
        0.0
    """
    problem = tokens.check(
        student,
        teacher,
        labels,
        divergence=divergence,
        temperature=temperature,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
    )
    w = token_weights(problem)
    given = (gated(student, alpha), tokens.teacher_of(problem))
    z, t = (_standardised(tokens.arithmetic(problem, x)) for x in given)

    def soft(weights: Tensor) -> Tensor:
        return tokens.engine(problem, z, t, None, weights, divergence=divergence, temperature=temperature)

    return tokens.blended(problem, student, labels, soft, w, alpha)


def _standardised(z: Tensor) -> Tensor:
    present = z != -reference.INF
    n = present.sum(-1, keepdim=True)
    mean = torch.where(present, z, 0.0).sum(-1, keepdim=True) / n
    centred = torch.where(present, z - mean, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)
    # of equal logits all gradients are 0, where the square root's would be infinite
    deviation = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, variance).sqrt())
    return torch.where(present, centred / (deviation + EPSILON), -reference.INF)


class LogitStandardisation(Loss):
    """KD of standardised logits, see :func:`standardised_loss`: its divergence is on the engine's kernels.

    Label-free; with ``alpha`` below 1, or a :class:`CrossEntropy` beside it (in the paper with weight 0.1), labels have
    a say. 0 where student and teacher are equal.

    When to use:
        A student that cannot reach the teacher's range of logits, or a teacher whose logits are unusually
        sharp: mean and scale of each row no longer matter, so one temperature (2) serves all. It does not make
        a calibrated student: the scale of its logits is left to the label term.

    Cost:
        As :class:`KD`, and a mean and a deviation of each row of both models.

    Args:
        divergence: see :func:`kdfast.distill_loss`.
        temperature: > 0, a number, a schedule or a learned temperature.
        alpha: weight of the distillation term in [0, 1], a number or a schedule; 1 where a batch has no labels.
        weight: factor in the objective, a number or a schedule; the paper's is 9.
        name: in the logged terms.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range.

    Source:
        Sun et al., "Logit standardization in knowledge distillation", arXiv 2403.01427.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy(weight=0.1), LogitStandardisation(weight=9.0)]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'loss', 'standardised']
    """

    default_name: ClassVar[str] = "standardised"

    def __init__(
        self,
        *,
        divergence: DivergenceLike = "forward_kl",
        temperature: Setting = 2.0,
        alpha: Setting = 1.0,
        weight: Setting = 9.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        divergence_terms(divergence)
        self.divergence = divergence
        self.temperature = checked("temperature", temperature, 0.0, open_low=True)
        self.alpha = checked("alpha", alpha, 0.0, 1.0)

    def forward(self, step: Step) -> Tensor:
        labels, alpha, weights = tokens.labelling(step, self.alpha)
        return standardised_loss(
            step.student_logits(),
            step.teacher_logits(),
            labels,
            divergence=self.divergence,
            temperature=value(self.temperature, step.number),
            alpha=alpha,
            weights=weights,
        )
