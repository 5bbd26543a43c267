"""Decoupled distillation: what the teacher says of the label, and of all else, weighed apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdfast.methods.loss import Loss
from kdfast.methods.response import tokens
from kdfast.methods.schedule import Setting, checked, value
from kdfast.methods.step import Step
from kdfast.spec import reference
from kdfast.spec.problem import Problem, Reduction
from kdfast.spec.reduction import soft_scale, token_weights


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Decoupled knowledge distillation: KL of the label against all else, and KL among all else.

    With p = softmax(student / temperature), q = softmax(teacher / temperature) and y the label, per token::

        loss = temperature^2 * [alpha * KL(u_q, u_p) + beta * KL(r_q, r_p)]
        u_p = (p_y, 1 - p_y)        r_p = p_j / (1 - p_y), j != y        and likewise of q

    In nats; 0 where student and teacher are equal. The second part is the engine's forward KL of logits whose label
    column is -inf; the first, two outcomes per token, is plain PyTorch from z_y - logsumexp(z_j, j != y), where a model
    that is sure of its label cancels nothing.

    Args:
        student: (..., V) floating point logits, V >= 2; fp32 arithmetic, fp64 for fp64.
        teacher: (..., V) floating point logits; detached. A column other than the label's must be finite.
        labels: (...) int64, aligned with the logits.
        alpha: >= 0, weight of the label's part.
        beta: >= 0, weight of the rest.
        temperature: > 0, a number or a 0-d tensor, which may require grad.
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
        Zhao et al., "Decoupled knowledge distillation", arXiv 2203.08679.

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss = dkd_loss(student, teacher, torch.tensor([0]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.1241
    """
    target, others = _parts(student, teacher, labels, temperature, ignore_index, weights, reduction, num_items)
    tokens.not_negative(alpha=alpha, beta=beta)
    return tokens.weighed(alpha, target) + tokens.weighed(beta, others)


class DKD(Loss):
    """Decoupled knowledge distillation, see :func:`dkd_loss`; its part of all but the label is on the engine's kernels.

    Terms ``target`` and ``others`` are logged, before alpha and beta. The paper adds :class:`CrossEntropy` with
    weight 1 and warms this loss up over 20 epochs: ``DKD(weight=WarmUp(1.0, steps=))``. 0 where student and teacher are
    equal.

    When to use:
        Classifiers with a teacher that is very sure of the label: KL then says little about the other classes,
        which beta makes count. It needs labels, a beta for each pair of models and a warm-up; it was made for
        classifiers, and its parts mean less over a vocabulary.

    Cost:
        As :class:`KD`, and one more read of each model's logits.

    Args:
        alpha: >= 0, weight of the label against all else.
        beta: >= 0, weight of all else; the paper takes 0.5 to 8 by the pair of models.
        temperature: > 0, a number, a schedule or a learned temperature.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range; in a step, a batch without labels.

    Source:
        Zhao et al., "Decoupled knowledge distillation", arXiv 2203.08679.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy(), DKD()]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'dkd', 'dkd.others', 'dkd.target', 'loss']
    """

    default_name: ClassVar[str] = "dkd"
    labelled_only: ClassVar[bool] = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: Setting = 4.0,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        tokens.not_negative(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.temperature = checked("temperature", temperature, 0.0, open_low=True)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        target, others = _parts(
            step.student_logits(),
            step.teacher_logits(),
            tokens.labels_of(step, "DKD"),
            value(self.temperature, step.number),
            weights=step.weights,
        )
        loss = tokens.weighed(self.alpha, target) + tokens.weighed(self.beta, others)
        return loss, {"target": target, "others": others}


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
    """The part of the label and that of the rest, before alpha and beta, reduced."""
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
    z, t = student.scatter(-1, y, -reference.INF), teacher.scatter(-1, y, -reference.INF)
    others = tokens.engine(problem, z, t, None, w, temperature=temperature)
    kl = reference.kl(_label_or_not(problem, teacher, t, y), _label_or_not(problem, student, z, y))
    target = tokens.reduced(problem, w, kl) * soft_scale(problem, w)
    return target, others


def _label_or_not(problem: Problem, x: Tensor, others: Tensor, y: Tensor) -> Tensor:
    """(log p_y, log(1 - p_y)) from logits and those without the label's, (..., V) -> (..., 2)."""
    rest = tokens.arithmetic(problem, others)
    tau = tokens.temperature(problem, rest)
    top = rest.detach().amax(-1, keepdim=True)  # from which both are counted, as tau would magnify their rounding
    label = ((tokens.arithmetic(problem, x.gather(-1, y)) - top) / tau).squeeze(-1)
    odds = label - torch.logsumexp(reference._over(rest, tau), -1)
    return torch.stack([logsigmoid(odds), logsigmoid(-odds)], -1)
