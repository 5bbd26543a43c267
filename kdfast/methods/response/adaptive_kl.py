"""Adaptive KL: forward and reverse, in the shares in which the student is off the teacher's head and its tail."""

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
from kdfast.spec.problem import Reduction
from kdfast.spec.reduction import token_weights


def adaptive_kl_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    head: float = 0.5,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    r"""Adaptive KL (AKL): a mixture of forward and reverse KL, by how far off the student is where.

    With p = softmax(student / temperature), q = softmax(teacher / temperature), and H the fewest columns, largest q
    first, that hold at least ``head`` of the teacher's mass, per token::

        g_H = sum_{j in H} |q_j - p_j|        g_T = sum_{j not in H} |q_j - p_j|
        loss = alpha * temperature^2 * [g_H KL(q, p) + g_T KL(p, q)] / (g_H + g_T) + (1 - alpha) * CE(student, labels)

    In nats; the KLs are 0 where student and teacher are equal. The shares carry no gradient, and are 1/2 where both
    gaps are 0. The two KLs are the engine's, whose tokens the shares weigh; the gaps are plain PyTorch, with a sort of
    the teacher's columns.

    Args:
        student: (..., V) floating point logits; fp32 arithmetic, fp64 for fp64.
        teacher: (..., V) floating point logits; detached.
        labels: (...) int64, or None; with alpha = 1 they only drop tokens.
        head: in (0, 1], share of the teacher's mass in the head.
        temperature: > 0, a number or a 0-d tensor, which may require grad. The paper has none.
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
        Wu et al., "Rethinking Kullback-Leibler divergence in knowledge distillation for large language models",
        arXiv 2404.02657.

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss = adaptive_kl_loss(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0893
    """
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
    checked("head", head, 0.0, 1.0, open_low=True)
    w, teacher = token_weights(problem), tokens.teacher_of(problem)
    with torch.no_grad():
        z, t = (tokens.arithmetic(problem, x.detach()) for x in (student, teacher))
        tau = tokens.temperature(problem, z)
        p, q = torch.softmax(reference._over(z, tau), -1), torch.softmax(reference._over(t, tau), -1)
        mass, order = q.sort(dim=-1, descending=True, stable=True)
        gap = (q - p).abs_().gather(-1, order)
        in_head = mass.cumsum(-1) - mass < head
        g_head, g_tail = (torch.where(part, gap, 0.0).sum(-1) for part in (in_head, ~in_head))
        total = g_head + g_tail
        share = torch.where(total == 0, 0.5, g_head / torch.where(total == 0, 1.0, total))
        rest = torch.where(total == 0, 0.5, g_tail / torch.where(total == 0, 1.0, total))
    z = gated(student, alpha)

    def soft(weights: Tensor) -> Tensor:
        forward = tokens.engine(problem, z, teacher, None, weights * share, temperature=temperature)
        return forward + tokens.engine(
            problem, z, teacher, None, weights * rest, divergence="reverse_kl", temperature=temperature
        )

    return tokens.blended(problem, student, labels, soft, w, alpha)


class AdaptiveKL(Loss):
    """Adaptive KL, see :func:`adaptive_kl_loss`: both KLs on the engine's kernels, 0 where the models are equal.

    Label-free; with ``alpha`` below 1, or a :class:`CrossEntropy` beside it, labels have a say.

    When to use:
        Language models where forward KL alone covers too much and reverse KL too little: forward and reverse KL
        are mixed for each token by where the student is off, in the teacher's head or its tail. Little is known
        of it on classifiers.

    Cost:
        Two divergences, and the teacher's probabilities sorted in memory: (tokens, V) in fp32.

    Args:
        head: in (0, 1], share of the teacher's mass in the head.
        temperature: > 0, a number, a schedule or a learned temperature.
        alpha: weight of the distillation term in [0, 1], a number or a schedule; 1 where a batch has no labels.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range.

    Source:
        Wu et al., arXiv 2404.02657.

    Example:
        >>> from kdfast import Distiller
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [AdaptiveKL(alpha=0.9)]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['akl', 'loss']
    """

    default_name: ClassVar[str] = "akl"

    def __init__(
        self,
        *,
        head: float = 0.5,
        temperature: Setting = 1.0,
        alpha: Setting = 1.0,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        checked("head", head, 0.0, 1.0, open_low=True)
        self.head = head
        self.temperature = checked("temperature", temperature, 0.0, open_low=True)
        self.alpha = checked("alpha", alpha, 0.0, 1.0)

    def forward(self, step: Step) -> Tensor:
        labels, alpha, weights = tokens.labelling(step, self.alpha)
        return adaptive_kl_loss(
            step.student_logits(),
            step.teacher_logits(),
            labels,
            head=self.head,
            temperature=value(self.temperature, step.number),
            alpha=alpha,
            weights=weights,
        )
