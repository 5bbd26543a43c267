"""Normalised distillation: a soft cross-entropy of the label, and one of all else made to sum to 1."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdfast.methods.loss import Loss
from kdfast.methods.response import tokens
from kdfast.methods.schedule import Setting, checked, value
from kdfast.methods.step import Step
from kdfast.spec import reference
from kdfast.spec.problem import Reduction
from kdfast.spec.reduction import soft_scale, token_weights


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Normalised knowledge distillation: soft cross-entropies of the label and of the rest.

    With S = softmax(student), T = softmax(teacher) and y the label, per token::

        loss = -T_y log S_y - gamma * temperature^2 * sum_{j != y} That_j log Shat_j
        Shat = softmax(student_j / temperature), j != y        and likewise That

    In nats. Cross-entropies: where student and teacher are equal the value is that of the teacher's entropies, not 0.
    On the engine's kernels: the first part, as a cross-entropy whose tokens are weighed by T_y, and the KL of the
    second, of logits whose label column is -inf; the entropy of That, which the KL lacks, is plain PyTorch.

    Args:
        student: (..., V) floating point logits, V >= 2; fp32 arithmetic, fp64 for fp64.
        teacher: (..., V) floating point logits; detached. A column other than the label's must be finite.
        labels: (...) int64, aligned with the logits.
        gamma: >= 0, weight of the second part.
        temperature: > 0, of the second part; a number or a 0-d tensor, which may require grad.
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
        Yang et al., "From knowledge distillation to self-knowledge distillation: a unified approach with normalized
        loss and customized soft labels", arXiv 2303.13005.

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss = nkd_loss(student, teacher, torch.tensor([0]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        1.2172
    """
    target, others = _parts(student, teacher, labels, temperature, ignore_index, weights, reduction, num_items)
    tokens.not_negative(gamma=gamma)
    return target + tokens.weighed(gamma, others)


class NKD(Loss):
    """Normalised knowledge distillation, see :func:`nkd_loss`: on the engine's kernels but for the teacher's entropy.

    Terms ``target`` and ``others`` are logged, before gamma. The paper adds :class:`CrossEntropy` with weight 1. Not 0
    where student and teacher are equal: the teacher's entropies are left.

    When to use:
        Classifiers with labels, where DKD asks for too much tuning: gamma 1.5 at temperature 1 is the published
        setting for all models. It needs labels.

    Cost:
        As :class:`KD`, and one more read of each model's logits.

    Args:
        gamma: >= 0, weight of all but the label.
        temperature: > 0, a number, a schedule or a learned temperature.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range; in a step, a batch without labels.

    Source:
        Yang et al., arXiv 2303.13005.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy(), NKD()]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'loss', 'nkd', 'nkd.others', 'nkd.target']
    """

    default_name: ClassVar[str] = "nkd"
    labelled_only: ClassVar[bool] = True

    def __init__(
        self, *, gamma: float = 1.5, temperature: Setting = 1.0, weight: Setting = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight=weight, name=name)
        tokens.not_negative(gamma=gamma)
        self.gamma = gamma
        self.temperature = checked("temperature", temperature, 0.0, open_low=True)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        target, others = _parts(
            step.student_logits(),
            step.teacher_logits(),
            tokens.labels_of(step, "NKD"),
            value(self.temperature, step.number),
            weights=step.weights,
        )
        return target + tokens.weighed(self.gamma, others), {"target": target, "others": others}


def _parts(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The part of the label and that of the rest, before gamma, reduced."""
    problem = tokens.check(
        student,
        teacher,
        labels,
        temperature=temperature,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        num_items=num_items,
    )
    w, teacher = token_weights(problem), tokens.teacher_of(problem)
    y = tokens.column_of_label(problem)
    t_y = torch.log_softmax(tokens.arithmetic(problem, teacher), -1).gather(-1, y).squeeze(-1).exp()
    target = tokens.engine(problem, student, None, labels, w * t_y)
    z, t = student.scatter(-1, y, -reference.INF), teacher.scatter(-1, y, -reference.INF)
    others = tokens.engine(problem, z, t, None, w, temperature=temperature)
    rest = tokens.arithmetic(problem, t)
    log_t = torch.log_softmax(reference._over(rest, tokens.temperature(problem, rest)), -1)
    entropy = -(log_t.exp() * torch.where(log_t == -reference.INF, 0.0, log_t)).sum(-1)
    return target, others + tokens.reduced(problem, w, entropy) * soft_scale(problem, w)
