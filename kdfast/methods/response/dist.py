"""DIST: correlation with the teacher within an example and, class by class, over the batch."""

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
from kdfast.spec.reduction import token_weights

#: Deviations below so many roundings of the mean are none: what is left of equal values that were centred.
ROUNDINGS = 8.0


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
) -> Tensor:
    r"""DIST: one minus the Pearson correlation of probabilities, over rows and over columns.

    With P = softmax(student / temperature) and Q = softmax(teacher / temperature) of the N counted tokens, (N, V)::

        soft = temperature^2 * [beta * mean_i (1 - r(P_i, Q_i)) + gamma * mean_j (1 - r(P_:j, Q_:j))]
        loss = alpha * soft + (1 - alpha) * CE(student, labels)

    0 where student and teacher are equal. The second mean is over the V columns, each a correlation over the tokens of
    the batch: by definition it depends on the batch's size, and micro-batches do not add up to one batch. Of two
    constant vectors the distance is 0, of one constant and one other it is 1. Plain
    PyTorch: no kernel has correlations.

    Args:
        student: (..., V) floating point logits; fp32 arithmetic, fp64 for fp64.
        teacher: (..., V) floating point logits; detached.
        labels: (...) int64, or None; with alpha = 1 they only drop tokens.
        beta: >= 0, weight of the rows ("inter-class").
        gamma: >= 0, weight of the columns ("intra-class").
        temperature: > 0, a number or a 0-d tensor, which may require grad.
        alpha: weight of the distillation term in [0, 1]; 1 without labels.
        ignore_index: a token with this label is dropped.
        weights: (...) >= 0 per token, in the mean over rows and in the correlations over columns; 0 drops the token,
            whatever its logits hold.

    Returns:
        The loss, 0-d fp32 (fp64 for an fp64 student).

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: a shape, device, name or value that cannot be meant.

    Source:
        Huang et al., "Knowledge distillation from a stronger teacher", arXiv 2205.10536 (tau 4 and weights 2, 2 on
        CIFAR-100).

    Example:
        >>> student = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
        >>> loss = dist_loss(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0099
    """
    return _terms(student, teacher, labels, beta, gamma, temperature, alpha, weights, ignore_index)[0]


class DIST(Loss):
    """Distillation by correlation, see :func:`dist_loss`: plain PyTorch, 0 where student and teacher are equal.

    Terms ``rows`` and ``columns`` are logged, before beta and gamma. Label-free; with ``alpha`` below 1, or a
    :class:`CrossEntropy` beside it (the paper's, with weight 1), labels have a say. Columns are compared over the batch
    of one call.

    When to use:
        A teacher much stronger than the student, or trained with heavy augmentation: correlations ask for the
        order and spacing of the probabilities, not for their exact values. Batches of 64 or more, as columns
        are compared over the batch; with few classes a row's correlation says little.

    Cost:
        Two softmaxes in memory, (B, V) in fp32 each: fit for classifiers, not for vocabularies of 100 thousand.

    Args:
        beta: >= 0, weight of the rows.
        gamma: >= 0, weight of the columns.
        temperature: > 0, a number, a schedule or a learned temperature.
        alpha: weight of the distillation term in [0, 1], a number or a schedule; 1 where a batch has no labels.
        weight: factor in the objective, a number or a schedule.
        name: in the logged terms.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number out of range.

    Source:
        Huang et al., "Knowledge distillation from a stronger teacher", arXiv 2205.10536.

    Example:
        >>> from kdfast import Distiller
        >>> from kdfast.methods import CrossEntropy
        >>> student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
        >>> batch = torch.randn(16, 8), torch.randint(0, 5, (16,))
        >>> with Distiller(student, teacher, [CrossEntropy(), DIST()]) as d:
        ...     loss, terms = d(batch)
        >>> loss.backward()
        >>> sorted(terms)
        ['ce', 'dist', 'dist.columns', 'dist.rows', 'loss']
    """

    default_name: ClassVar[str] = "dist"

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: Setting = 1.0,
        alpha: Setting = 1.0,
        weight: Setting = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        tokens.not_negative(beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma
        self.temperature = checked("temperature", temperature, 0.0, open_low=True)
        self.alpha = checked("alpha", alpha, 0.0, 1.0)

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        labels, alpha, weights = tokens.labelling(step, self.alpha)
        return _terms(
            step.student_logits(),
            step.teacher_logits(),
            labels,
            self.beta,
            self.gamma,
            value(self.temperature, step.number),
            alpha,
            weights,
        )


def _terms(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    beta: float,
    gamma: float,
    temperature: float | Tensor,
    alpha: float | Tensor,
    weights: Tensor | None,
    ignore_index: int = -100,
) -> tuple[Tensor, dict[str, Tensor]]:
    problem = tokens.check(
        student, teacher, labels, temperature=temperature, ignore_index=ignore_index, weights=weights
    )
    tokens.not_negative(beta=beta, gamma=gamma)
    w = token_weights(problem)  # sums to 1, or to 0 where no token counts
    by = w.reshape(-1, 1)
    given = (gated(student, alpha), tokens.teacher_of(problem))
    z, t = (tokens.arithmetic(problem, x).reshape(-1, problem.vocab_size) for x in given)
    tau = tokens.temperature(problem, z)
    p, q = torch.softmax(reference._over(z, tau), -1), torch.softmax(reference._over(t, tau), -1)
    present = (z != -reference.INF) | (t != -reference.INF)  # columns that only pad are not among those compared
    even = present / present.sum(1, keepdim=True).clamp(min=1)
    rows = (by.squeeze(-1) * _distance(p, q, even.to(p.dtype), 1)).sum() * tau.square()
    anywhere = present.any(0)
    columns = torch.where(anywhere, _distance(p, q, by, 0), 0.0).sum() / anywhere.sum().clamp(min=1) * tau.square()

    def soft(weights: Tensor) -> Tensor:  # of the whole batch, and so of each token by its share
        total = tokens.weighed(beta, rows) + tokens.weighed(gamma, columns)
        return total if weights is w else total * weights.sum()

    loss = tokens.blended(problem, student, labels, soft, w, alpha)
    return loss, {"rows": rows, "columns": columns}


def _distance(x: Tensor, y: Tensor, weights: Tensor, dim: int) -> Tensor:
    """1 - r of two matrices along an axis, as half the squared distance of unit vectors: nothing cancels."""
    (a, a_constant), (b, b_constant) = _unit(x, weights, dim), _unit(y, weights, dim)
    return torch.where(a_constant == b_constant, 0.5 * (a - b).square().sum(dim), 1.0)


def _unit(x: Tensor, weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What is centred and of length 1 along an axis, under weights that sum to 1; 0, and True, if constant."""
    mean = (weights * x).sum(dim, keepdim=True)
    centred = torch.where(weights > 0, x - mean, 0.0)
    # probabilities of a large vocabulary are so small that their squares may be 0
    scale = centred.detach().abs().amax(dim, keepdim=True)
    constant = scale <= ROUNDINGS * torch.finfo(x.dtype).eps * mean.detach()
    scaled = torch.where(constant, 0.0, centred / torch.where(constant, 1.0, scale)) * weights.sqrt()
    length = torch.where(constant, 1.0, scaled.square().sum(dim, keepdim=True)).sqrt()
    return scaled / length, constant.squeeze(dim)
