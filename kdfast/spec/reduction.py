"""From the terms of tokens to the loss: what the specification and the glue of every kernel share.

Weights, alpha, tau^2 and the reduction are plain PyTorch on vectors with an entry per token, so that their gradients
come from autograd whatever made the terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.spec.problem import Problem


class DistillTerms(NamedTuple):
    """The loss and its two terms, reduced alike; the terms are detached and before alpha.

    Attributes:
        loss: the value to call ``backward()`` on, nats.
        soft: reduced tau^2 * D (without tau^2 where ``scale_t2=False``); None without a teacher.
        hard: reduced CE, nats; an unlabelled token (alpha = 1 in a per-token alpha) adds 0; None without labels.
    """

    loss: Tensor
    soft: Tensor | None
    hard: Tensor | None


DistillTerms.__module__ = "kdfast"  # where it is for users, and for what they pickle


class TokenTerms(NamedTuple):
    """What every backend computes, per token (...), in nats; 0 for a dropped token; None without such a term."""

    soft: Tensor | None  # D(q, p), before tau^2 and alpha
    hard: Tensor | None  # CE(z, y), label smoothing included
    z: Tensor | None  # logsumexp(z)^2


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
    pairs = [(c, x) for c, x in zip(coefficients(problem, w), tokens, strict=True) if c is not None and x is not None]
    loss = weighted(*pairs[0], problem.reduction)
    for c, x in pairs[1:]:
        loss = loss + weighted(c, x, problem.reduction)
    return DistillTerms(loss, *reduced_terms(problem, tokens, w))


def reduced_terms(problem: Problem, tokens: TokenTerms, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The soft and the hard term, detached and before alpha, reduced as the loss is; None where not asked for."""
    if not problem.return_terms:
        return None, None
    with torch.no_grad():
        soft, hard = (None if x is None else weighted(w, x, problem.reduction) for x in tokens[:2])
        return None if soft is None else soft * soft_scale(problem, w), hard
