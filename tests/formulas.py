"""The losses written a second time, from their definitions, sharing no line with the package.

``expected`` is numpy and scipy in fp64, one token at a time: values. ``eager`` is what a person would write in PyTorch,
with log_softmax and differences of logarithms: its error is the yardstick of a kernel's. ``CASES`` names every
divergence once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, logsumexp

from kdfast import Divergence


class Case(NamedTuple):
    """A divergence as kdfast is told it, and as (name, weight, parameter) for the formulas here."""

    argument: Any
    terms: list[tuple[str, float, float]]


CASES = {
    "forward_kl": Case("forward_kl", [("forward_kl", 1.0, 0.0)]),
    "reverse_kl": Case("reverse_kl", [("reverse_kl", 1.0, 0.0)]),
    "jsd": Case("jsd", [("jsd", 1.0, 0.5)]),
    "jsd-0.2": Case(Divergence("jsd", beta=0.2), [("jsd", 1.0, 0.2)]),
    "jsd-normalized": Case(Divergence("jsd", beta=0.7, normalize=True), [("jsd", 1 / 0.21, 0.7)]),
    "skew_forward_kl": Case("skew_forward_kl", [("skew_forward_kl", 1.0, 0.1)]),
    "skew_reverse_kl": Case(Divergence("skew_reverse_kl", lam=0.3), [("skew_reverse_kl", 1.0, 0.3)]),
    "tvd": Case("tvd", [("tvd", 1.0, 0.0)]),
    "alpha_div": Case(Divergence("alpha_div", a=0.3), [("alpha_div", 1.0, 0.3)]),
    "hellinger": Case("hellinger", [("hellinger", 1.0, 0.0)]),
    "mixture": Case(
        {"forward_kl": 0.5, "tvd": 2.0, Divergence("jsd", beta=0.4): 0.25},
        [("forward_kl", 0.5, 0.0), ("tvd", 2.0, 0.0), ("jsd", 0.25, 0.4)],
    ),
}


# --- Values, numpy ----------------------------------------------------------------------------------------------------


def relative_entropy(lq, lp):
    """KL(q, p) from logarithms, which do not underflow."""
    q = np.exp(lq)
    return (q[q > 0] * (lq[q > 0] - lp[q > 0])).sum()


def divergence(name, x, lq, lp):
    """D(q, p) of two vectors of log-probabilities."""
    q, p = np.exp(lq), np.exp(lp)

    def mixture(share):  # log of share q + (1 - share) p
        return np.logaddexp(np.log(share) + lq, np.log1p(-share) + lp)

    match name:
        case "forward_kl":
            return relative_entropy(lq, lp)
        case "reverse_kl":
            return relative_entropy(lp, lq)
        case "jsd":
            return x * relative_entropy(lq, mixture(x)) + (1 - x) * relative_entropy(lp, mixture(x))
        case "skew_forward_kl":
            return relative_entropy(lq, mixture(x))
        case "skew_reverse_kl":
            return relative_entropy(lp, mixture(1 - x))
        case "tvd":
            return np.abs(p - q).sum() / 2
        case "alpha_div":
            return (1 - (q**x * p ** (1 - x)).sum()) / (x * (1 - x))
        case "hellinger":
            return 1 - np.sqrt(p * q).sum()
    raise ValueError(name)


def mixed(terms, lq, lp):
    return sum(weight * divergence(name, x, lq, lp) for name, weight, x in terms)


def _array(x):
    return (
        None if x is None else np.asarray(x.detach().double().cpu()) if isinstance(x, torch.Tensor) else np.asarray(x)
    )


def _teacher(teachers, weights, ensemble, tau, token, columns):
    """log q of one token."""
    logits = [t[token][:columns] / tau for t in teachers]
    w = np.ones(len(logits)) if weights is None else np.array([wk if wk.ndim == 0 else wk[token] for wk in weights])
    used = [(wk, t) for wk, t in zip(w / w.sum(), logits, strict=True) if wk > 0]
    if ensemble == "logit":
        return log_softmax(sum(wk * t for wk, t in used))
    return logsumexp([np.log(wk) + log_softmax(t) for wk, t in used], axis=0)


class Token(NamedTuple):
    soft: float  # tau^2 D, or D
    hard: float
    loss: float  # before its weight
    z: float


def expected_token(z, lq, y, *, terms, temperature, alpha, scale_t2, label_smoothing, z_loss, columns):
    soft = hard = 0.0
    if lq is not None:
        lp = log_softmax(z[:columns] / temperature)
        soft = mixed(terms, lq, lp) * (temperature**2 if scale_t2 else 1.0)
    if y is not None:
        present = z > -np.inf
        target = np.where(present, label_smoothing / present.sum(), 0.0)
        target[y] += 1 - label_smoothing
        log_p = log_softmax(z)
        hard = -sum(t * l for t, l in zip(target, log_p, strict=True) if t > 0)
    z2 = z_loss * logsumexp(z) ** 2 if z_loss else 0.0
    return Token(soft, hard, (alpha * soft if alpha else 0) + ((1 - alpha) * hard if alpha < 1 else 0) + z2, z2)


def expected(
    student,
    teacher=None,
    labels=None,
    *,
    terms=(("forward_kl", 1.0, 0.0),),
    temperature=1.0,
    alpha=None,
    scale_t2=True,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    weights=None,
    reduction="mean",
    num_items=None,
    teacher_weights=None,
    ensemble="prob",
):
    """(loss, soft, hard, z) in fp64, as ``return_terms=True`` reports them; 0 stands where there is no such term."""
    z, y, w = _array(student), _array(labels), _array(weights)
    teachers = [] if teacher is None else teacher if isinstance(teacher, list) else [teacher]
    teachers = [_array(t) for t in teachers]
    v = z.shape[-1]
    columns = min([v, *(t.shape[-1] for t in teachers)])
    if alpha is None:
        alpha = 0.5 if teachers and y is not None else 1.0 if teachers else 0.0
    a = np.broadcast_to(np.asarray(_array(alpha), dtype=float), z.shape[:-1])
    w = np.ones(z.shape[:-1]) if w is None else w.astype(float)
    tw = None if teacher_weights is None else list(_array(teacher_weights))
    out, total = np.zeros((4, *z.shape[:-1])), 0.0
    for token in np.ndindex(*z.shape[:-1]):
        if w[token] == 0 or (y is not None and y[token] == ignore_index):
            continue
        total += w[token]
        lq = _teacher(teachers, tw, ensemble, temperature, token, columns) if teachers else None
        label = None if y is None or (np.ndim(_array(alpha)) > 0 and a[token] == 1) else int(y[token])
        got = expected_token(
            z[token],
            lq,
            label,
            terms=terms,
            temperature=temperature,
            alpha=a[token],
            scale_t2=scale_t2,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            columns=columns,
        )
        out[(slice(None), *token)] = w[token] * np.array([got.loss, got.soft, got.hard, got.z])
    if reduction == "none":
        return tuple(out)
    sums = out.reshape(4, -1).sum(1)
    if reduction == "mean":
        total = total if num_items is None else num_items
        sums = sums / total if total else sums
    return tuple(sums)


def reported(terms):
    """The terms that ``return_terms=True`` gave in the order of :func:`expected`; 0 where there is no such term."""
    return [np.zeros_like(terms.loss.detach().numpy()) if x is None else x.detach().numpy() for x in terms[:4]]


def pairs_of(got, want):
    """Two reports term by term, the metrics among them; both have the same."""
    for a, b in zip((*got[:4], *(got.metrics or ())), (*want[:4], *(want.metrics or ())), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            yield a.detach(), b.detach()


# --- What a person would write in PyTorch -----------------------------------------------------------------------------


def eager_divergence(name, x, lq, lp):
    q, p = lq.exp(), lp.exp()
    match name:
        case "forward_kl":
            return (q * (lq - lp)).sum(-1)
        case "reverse_kl":
            return (p * (lp - lq)).sum(-1)
        case "jsd":
            lm = (x * q + (1 - x) * p).log()
            return x * (q * (lq - lm)).sum(-1) + (1 - x) * (p * (lp - lm)).sum(-1)
        case "skew_forward_kl":
            return (q * (lq - (x * q + (1 - x) * p).log())).sum(-1)
        case "skew_reverse_kl":
            return (p * (lp - ((1 - x) * q + x * p).log())).sum(-1)
        case "tvd":
            return 0.5 * (p - q).abs().sum(-1)
        case "alpha_div":
            return (1 - (x * lq + (1 - x) * lp).exp().sum(-1)) / (x * (1 - x))
        case "hellinger":
            return 1 - (0.5 * (lq + lp)).exp().sum(-1)
    raise ValueError(name)


def eager_teacher(teacher, temperature, teacher_weights=None, ensemble="prob"):
    """Log q of a teacher, or of a list of them."""
    teachers = teacher if isinstance(teacher, list) else [teacher]
    if len(teachers) == 1:
        return F.log_softmax(teachers[0] / temperature, -1)
    w = torch.ones(len(teachers)) if teacher_weights is None else teacher_weights
    w = (w / w.sum(0)).reshape(len(teachers), *(w.shape[1:] or [1] * (teachers[0].dim() - 1)), 1).to(teachers[0].dtype)
    if ensemble == "logit":
        return F.log_softmax(sum(wk * t for wk, t in zip(w, teachers, strict=True)) / temperature, -1)
    return sum(wk * F.softmax(t / temperature, -1) for wk, t in zip(w, teachers, strict=True)).log()


def untie(student, teacher, *, temperature=1.0, teacher_weights=None, ensemble="prob"):
    """The student's logits, moved by 1/4 where p and q agree to 4e-6: the total variation's gradient jumps there.

    On which side they are, ops/test_total_variation.py asks of one teacher. The mixture of an ensemble's distributions
    is known to fp32 alone, and one column in a few million is that close.
    """
    teachers = [t.double() for t in teacher] if isinstance(teacher, list) else teacher.double()
    lq = eager_teacher(teachers, temperature, teacher_weights, ensemble)
    columns = min(student.shape[-1], lq.shape[-1])
    for _ in range(3):  # a moved column moves the others a little
        lp = F.log_softmax(student[..., :columns].double() / temperature, -1)
        tied = (F.log_softmax(lq[..., :columns], -1) - lp).abs() < 4e-6
        student = torch.cat(
            [torch.where(tied, student[..., :columns] + 0.25, student[..., :columns]), student[..., columns:]], -1
        )
    return student


def balanced(student, teacher, temperature, chosen, apart):
    """The teacher's logits, fp64, the chosen ones moved to where ln p - ln q is -apart / temperature."""
    for _ in range(30):  # a moved column moves the level
        levels = [temperature * torch.logsumexp(x / temperature, -1, keepdim=True) for x in (student, teacher)]
        teacher = torch.where(chosen, student - levels[0] + levels[1] + apart, teacher)
    return teacher


def eager(
    student,
    teacher=None,
    labels=None,
    *,
    terms=(("forward_kl", 1.0, 0.0),),
    temperature=1.0,
    alpha=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    weights=None,
    teacher_weights=None,
    ensemble="prob",
):
    """w * loss of every token in the dtype of ``student``: log_softmax, differences of logarithms, F.cross_entropy."""
    loss = torch.zeros(student.shape[:-1], dtype=student.dtype)
    if alpha is None:
        alpha = 0.5 if teacher is not None and labels is not None else 1.0 if teacher is not None else 0.0
    if teacher is not None:
        lp = F.log_softmax(student / temperature, -1)
        lq = eager_teacher(teacher, temperature, teacher_weights, ensemble)
        soft = sum(weight * eager_divergence(name, x, lq, lp) for name, weight, x in terms)
        loss = loss + alpha * temperature**2 * soft
    if labels is not None:
        if isinstance(alpha, torch.Tensor):
            labels = torch.where((alpha == 1) & (labels != ignore_index), 0, labels)
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
        ce = F.cross_entropy(student.flatten(0, -2), labels.flatten(), **options)
        loss = loss + (1 - alpha) * ce.view(labels.shape)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(student, -1).square()
    if weights is not None:
        loss = loss * weights
    return loss if labels is None else torch.where(labels == ignore_index, 0.0, loss)


def half_ulp(x, dtype):
    """Half the distance between neighbours of ``dtype`` at x: the error of rounding to it."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(min=info.tiny)).exponent - 1
    return 0.5 * info.eps * torch.exp2(exponent.double())
