"""The response losses against loops in fp64 written from their papers, and what holds of all of them."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from machine import TRITON
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import pearsonr
from torch import nn

from kdfast import Distiller, distill_loss
from kdfast.methods import KD
from kdfast.methods.response import (
    DIST,
    DKD,
    NKD,
    TTM,
    WTTM,
    AdaptiveKL,
    CrossEntropy,
    LearnedTemperature,
    LogitStandardisation,
    adaptive_kl_loss,
    dist_loss,
    dkd_loss,
    nkd_loss,
    standardised_loss,
    ttm_loss,
)

V = 7

# --- The definitions: one token at a time, probabilities multiplied out -----------------------------------------------


def kl(q, p):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True) if a > 0)


def dkd(z, t, y, alpha=1.0, beta=8.0, temperature=4.0):
    p, q = softmax(z / temperature), softmax(t / temperature)
    target = kl([q[y], 1 - q[y]], [p[y], 1 - p[y]])
    r_p, r_q = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
    return temperature**2 * (alpha * target + beta * kl(r_q, r_p))


def nkd(z, t, y, gamma=1.5, temperature=1.0):
    p, q = softmax(np.delete(z, y) / temperature), softmax(np.delete(t, y) / temperature)
    cross = -sum(b * math.log(a) for a, b in zip(p, q, strict=True))
    return -softmax(t)[y] * math.log(softmax(z)[y]) + gamma * temperature**2 * cross


def standardised(z, t, y, temperature=2.0):
    z, t = ((x - x.mean()) / (x.std(ddof=1) + 1e-7) for x in (z, t))
    return temperature**2 * kl(softmax(t / temperature), softmax(z / temperature))


def ttm(z, t, y, gamma=0.1):
    power = softmax(t) ** gamma
    return kl(power / power.sum(), softmax(z))


def wttm(z, t, y, gamma=0.1):
    return (softmax(t) ** gamma).sum() * ttm(z, t, y, gamma)


def shares(z, t, head=0.5, temperature=1.0):
    p, q = softmax(z / temperature), softmax(t / temperature)
    mass, kept = 0.0, []
    for j in sorted(range(len(q)), key=lambda j: -q[j]):
        if mass >= head:
            break
        mass += q[j]
        kept.append(j)
    gap = np.abs(q - p)
    return gap[kept].sum() / gap.sum()


def adaptive(z, t, y, head=0.5, temperature=1.0):
    p, q, share = softmax(z / temperature), softmax(t / temperature), shares(z, t, head, temperature)
    return temperature**2 * (share * kl(q, p) + (1 - share) * kl(p, q))


def dist(z, t, w, beta=1.0, gamma=1.0, temperature=1.0):
    """Of a matrix; weights are repetitions."""
    p, q = (np.repeat(softmax(x / temperature, -1), w, 0) for x in (z, t))
    rows = np.mean([1 - pearsonr(a, b)[0] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - pearsonr(a, b)[0] for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * rows + gamma * columns)


#: name: (function, definition per token, class, other options, whether it needs labels)
METHODS = {
    "dkd": (dkd_loss, dkd, DKD, {"alpha": 0.7, "beta": 3.0, "temperature": 1.6}, True),
    "nkd": (nkd_loss, nkd, NKD, {"gamma": 0.4, "temperature": 2.2}, True),
    "standardised": (standardised_loss, standardised, LogitStandardisation, {"temperature": 0.8}, False),
    "ttm": (ttm_loss, ttm, TTM, {"gamma": 0.6}, False),
    "wttm": (lambda *a, **k: ttm_loss(*a, weighted=True, **k), wttm, WTTM, {"gamma": 0.6}, False),
    "adaptive_kl": (adaptive_kl_loss, adaptive, AdaptiveKL, {"head": 0.8, "temperature": 1.7}, False),
}
BY_TOKEN = pytest.mark.parametrize("name", METHODS)
EVERY = pytest.mark.parametrize("name", [*METHODS, "dist"])


def function(name):
    return dist_loss if name == "dist" else METHODS[name][0]


def loss_class(name):
    return DIST if name == "dist" else METHODS[name][2]


def data(*leading, dtype=torch.float64, scale=2.0, v=V):
    student = (scale * torch.randn(*leading, v)).to(dtype).requires_grad_()
    return student, (scale * torch.randn(*leading, v)).to(dtype), torch.randint(0, v, leading)


def exact(student, teacher, labels, name, **options):
    """The loss of every token, (...)."""
    z, t = (x.detach().double().numpy().reshape(-1, x.shape[-1]) for x in (student, teacher))
    values = [METHODS[name][1](a, b, int(y), **options) for a, b, y in zip(z, t, labels.reshape(-1), strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(labels.shape)


def make(name, **options):
    return loss_class(name)(**options)


# --- Values and gradients ---------------------------------------------------------------------------------------------

fp64 = pytest.mark.skipif(TRITON, reason="fp64 is not the Triton backend's")


@fp64
@BY_TOKEN
@pytest.mark.parametrize("own", [False, True], ids=["defaults", "options"])
def test_values_are_the_definitions(name, own):
    student, teacher, labels = data(3, 4)
    options = METHODS[name][3] if own else {}
    expected = exact(student, teacher, labels, name, **options)
    for reduction, target in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        got = function(name)(student, teacher, labels, reduction=reduction, **options)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, target, rtol=1e-9, atol=1e-11)


@fp64
@pytest.mark.parametrize("options", [{}, {"beta": 2.0, "gamma": 0.5, "temperature": 3.0}], ids=["defaults", "options"])
def test_dist_is_scipys_correlations(options):
    student, teacher, _ = data(2, 5)
    z, t = (x.detach().reshape(-1, V).numpy() for x in (student, teacher))
    repeats = np.random.default_rng(torch.randint(0, 2**31, ()).item()).integers(1, 4, 10)
    weights = torch.tensor(repeats, dtype=torch.float64).reshape(2, 5)
    got = dist_loss(student, teacher, **options)
    torch.testing.assert_close(got.item(), dist(z, t, np.ones(10, int), **options), rtol=1e-9, atol=1e-11)
    # a weight is so many repetitions of its token
    got = dist_loss(student, teacher, weights=weights, **options)
    torch.testing.assert_close(got.item(), dist(z, t, repeats, **options), rtol=1e-9, atol=1e-11)


@fp64
@EVERY
def test_gradients_are_the_slopes(name):
    student, teacher, labels = data(2, 3)
    weights = torch.rand(2, 3, dtype=torch.float64) + 0.1
    options = {} if name in {"dkd", "nkd"} else {"alpha": 0.6}
    # the shares of adaptive KL carry no gradient: what it is the gradient of has them fixed
    if name == "adaptive_kl":
        z, t = (x.detach().reshape(-1, V).numpy() for x in (student, teacher))
        share = torch.tensor([shares(a, b) for a, b in zip(z, t, strict=True)]).reshape(2, 3)
        w = weights / weights.sum()
        (got,) = torch.autograd.grad(adaptive_kl_loss(student, teacher, weights=weights), student)
        fixed = lambda x: sum(  # noqa: E731
            distill_loss(x, teacher, divergence=d, weights=w * s, reduction="sum")
            for d, s in (("forward_kl", share), ("reverse_kl", 1 - share))
        )
        torch.testing.assert_close(got, torch.autograd.grad(fixed(student), student)[0], rtol=1e-9, atol=1e-12)
        assert torch.autograd.gradcheck(fixed, student)
        return
    assert torch.autograd.gradcheck(lambda x: function(name)(x, teacher, labels, weights=weights, **options), student)


@fp64
@pytest.mark.parametrize("name", ["dkd", "nkd", "standardised", "dist"])
def test_gradient_of_the_temperature(name):
    student, teacher, labels = data(2, 3)
    student = student.detach()
    tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(name)(student, teacher, labels, temperature=x), tau)


@pytest.mark.parametrize("name", ["dkd", "standardised", "adaptive_kl", "dist"])
def test_zero_where_the_models_are_equal(name):
    student, _, labels = data(3, 4, dtype=torch.float32, scale=5.0)
    loss = function(name)(student, student.detach().clone(), labels)
    loss.backward()
    assert 0 <= loss.item() < 1e-6
    assert student.grad.abs().max() < 1e-5


def test_values_at_equality_that_are_not_zero():
    student, _, labels = data(5, dtype=torch.float32)
    z = student.detach()
    q = softmax(z.double().numpy(), -1)
    entropies = []
    for row, y in zip(q, labels.tolist(), strict=True):
        rest = np.delete(row, y) / (1 - row[y])
        entropies.append(-row[y] * math.log(row[y]) - 1.5 * (rest * np.log(rest)).sum())
    assert nkd_loss(z, z, labels).item() == pytest.approx(np.mean(entropies), rel=1e-5)
    assert ttm_loss(z, z).item() > 1e-3
    assert abs(ttm_loss(z, 10 * z).item()) < 1e-6  # at student = gamma * teacher


def test_wttm_divides_by_the_tokens_and_not_by_their_z():
    student, teacher, labels = data(6, dtype=torch.float32)
    weights = torch.rand(6) + 0.1
    values = exact(student, teacher, labels, "wttm")
    expected = (weights.double() * values).sum() / weights.double().sum()
    got = ttm_loss(student, teacher, weighted=True, weights=weights)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


# --- Numerics ---------------------------------------------------------------------------------------------------------


def sure(z, t, y, temperature):
    """DKD's part of the label from log-odds, in fp64."""

    def odds(x):
        return x[y] / temperature - logsumexp(np.delete(x, y) / temperature)

    a, b = odds(z), odds(t)
    q, not_q = 1 / (1 + math.exp(-b)), 1 / (1 + math.exp(b))
    log = lambda x: -np.logaddexp(0.0, -x)  # noqa: E731
    return q * (log(b) - log(a)) + not_q * (log(-b) - log(-a))


def test_dkd_of_teachers_that_are_sure_of_the_label():
    v = 2000
    student, teacher, labels = data(4, dtype=torch.float32, v=v)
    with torch.no_grad():
        student[torch.arange(4), labels] += 22.0
        teacher[torch.arange(4), labels] += 30.0
    got = dkd_loss(student, teacher, labels, beta=0.0, temperature=1.0, reduction="none")
    z, t = (x.detach().double().numpy() for x in (student, teacher))
    expected = torch.tensor([sure(a, b, y, 1.0) for a, b, y in zip(z, t, labels.tolist(), strict=True)])
    # a plain 1 - p is 0 here
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=0.0)
    got.sum().backward()
    p_not, q_not = (
        np.array([1 - 1 / (1 + math.exp(-o)) if o < 0 else math.exp(-o) / (1 + math.exp(-o)) for o in odds])
        for odds in (
            [a[y] - logsumexp(np.delete(a, y)) for a, y in zip(x, labels.tolist(), strict=True)] for x in (z, t)
        )
    )
    slope = student.grad[torch.arange(4), labels].double()
    torch.testing.assert_close(slope, torch.tensor(q_not - p_not), rtol=2e-3, atol=0.0)


def test_dist_of_a_vocabulary_whose_probabilities_have_no_squares():
    student, teacher, _ = data(6, dtype=torch.float32)
    with torch.no_grad():
        student[:, 3] -= 60.0
        teacher[:, 3] -= 60.0
    z, t = (x.detach().double().numpy() for x in (student, teacher))
    assert dist_loss(student, teacher).item() == pytest.approx(dist(z, t, np.ones(6, int)), rel=1e-4)


def test_dist_of_what_is_constant():
    x = torch.randn(1, V, requires_grad=True)
    loss = dist_loss(x, x.detach(), beta=0.0)  # one token: every column is constant
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()
    flat = torch.full((4, V), 0.3, requires_grad=True)
    loss = dist_loss(flat, torch.randn(4, V), gamma=0.0)
    loss.backward()
    assert loss.item() == 1
    assert (flat.grad == 0).all()


def test_standardisation_sees_no_shift_no_scale_and_no_absent_column():
    student, teacher, _ = data(5, dtype=torch.float32)
    plain_loss = standardised_loss(student, teacher)
    torch.testing.assert_close(standardised_loss(4 * student + 3, 0.5 * teacher - 1), plain_loss, rtol=1e-4, atol=1e-6)
    absent = torch.full((5, 2), -math.inf)
    padded = standardised_loss(torch.cat([student, absent], -1), torch.cat([teacher, absent], -1))
    torch.testing.assert_close(padded, plain_loss, rtol=1e-5, atol=1e-7)
    padded.backward()
    assert student.grad.isfinite().all()
    equal = torch.zeros(5, V, requires_grad=True)
    standardised_loss(equal, teacher).backward()
    assert equal.grad.isfinite().all()


@pytest.mark.parametrize("name", ["dkd", "nkd", "ttm", "wttm", "adaptive_kl"])
def test_a_padded_vocabulary_changes_nothing(name):
    student, teacher, labels = data(5, dtype=torch.float32)
    absent = torch.full((5, 3), -math.inf)
    got = function(name)(torch.cat([student, absent], -1), torch.cat([teacher, absent], -1), labels)
    torch.testing.assert_close(got, function(name)(student, teacher, labels), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(got, student)
    assert grad.isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(name, dtype):
    student, teacher, labels = data(4, 3, dtype=dtype)
    got = function(name)(student, teacher, labels)
    wide = student.detach().float().requires_grad_()
    expected = function(name)(wide, teacher.float(), labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.backward()
    expected.backward()
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.float(), wide.grad, rtol=0.02, atol=5e-4)


# --- Tokens that do not count, teachers, blending ---------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("how", ["labels", "weights"])
def test_what_is_dropped_reaches_neither_value_nor_gradient(name, how):
    student, teacher, labels = data(6, dtype=torch.float32)
    drop = torch.tensor([False, True, False, False, True, False])
    expected = function(name)(student[~drop], teacher[~drop], labels[~drop])
    (slope,) = torch.autograd.grad(expected, student)
    with torch.no_grad():
        student[drop], teacher[drop] = math.nan, math.inf
    given = {"labels": torch.where(drop, -100, labels)}
    if how == "weights":
        given = {"labels": torch.where(drop, 10**6, labels), "weights": (~drop).float()}
    got = function(name)(student, teacher, **given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.backward()
    assert (student.grad[drop] == 0).all()
    torch.testing.assert_close(student.grad, slope, rtol=1e-4, atol=1e-6)


@EVERY
def test_no_token_that_counts_is_a_loss_of_zero(name):
    student, teacher, labels = data(3, dtype=torch.float32)
    loss = function(name)(student, teacher, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


@EVERY
def test_a_nan_that_counts_comes_out(name):
    student, teacher, labels = data(4, dtype=torch.float32)
    for spoilt in (student, teacher):
        copy = spoilt.detach().clone()
        copy[1, 2] = math.nan
        pair = (copy, teacher) if spoilt is student else (student, copy)
        assert function(name)(*pair, labels).isnan()


@EVERY
def test_teachers_get_no_gradient(name):
    student, teacher, labels = data(4, dtype=torch.float32)
    teacher.requires_grad_()
    function(name)(student, teacher, labels).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["standardised", "ttm", "wttm", "adaptive_kl", "dist"])
def test_blending_with_the_labels(name):
    student, teacher, labels = data(6, dtype=torch.float32)
    labels[2] = -100
    weights = torch.rand(6) + 0.1
    z, kept = student.detach().double().numpy(), (labels != -100).numpy()
    ce = np.array([-log_softmax(row)[y] if y >= 0 else 0.0 for row, y in zip(z, labels.tolist(), strict=True)])
    w = weights.double().numpy() * kept
    soft = function(name)(student, teacher, labels, weights=weights).item()
    got = function(name)(student, teacher, labels, alpha=0.3, weights=weights).item()
    assert got == pytest.approx(0.3 * soft + 0.7 * (w * ce).sum() / w.sum(), rel=1e-4)
    with pytest.raises(ValueError, match="alpha must be 1 without labels"):
        function(name)(student, teacher, alpha=0.3)


# --- Through a Distiller ----------------------------------------------------------------------------------------------


def models():
    return nn.Linear(3, V), nn.Linear(3, V)


@EVERY
def test_in_a_distiller(name):
    student, teacher = models()
    x, labels = 2 * torch.randn(8, 3), torch.randint(0, V, (8,))
    labels[3] = -100
    method = make(name)
    with Distiller(student, teacher, [CrossEntropy(weight=0.5), method]) as d:
        loss, terms = d((x, labels))
        loss.backward()
    with torch.no_grad():
        expected = function(name)(student(x), teacher(x), labels)
    torch.testing.assert_close(terms[method.name], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, 0.5 * terms["ce"] + method.weight * terms[method.name])
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_what_is_logged():
    student, teacher = models()
    batch = (torch.randn(8, 3), torch.randint(0, V, (8,)))
    with Distiller(student, teacher, [DKD(alpha=0.5), NKD(), DIST(beta=2.0)]) as d:
        _, terms = d(batch)
    torch.testing.assert_close(terms["dkd"], 0.5 * terms["dkd.target"] + 8 * terms["dkd.others"])
    torch.testing.assert_close(terms["nkd"], terms["nkd.target"] + 1.5 * terms["nkd.others"])
    torch.testing.assert_close(terms["dist"], 2 * terms["dist.rows"] + terms["dist.columns"])


@BY_TOKEN
def test_micro_batches_add_up_to_the_batch(name):
    student, teacher = models()
    x, labels = 2 * torch.randn(9, 3), torch.randint(0, V, (9,))
    labels[4] = -100
    whole, parts = [], []
    with Distiller(student, teacher, [make(name)]) as d:
        d((x, labels))[0].backward()
        whole = [p.grad.clone() for p in student.parameters()]
        student.zero_grad()
        for rows in (slice(0, 2), slice(2, 6), slice(6, 9)):
            d((x[rows], labels[rows]), num_items=8)[0].backward()
        parts = [p.grad for p in student.parameters()]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_label_free_batches():
    student, teacher = models()
    losses = [LogitStandardisation(alpha=0.5), TTM(alpha=0.5), WTTM(), AdaptiveKL(), DIST()]
    with Distiller(student, teacher, losses) as d:
        loss, _ = d(torch.randn(5, 3))
        loss.backward()
    assert loss.isfinite()
    for method in (DKD(), NKD()):
        with Distiller(student, teacher, [method]) as d, pytest.raises(ValueError, match="needs labels"):
            d(torch.randn(5, 3))


def test_under_autocast_values_are_those_of_fp32():
    student, teacher, labels = data(5, dtype=torch.float32)
    for name in [*METHODS, "dist"]:
        expected = function(name)(student, teacher, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = function(name)(student, teacher, labels)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["dkd", "nkd", "standardised", "adaptive_kl", "dist"])
def test_a_learned_temperature_is_a_temperature(name):
    student, teacher = models()
    with Distiller(student, teacher, [make(name, temperature=LearnedTemperature())]) as d:
        d((torch.randn(8, 3), torch.randint(0, V, (8,))))[0].backward()
        (theta,) = d.parameters()
    assert theta.grad.isfinite()
    assert theta.grad != 0


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DKD(alpha=-1.0), ValueError, "alpha must be >= 0 and finite, got -1.0"),
        (lambda: DKD(beta=math.inf), ValueError, "beta must be >= 0 and finite"),
        (lambda: DKD(temperature=0.0), ValueError, "temperature must be > 0"),
        (lambda: NKD(gamma="much"), TypeError, "gamma must be a number"),
        (lambda: TTM(gamma=0), ValueError, "gamma must be > 0"),
        (lambda: WTTM(alpha=1.5), ValueError, "alpha must be >= 0 and <= 1"),
        (lambda: AdaptiveKL(head=0.0), ValueError, "head must be > 0 and <= 1"),
        (lambda: DIST(gamma=-0.1), ValueError, "gamma must be >= 0"),
        (lambda: LogitStandardisation(divergence="kl"), ValueError, "divergence"),
        (lambda: KD(temperature=-1.0), ValueError, "temperature must be > 0"),
        (lambda: KD(alpha="all"), TypeError, "alpha must be a number"),
        (lambda: TTM(weight=math.nan), ValueError, "weight must be a finite number, got nan"),
    ],
)
def test_wrong_arguments_raise_at_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


@EVERY
def test_wrong_tensors_raise(name):
    student, teacher, labels = data(4, dtype=torch.float32)
    loss = function(name)
    with pytest.raises(ValueError, match="teacher has 6 columns, student 7"):
        loss(student, teacher[:, :-1], labels)
    with pytest.raises(ValueError, match="labels must have the student's leading axes"):
        loss(student, teacher, labels[:-1])
    with pytest.raises(TypeError, match=r"student must be a tensor of logits .* pass student.logits"):
        loss(SimpleNamespace(logits=student), teacher, labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
        loss(student, teacher, torch.full((4,), V))


@pytest.mark.parametrize("name", ["dkd", "nkd", "standardised"])
def test_one_column_is_too_few(name):
    with pytest.raises(ValueError, match=r"1 column.*mse_loss"):
        function(name)(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


@EVERY
def test_tokens_without_leading_axes(name):
    student, teacher, labels = data(dtype=torch.float32)
    loss = function(name)(student, teacher, labels)
    torch.testing.assert_close(loss, function(name)(student[None], teacher[None], labels[None]))


# --- The documentation runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["adaptive_kl", "dist", "dkd", "nkd", "standardised", "temperature", "ttm"])
def test_docstring_examples(module):
    found = doctest.testmod(importlib.import_module(f"kdfast.methods.response.{module}"), extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


def test_the_page_runs():
    page = Path(__file__).parents[2] / "docs" / "methods-response.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    scope = {}
    exec(block, scope)
    assert scope["loss"].isfinite()
    assert {"ce", "dkd", "dkd.others", "kd", "kd.soft", "loss"} <= scope["terms"].keys()
