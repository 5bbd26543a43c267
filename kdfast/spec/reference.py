r"""Every loss in plain PyTorch: the specification, the oracle of the tests, and the fallback for any device.

With z the student's logits, t the teacher's, tau the temperature, p = softmax(z / tau) and q = softmax(t / tau), the
loss of one token is

    alpha * tau^2 * D(q, p) + (1 - alpha) * CE(z, y) + z_loss * logsumexp(z)^2

and a call returns its weighted mean, sum, or the per-token values. Arithmetic is fp32, or fp64 where the student is
fp64. Two rules run through the file. 0 log 0 = 0, in value and in gradient, so ``torch.where`` guards both branches of
what is infinite at 0. And a KL is summed as a (d + expm1(-d)), d = log a - log b, whose terms are all >= 0: the plain
form loses every digit once the two distributions are close.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.spec.divergence import Term
from kdfast.spec.head import LMHead
from kdfast.spec.packed import PackedTargets
from kdfast.spec.problem import NO_LABEL, Logits, Problem
from kdfast.spec.reduction import DistillTerms, TokenTerms, assemble, keep, token_weights
from kdfast.spec.sparse import SAMPLED, SparseTargets
from kdfast.spec.values import first_largest, readable

INF = float("inf")
#: What a teacher's tail has that ought to be there, however little its entries leave of it; of fp32 kernels, too.
LEAST_TAIL = 2.0**-120


def distill_loss(problem: Problem) -> DistillTerms:
    """The loss of a checked problem: what every backend must compute."""
    return assemble(problem, token_terms(problem), token_weights(problem))


# --- Divergences ------------------------------------------------------------------------------------------------------


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a, b) over the last axis, from log-probabilities, (..., V) -> (...), nats; +inf where only a has mass."""
    a, b = log_a.exp(), log_b.exp()
    present = ~(a == 0)  # true for NaN, which must come out again
    d = torch.where(present, log_a - log_b, 0.0)
    # a * expm1(-d) is b - a: the one keeps its digits where a and b are close, the other does not overflow
    close = d.abs() < 1
    near = a * (d + torch.expm1(-torch.where(close, d, 0.0)))
    return torch.where(present, torch.where(close, near, a * d + (b - a)), b).sum(-1)


def _log_mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """Log of share * q + (1 - share) * p; finite, as q and p have no say where their mixture underflows."""
    m = share * log_q.exp() + (1 - share) * log_p.exp()
    tiny = torch.finfo(m.dtype).tiny
    return torch.where(m < tiny, tiny, m).log()  # clamp would hide a NaN's gradient


def _alpha_divergence(log_q: Tensor, log_p: Tensor, a: float) -> Tensor:
    """(1 - sum q^a p^(1-a)) / (a (1 - a)), of terms >= 0.

    As sum q [(1 - a) g(d) - g((1 - a) d)] / (a (1 - a)) with g(x) = x + expm1(-x), d = log q - log p, near equality:
    of g's series what is left is d^2 [1/2 - (1 + b) d / 6 + (1 + b + b^2) d^2 / 24 - ...], b = 1 - a.
    """
    b, q, p = 1 - a, log_q.exp(), log_p.exp()
    d = torch.where((log_q == -INF) | (log_p == -INF), INF, log_q - log_p)
    close = d.abs() < 0.01
    e = torch.where(close, d, 0.0)
    series = 0.5 - (1 + b) * e / 6 + (1 + b + b * b) * e.square() / 24 - (1 + b) * (1 + b * b) * e**3 / 120
    near = q * e.square() * series
    far = (a * q + b * p - (a * log_q + b * log_p).exp()) / (a * b)
    return torch.where(close, near, torch.where(far < 0, 0.0, far)).sum(-1)


def divergence(term: Term, log_q: Tensor, log_p: Tensor) -> Tensor:
    """D(q, p) of one term, before its weight, from log-probabilities of teacher and student, (..., V) -> (...)."""
    x = term.parameter
    match term.name:
        case "forward_kl":
            return kl(log_q, log_p)
        case "reverse_kl":
            return kl(log_p, log_q)
        case "jsd":
            log_m = _log_mixture(log_q, log_p, x)
            return x * kl(log_q, log_m) + (1 - x) * kl(log_p, log_m)
        case "skew_forward_kl":
            return kl(log_q, _log_mixture(log_q, log_p, x))
        case "skew_reverse_kl":
            return kl(log_p, _log_mixture(log_q, log_p, 1 - x))
        case "tvd":
            difference = log_p.exp() - log_q.exp()
            # the factor is 1, or NaN where the derivative of abs, which calls the sign of NaN 0, would hide one
            return 0.5 * (difference.abs() * (1 + 0 * difference.detach())).sum(-1)
        case "alpha_div":
            return _alpha_divergence(log_q, log_p, x)
        case "hellinger":
            return 0.5 * ((0.5 * log_q).exp() - (0.5 * log_p).exp()).square().sum(-1)
    msg = f"reference: no divergence {term.name!r}"  # pragma: no cover - Divergence admits only the names above
    raise ValueError(msg)


# --- The three terms of a token ---------------------------------------------------------------------------------------


def token_terms(problem: Problem) -> TokenTerms:
    """Distillation, cross-entropy and z term of every token, differentiable in whatever requires grad."""
    dtype = torch.float64 if _dtype(problem.student) == torch.float64 else torch.float32
    z = _logits(problem.student, problem.counted, dtype)
    _check_values(problem, z)
    soft = hard = square = None
    if problem.has_teacher:
        soft = keep(_soft(problem, _heard(z, problem.alpha)[..., : problem.columns], dtype), problem.counted)
    if problem.labels is not None:
        hard = keep(_cross_entropy(problem.labels, z, problem), problem.counted)
    elif problem.probabilities is not None:
        y, log_p = smoothed_probabilities(problem, dtype), torch.log_softmax(z, -1)
        hard = keep(-torch.where(y == 0, 0.0, y * torch.where(y == 0, 0.0, log_p)).sum(-1), problem.counted)
    if problem.has_z_loss:
        square = keep(torch.logsumexp(_heard(z, problem.z_loss), -1).square(), problem.counted)
    return TokenTerms(soft, hard, square, _observed(problem, z.detach()) if problem.return_metrics else None)


def _heard(x: Tensor, factor: Tensor | float) -> Tensor:
    """Logits, (..., V), or a number for all, as (..., 1), which get no gradient from tokens whose factor is 0.

    Their term may be infinite, and 0 times its gradient NaN. The factor is a number, 0-d or (...); nobody looks at a
    tensor's value.
    """
    if not isinstance(factor, Tensor):
        return x.detach() if factor == 0 else x
    if not x.requires_grad:
        return x
    return torch.where(factor.detach().to(x.device)[..., None] != 0, x, x.detach())


def _dtype(logits: Logits) -> torch.dtype:
    return logits.dtype if isinstance(logits, Tensor) else logits.hidden.dtype


def _logits(x: Logits, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Logits in the arithmetic's dtype; those of a dropped token become 0, so that a NaN there goes nowhere."""
    z = (x.logits() if isinstance(x, LMHead) else x).to(dtype)
    return z if counted is None else torch.where(counted[..., None], z, 0.0)


def _check_values(problem: Problem, z: Tensor) -> None:
    """Raise for labels and ids that cannot be meant, where they are at hand: the others were looked at before."""
    if not readable(z):
        return
    if problem.sparse is not None:
        check_ids(problem.sparse.ids, problem.sparse.vocab_size)
    if problem.labels is not None:
        y = problem.labels if problem.counted is None else problem.labels[problem.counted]
        bad = y[(y != NO_LABEL) & ((y < 0) | (y >= z.shape[-1]))]
        if bad.numel():
            msg = f"labels must be in [0, {z.shape[-1]}) or ignore_index, got {bad[0].item()}"
            raise ValueError(msg)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids of targets, (..., K), out of range or twice in a token."""
    if ids.numel() and (int(ids.max()) >= vocab_size or int(ids.min()) < -1):
        worst = int(ids.max()) if int(ids.max()) >= vocab_size else int(ids.min())
        msg = f"teacher: ids must be in [0, {vocab_size}), or -1 beyond k_eff, got {worst}"
        raise ValueError(msg)
    ordered = ids.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(twice.any()):
        msg = f"teacher: ids hold duplicates within a token: {int(ordered[..., 1:][twice][0])} stands there twice"
        raise ValueError(msg)


def _cross_entropy(labels: Tensor, z: Tensor, problem: Problem) -> Tensor:
    """Minus (1 - e) log p_y + e mean(log p_j), p at temperature 1, over the columns whose logit is not -inf."""
    unread = labels == NO_LABEL
    if problem.counted is not None:
        unread = unread | ~problem.counted
    log_p = torch.log_softmax(z, -1)
    ce = -log_p.gather(-1, torch.where(unread, 0, labels)[..., None]).squeeze(-1)
    if problem.label_smoothing > 0:
        present = z > -INF
        mean = torch.where(present, log_p, 0.0).sum(-1) / present.sum(-1)
        ce = (1 - problem.label_smoothing) * ce - problem.label_smoothing * mean
    return torch.where(unread, 0.0, ce)


def smoothed_probabilities(problem: Problem, dtype: torch.dtype) -> Tensor:
    """Labels (..., V) as probabilities y, with their share of smoothing: (1 - e) y + e / present; 0 in dropped tokens.

    A column whose logit is -inf is not present; of an LMHead, one whose bias is.
    """
    assert problem.probabilities is not None
    y = problem.probabilities.to(dtype)
    if problem.counted is not None:
        y = torch.where(problem.counted[..., None], y, 0.0)
    e = problem.label_smoothing
    if e == 0:
        return y
    student = problem.student
    given = student if isinstance(student, Tensor) else student.bias
    present = torch.ones(y.shape[-1:], dtype=torch.bool, device=y.device) if given is None else given > -INF
    return (1 - e) * y + e * torch.where(present, 1 / present.sum(-1, keepdim=True), 0.0).to(dtype)


def _soft(problem: Problem, z: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.float64 and any(term.name == "tvd" for term in problem.terms):
        # Its gradient is a sign, which near equality fp32 would leave to rounding.
        return _soft(problem, z.double(), torch.float64).to(dtype)
    tau = _heard(problem.temperature.to(dtype=dtype, device=z.device), problem.alpha)
    log_p = torch.log_softmax(_over(z, tau), -1)
    if problem.sparse is not None:
        return sparse_divergence(problem, problem.sparse, log_p, tau)
    log_q = teacher_log_probs(problem, tau, dtype)
    return sum_terms(problem.terms, log_q, log_p)


def _over(z: Tensor, tau: Tensor) -> Tensor:
    """Logits, less the largest of their row, over the temperature, whose gradient does not see a logit of -inf.

    No softmax sees what was taken away; large logits over a small temperature would lose to rounding what sets them
    apart.
    """
    top = z.detach().amax(-1, keepdim=True)
    z = z - torch.where(top.isfinite(), top, 0.0)
    if not tau.requires_grad:
        return z / tau
    absent = z == -INF
    return torch.where(absent, -INF, torch.where(absent, 0.0, z) / tau)


def sum_terms(terms: tuple[Term, ...], log_q: Tensor, log_p: Tensor) -> Tensor:
    """The mixture: sum of weight * D over the terms, (...)."""
    total = terms[0].weight * divergence(terms[0], log_q, log_p)
    for term in terms[1:]:
        total = total + term.weight * divergence(term, log_q, log_p)
    return total


def teacher_log_probs(problem: Problem, tau: Tensor, dtype: torch.dtype) -> Tensor:
    """Log q of the teacher or the ensemble over the leading columns, (..., columns)."""
    logits = [_logits(t, problem.counted, dtype)[..., : problem.columns] for t in problem.teachers]
    logits = [_heard(t, problem.alpha) for t in logits]
    weights = problem.teacher_weights
    if weights is None:
        return torch.log_softmax(_over(logits[0], tau), -1)
    # (n, ..., 1); a teacher of weight 0 has no say, not even through a -inf
    stacked_weights = weights.to(dtype).reshape(
        weights.shape[0], *(weights.shape[1:] or [1] * (logits[0].dim() - 1)), 1
    )
    w = [_heard(wk, problem.alpha) for wk in stacked_weights]
    if problem.ensemble == "logit":
        mixed = torch.stack([torch.where(wk > 0, wk * t, 0.0) for wk, t in zip(w, logits, strict=True)]).sum(0)
        return torch.log_softmax(_over(mixed, tau), -1)
    each = [
        torch.where(wk > 0, torch.where(wk > 0, wk, 1.0).log() + torch.log_softmax(_over(t, tau), -1), -INF)
        for wk, t in zip(w, logits, strict=True)
    ]
    stacked = torch.stack(each)
    absent = (stacked == -INF).all(0)
    return torch.where(absent, -INF, torch.logsumexp(torch.where(absent, 0.0, stacked), 0))


# --- Metrics ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _observed(problem: Problem, z: Tensor) -> Tensor:
    """What metrics are made of, (..., 5) fp64, see :class:`kdfast.spec.reduction.Observed`."""
    tau = problem.temperature.to(z) if problem.has_teacher else torch.ones_like(problem.temperature).to(z)
    shared = z[..., : problem.columns]
    nothing = torch.zeros(z.shape[:-1], dtype=torch.float64, device=z.device)
    teacher_top, teacher_entropy = nothing - 2, nothing
    if problem.teachers:
        log_q = teacher_log_probs(problem, tau, z.dtype)
        teacher_top, teacher_entropy = first_largest(log_q, none=-2), entropy(log_q)
    student_entropy = entropy(torch.log_softmax(_over(shared, tau), -1))
    seen = (first_largest(z), first_largest(shared), student_entropy, teacher_top, teacher_entropy)
    return observe_kept(problem, torch.stack([x.double() for x in seen], -1), problem.columns)


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last axis, (..., V) -> (...), nats."""
    return -torch.where(log_p == -INF, 0.0, log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def observe_kept(problem: Problem, observed: Tensor, columns: int) -> Tensor:
    """``observed``, (..., 5), with what sparse targets say of their teacher, where there are some.

    ``columns``: those under the distillation term, on all ranks.
    """
    if problem.kept is None:
        return observed
    target = problem.unpacked().sparse
    assert target is not None
    rule, (ids, values, per_row) = tail_rule(problem, target), kept_entries(problem, target)
    usable = target.valid & (ids < columns)
    top = torch.full_like(observed[..., 0], -2.0)
    if rule == "drawn":
        seen = torch.zeros_like(top) if per_row is None else -per_row.double()
    else:
        log_q = torch.where(usable, values.double() / problem.temperature.to(values.device), -INF)
        if ids.shape[-1]:
            best = torch.where(usable & (log_q == log_q.amax(-1, keepdim=True)), ids.double(), INF).amin(-1)
            top = torch.where(best == INF, -2.0, best)
        if rule == "renorm":
            log_q = torch.log_softmax(log_q, -1)
        elif per_row is not None:
            log_q = log_q - per_row[..., None]
        seen = entropy(log_q)
        if rule == "bucket":
            complete = usable.sum(-1) == columns
            left = torch.where(complete, 0.0, mass_left(log_q)[..., 0].clamp(min=0.0))
            seen = seen + torch.special.entr(left)
    return torch.cat([observed[..., :3], top[..., None], seen.double()[..., None]], -1)


# --- Sparse targets ---------------------------------------------------------------------------------------------------


def sparse_divergence(problem: Problem, target: SparseTargets, log_p: Tensor, tau: Tensor) -> Tensor:
    """D between sparse targets and the student's full log-probabilities (..., V) at the same temperature, (...).

    "bucket" compares K + 1 outcomes, the kept entries and all the rest; "renorm" scales the kept entries to sum to 1;
    "zero" leaves out what was not kept. Sampled targets enter through their unbiased weights, forward KL only.
    """
    v = log_p.shape[-1]
    usable = target.valid & (target.ids < v)  # ids past a truncated vocabulary join the tail
    ids = torch.where(usable, target.ids, 0).long()
    log_p_k = torch.where(usable, log_p.gather(-1, ids), -INF)
    rule, (_, values, per_row) = tail_rule(problem, target), kept_entries(problem, target)
    complete, beside = usable.sum(-1, keepdim=True) == v, None
    if rule in WITH_TAIL:
        # the student's columns are all here, and a sum over those beside the kept ones loses nothing
        kept = torch.zeros(log_p.shape, dtype=torch.int32, device=ids.device).scatter_add(-1, ids, usable.int()) > 0
        beside = torch.logsumexp(torch.where(kept & ~complete, -INF, log_p), -1, keepdim=True)
    return kept_divergence(problem.terms, rule, values, per_row, usable, complete, log_p_k, beside, tau)


def kept_divergence(
    terms: tuple[Term, ...],
    rule: str,
    values: Tensor,
    per_row: Tensor | None,
    usable: Tensor,
    complete: Tensor,
    log_p_k: Tensor,
    beside: Tensor | None,
    tau: Tensor,
) -> Tensor:
    """The same from what it depends on, (...).

    Args:
        terms: of the mixture.
        rule: one of ``TAIL_RULES``.
        values: (..., K), of :func:`kept_entries`.
        per_row: (...) or None, of :func:`kept_entries`.
        usable: (..., K) bool, the entries that name a column.
        complete: (..., 1) bool, whether they name all.
        log_p_k: (..., K), log p of the kept columns, -inf where there is none.
        beside: (..., 1), log of the sum of p over the other columns; read by the rules in ``WITH_TAIL`` only.
        tau: the temperature, 0-d.
    """
    if rule == "drawn":
        assert per_row is not None
        mass, weight = torch.where(usable, values.to(log_p_k.dtype), 0.0), sum(t.weight for t in terms)
        return weight * (per_row - torch.where(mass > 0, mass * log_p_k, 0.0).sum(-1))
    exact = torch.where(usable, values.double() / tau, -INF)
    if rule == "renorm":
        exact = exact - torch.logsumexp(exact, -1, keepdim=True)
    elif per_row is not None:
        exact = exact - per_row[..., None]
    log_q_k = exact.to(log_p_k.dtype)
    if rule == "zero":
        d = torch.where(usable, log_q_k - log_p_k, 0.0)
        return sum(t.weight for t in terms) * torch.where(usable, log_q_k.exp() * d, 0.0).sum(-1)
    assert beside is not None
    q_tail = torch.where(complete | (rule == "renorm"), -INF, mass_left(exact).clamp(min=LEAST_TAIL).log())
    p_tail = torch.where(complete, -INF, beside.clamp(min=math.log(torch.finfo(log_p_k.dtype).tiny)))
    return sum_terms(terms, torch.cat([log_q_k, q_tail.to(log_q_k.dtype)], -1), torch.cat([log_p_k, p_tail], -1))


def mass_left(log_q_k: Tensor) -> Tensor:
    """1 - sum q of K entries, fp64 (..., K) -> (..., 1); below 0 where their rounding is larger than it.

    As what the largest lacks of 1 less the sum of the others, wherever that stands: from fp32 entries that are right to
    half a unit in the last place, within about 1e-6 (1 - the largest q). A tail below that is not in the entries.
    """
    log_q_k = torch.nn.functional.pad(log_q_k, (0, 1), value=-INF)  # there may be none
    largest, at = log_q_k.max(-1, keepdim=True)
    return -torch.expm1(largest) - log_q_k.scatter(-1, at, -INF).exp().sum(-1, keepdim=True)


#: The divergences that each rule for the tail serves.
TAIL_RULES = {
    "bucket": ("forward_kl", "jsd", "reverse_kl"),
    "renorm": ("forward_kl", "jsd"),
    "zero": ("forward_kl",),
    "drawn": ("forward_kl",),
}
#: The rules under which the columns that were not kept are an outcome.
WITH_TAIL = ("bucket", "renorm")


def tail_rule(problem: Problem, target: SparseTargets | PackedTargets) -> str:
    """What the target says of the columns that it did not keep: the problem's ``tail``, or "drawn" for sampled targets.

    Raises:
        ValueError: a divergence that is not defined under that rule.
    """
    drawn = target.method in SAMPLED
    rule = "drawn" if drawn else problem.tail
    names = {t.name for t in problem.terms}
    if not names <= set(TAIL_RULES[rule]):
        whose = f"targets of method {target.method!r} serve" if drawn else f"tail={rule!r} is defined for"
        msg = f"divergence: {whose} {', '.join(TAIL_RULES[rule])} only, got {', '.join(sorted(names))}"
        raise ValueError(msg)
    return rule


def kept_entries(problem: Problem, target: SparseTargets) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids, values, per row) of a target: log q at temperature 1 and the log-normaliser at the problem's temperature.

    None per row is 0. Of sampled targets, the weights and their negative entropy.

    Raises:
        ValueError: a temperature at which the target says nothing.
    """
    tau = problem.fixed_temperature
    if target.method in SAMPLED:  # they hold the temperature they were drawn at as the one key of lse
        drawn = next(iter(target.lse)) if target.lse else 1.0
        if tau != drawn:
            asked = "a tensor" if tau is None else f"{tau:g}"
            msg = f"temperature: sampled targets serve the temperature they were drawn at, {drawn:g}, got {asked}"
            raise ValueError(msg)
        assert target.mass is not None
        return target.ids, target.mass, target.neg_entropy
    assert target.logprobs is not None
    return target.ids, target.logprobs, captured_normaliser(problem, target)


def captured_normaliser(problem: Problem, target: SparseTargets | PackedTargets) -> Tensor | None:
    """The log-normaliser of chosen entries at the problem's temperature, (...); None where it is 0, or none is needed.

    Raises:
        ValueError: a temperature at which the target says nothing.
    """
    tau = problem.fixed_temperature
    if problem.tail == "renorm":
        return None
    if tau is None:
        msg = 'temperature: sparse targets hold fixed temperatures: pass a number, or a tensor with tail="renorm"'
        raise ValueError(msg)
    for captured, lse in (target.lse or {}).items():
        if captured == tau:
            return lse
    if tau == 1.0:
        return None
    have = ", ".join(f"{t:g}" for t in target.temperatures)
    msg = f'temperature {tau:g} was not captured in these targets; they hold {have} (tail="renorm" takes any)'
    raise ValueError(msg)
