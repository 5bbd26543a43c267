"""From the terms of tokens to the loss: what the specification and the glue of every kernel share.

Weights, alpha, tau^2 and the reduction are plain PyTorch on vectors with an entry per token, so that their gradients
come from autograd whatever made the terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.spec.problem import NO_LABEL, Problem
from kdfast.spec.sparse import SAMPLED


class Metrics(NamedTuple):
    """For the training log, 0-d fp32, detached: means over the tokens that count, whatever their weights; NaN of none.

    The largest logit of a row is the one of the lowest column where several are as large; a row whose largest is not
    finite has none, and is neither accurate nor in agreement. Entropies are those of the distributions that the
    divergence compares, in nats: over the columns that student and teacher share, at the loss's temperature, at 1 where
    there is no teacher.

    Attributes:
        accuracy: share of the labelled tokens whose label is the student's largest logit. Of class probabilities, the
            label is the likeliest class. None without labels.
        agreement: share of tokens whose largest logit is the teacher's, too; of an ensemble, the likeliest column of
            the mixture. None without a teacher, and of sampled targets, which may not hold the likeliest.
        student_entropy: mean entropy of p.
        teacher_entropy: mean entropy of q. Of sparse targets, that of the outcomes: the kept entries, and with
            ``tail="bucket"`` all the others as one; of sampled ones, their unbiased estimate. None without a teacher.
    """

    accuracy: Tensor | None
    agreement: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None


class DistillTerms(NamedTuple):
    """The loss and its terms, reduced alike; the terms are detached, soft and hard before alpha.

    With one alpha for all tokens, loss = alpha * soft + (1 - alpha) * hard + z.

    Attributes:
        loss: the value to call ``backward()`` on, nats.
        soft: reduced tau^2 * D (without tau^2 where ``scale_t2=False``); None without a teacher.
        hard: reduced CE, nats; an unlabelled token (alpha = 1 in a per-token alpha) adds 0; None without labels.
        z: reduced z_loss * logsumexp(student)^2; None where ``z_loss`` is the number 0.
        metrics: :class:`Metrics`; None unless ``return_metrics=True``.
    """

    loss: Tensor
    soft: Tensor | None
    hard: Tensor | None
    z: Tensor | None = None
    metrics: Metrics | None = None


for _public in (Metrics, DistillTerms):
    _public.__module__ = "kdfast"  # where they are for users, and for what they pickle


class TokenTerms(NamedTuple):
    """What every backend computes, per token (...), in nats; 0 for a dropped token; None without such a term."""

    soft: Tensor | None  # D(q, p), before tau^2 and alpha
    hard: Tensor | None  # CE(z, y), label smoothing included
    z: Tensor | None  # logsumexp(z)^2
    observed: Tensor | None = None  # (..., 5) fp64, see Observed


class Observed(NamedTuple):
    """What metrics are made of, per token (...), fp64.

    A row whose largest logit is not finite has no column, which is -1 of the student and -2 of the teacher.
    """

    student_top: Tensor  # the column of the largest logit, of all
    student_top_taught: Tensor  # and of those under the distillation term
    student_entropy: Tensor
    teacher_top: Tensor
    teacher_entropy: Tensor


class Coefficients(NamedTuple):
    """What a token's terms are multiplied by before they are summed; (...) each."""

    soft: Tensor | None
    hard: Tensor | None
    z: Tensor | None  # None: z_loss is the number 0


def keep(x: Tensor, counted: Tensor | None) -> Tensor:
    """``x`` (...), and 0 for a token that does not count."""
    return x if counted is None else torch.where(counted, x, 0.0)


def token_weights(problem: Problem) -> Tensor:
    """Weight of every token, (...), the mean's denominator included and 0 where the token is dropped."""
    student = problem.student if isinstance(problem.student, Tensor) else problem.student.hidden
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    w = torch.ones(problem.leading, dtype=dtype, device=student.device)
    if problem.weights is not None:
        w = problem.weights.to(dtype)
    w = keep(w, problem.counted)
    if problem.reduction != "mean":
        return w
    if problem.num_items is not None:
        return w / problem.num_items
    total = w.sum(dtype=torch.float64).to(dtype)
    return torch.where(total != 0, w / torch.where(total != 0, total, 1.0), 0.0)


def soft_scale(problem: Problem, w: Tensor) -> Tensor | float:
    """tau^2, or 1 with ``scale_t2=False``."""
    return problem.temperature.to(dtype=w.dtype, device=w.device).square() if problem.scale_t2 else 1.0


def hard_weights(problem: Problem, w: Tensor) -> Tensor:
    """What the cross-entropy of each token counts in the loss, (...)."""
    return w * (1.0 - problem.alpha)


def coefficients(problem: Problem, w: Tensor) -> Coefficients:
    """What each term of each token counts in the loss, given the weights from :func:`token_weights`; differentiable."""
    soft = w * (problem.alpha * soft_scale(problem, w)) if problem.has_teacher else None
    hard = hard_weights(problem, w) if problem.labelled else None
    return Coefficients(soft, hard, w * problem.z_loss if problem.has_z_loss else None)


def weighted(c: Tensor, x: Tensor, reduction: str) -> Tensor:
    """Product c * x per token, or its sum; a factor of 0 silences an infinite term."""
    audible = c != 0
    if torch.is_grad_enabled():  # a factor of 0 may be learned, and its gradient is x
        audible = audible | x.isfinite()
    product = c * torch.where(audible, x, 0.0)
    return product if reduction == "none" else product.sum(dtype=torch.float64).to(product.dtype)


def assemble(problem: Problem, tokens: TokenTerms, w: Tensor) -> DistillTerms:
    """The loss and its two reported terms from the per-token values of any backend."""
    pairs = [
        (c, x) for c, x in zip(coefficients(problem, w), tokens[:3], strict=True) if c is not None and x is not None
    ]
    loss = weighted(*pairs[0], problem.reduction)
    for c, x in pairs[1:]:
        loss = loss + weighted(c, x, problem.reduction)
    return DistillTerms(loss, *reduced_terms(problem, tokens, w))


def reduced_terms(
    problem: Problem, tokens: TokenTerms, w: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Metrics | None]:
    """The reported terms, detached and reduced as the loss is, and the metrics; None where not asked for."""
    if not problem.return_terms:
        return None, None, None, None
    with torch.no_grad():
        soft, hard, z = (None if x is None else weighted(w, x, problem.reduction) for x in tokens[:3])
        return (
            None if soft is None else soft * soft_scale(problem, w),
            hard,
            None if z is None else z * problem.z_loss,
            None if tokens.observed is None else metrics_of(problem, Observed(*tokens.observed.unbind(-1))),
        )


def metrics_of(problem: Problem, seen: Observed) -> Metrics:
    """The means of what was seen of each token."""
    values = {"student_entropy": seen.student_entropy}
    if problem.has_teacher:
        values["teacher_entropy"] = seen.teacher_entropy
        if problem.kept is None or problem.kept.method not in SAMPLED:
            values["agreement"] = (seen.student_top_taught == seen.teacher_top).double()
    if problem.answers is not None:
        values["accuracy"] = (seen.student_top == problem.answers).double()  # 0 for an unlabelled token
    together = torch.stack(list(values.values()))
    if problem.counted is not None:
        together = torch.where(problem.counted, together, 0.0)
    sums = together.flatten(1).sum(1)
    counts = metric_tokens(problem)
    means = {name: sums[k] / counts[name == "accuracy"] for k, name in enumerate(values)}
    return Metrics(**{name: means[name].float() if name in means else None for name in Metrics._fields})  # type: ignore[arg-type]


def metric_tokens(problem: Problem) -> tuple[Tensor | int, Tensor | int]:
    """The tokens over which metrics are means, and those of the accuracy."""
    counted = problem.leading.numel() if problem.counted is None else problem.counted.sum()
    if problem.answers is None or not (isinstance(problem.alpha, Tensor) and problem.alpha.dim() > 0):
        return counted, counted
    labelled = problem.answers != NO_LABEL
    return counted, (labelled if problem.counted is None else labelled & problem.counted).sum()
