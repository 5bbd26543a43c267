"""Labels as class probabilities, for kernels that know class indices and teachers.

With y the probabilities of a token, S their sum and p = softmax(z),

    CE(y, z) = -sum_j y_j log p_j = S KL(y / S, p) + S H(y / S),

so that a kernel's forward KL at temperature 1 against logits log y gives value and gradient; both terms are >= 0. It is
a second pass over the student's logits, and log y is a tensor of their size in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kdfast.spec.divergence import Term
from kdfast.spec.problem import Problem
from kdfast.spec.reduction import DistillTerms, hard_weights, keep, token_weights, weighted
from kdfast.spec.reference import smoothed_probabilities

_KL = Term("forward_kl", 1.0, 0.0)


def distill_loss(problem: Problem, run: Callable[[Problem], DistillTerms]) -> DistillTerms:
    """The loss of a problem whose labels are probabilities, through ``run``, which takes problems without."""
    w, hard = token_weights(problem), _cross_entropy(problem, run)
    loss = weighted(hard_weights(problem, w), hard, problem.reduction)
    others = problem.has_teacher or problem.has_z_loss
    if not others and not problem.return_metrics:
        terms = DistillTerms(loss, None, None)
    else:
        # of a call that only asks for metrics, a term of weight 0 that nobody looks at
        rest = problem if others else replace(problem, z_loss=torch.zeros((), device=w.device))
        terms = run(replace(rest, probabilities=None))
        terms = terms._replace(loss=terms.loss + loss, z=terms.z if problem.has_z_loss else None)
    if not problem.return_terms:
        return terms
    with torch.no_grad():
        return terms._replace(hard=weighted(w, hard.detach(), problem.reduction))


def _cross_entropy(problem: Problem, run: Callable[[Problem], DistillTerms]) -> Tensor:
    """Per token, (...), nats; 0 for a token that does not count."""
    y = smoothed_probabilities(problem, torch.float32)
    total = y.sum(-1)
    there = total > 0
    # a row without mass has no distribution: it is compared with an even one, and counts 0
    logits = torch.where(there[..., None], y, 1.0).log()
    divergence = run(
        replace(
            problem,
            probabilities=None,
            teachers=(logits,),
            sparse=None,
            packed=None,
            teacher_weights=None,
            terms=(_KL,),
            temperature=torch.ones((), dtype=torch.float64),
            fixed_temperature=1.0,
            alpha=1.0,
            scale_t2=False,
            weights=None,
            z_loss=0.0,
            num_items=None,
            reduction="none",
            teacher_grad=False,
            columns=problem.vocab_size,
            return_terms=False,
            return_metrics=False,
        )
    ).loss
    entropy = total * torch.special.entr(y / torch.where(there, total, 1.0)[..., None]).sum(-1)
    # where, not a product: an infinite divergence of a row without mass would be NaN
    return keep(torch.where(there | total.isnan(), total * divergence + entropy, 0.0), problem.counted)
