"""Metrics for the training log, against numpy in fp64, on every backend; and that asking for them changes nothing."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from machine import INTERPRETING, KERNEL, TRACES
from scipy.special import log_softmax, logsumexp

import kdfast
from kdfast import LMHead, Metrics, SparseTargets, distill_loss, soft_targets

N, V = (6, 140) if INTERPRETING else (11, 2500)  # more than a tile, and not a multiple of one
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def entropy(log_p):
    p = np.exp(log_p)
    return -np.where(p == 0, 0.0, p * np.where(p == 0, 0.0, log_p)).sum(-1)


def array(x):
    """In fp64, where numpy can see it."""
    return x.detach().double().cpu().numpy()


def truth(z, log_q, y=None, *, tau=1.0, counted=None, labelled=None, columns=None):
    """From logits and the teacher's log-probabilities, (N, V) fp64; numpy's argmax takes the lowest column."""
    counted = np.ones(len(z), dtype=bool) if counted is None else array(counted).astype(bool)
    shared = z[:, :columns]
    out = {"student_entropy": entropy(log_softmax(shared / tau, -1))[counted].mean()}
    if log_q is not None:
        out["teacher_entropy"] = entropy(log_q)[counted].mean()
        out["agreement"] = (shared.argmax(-1) == log_q.argmax(-1))[counted].mean()
    if y is not None:
        of = counted if labelled is None else counted & array(labelled).astype(bool)
        out["accuracy"] = (z.argmax(-1) == array(y))[of].mean()
    return out


def check(got, want):
    for name, x in got._asdict().items():
        assert (x is None) == (name not in want), name
        if x is not None:
            assert x.dtype == torch.float32
            assert x.dim() == 0
            assert not x.requires_grad
            # a share is a count over a count; entropies are sums of fp32
            np.testing.assert_allclose(x.item(), want[name], rtol=2e-6, atol=1e-7 if "entropy" not in name else 2e-5)


def drawn(dtype=torch.float32, v=V, *, n=N):
    """Logits of student and teacher that agree on some tokens, and labels that the student knows of some."""
    z, t = (3 * torch.randn(n, v)).to(dtype), (3 * torch.randn(n, v)).to(dtype)
    t[: n // 2, z[: n // 2].argmax(-1)] = 20.0
    y = torch.randint(v, (n,))
    y[1::3] = z[1::3].float().argmax(-1)
    return z, t, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", {"tvd": 0.5, "jsd": 0.5}], ids=str)
@pytest.mark.parametrize("needs_grad", [True, False])
def test_by_formula(backend, dtype, tau, divergence, needs_grad):
    z, t, y = drawn(dtype)
    want = truth(array(z), log_softmax(array(t) / tau, -1), y, tau=tau)
    options = {"divergence": divergence, "temperature": tau, "backend": backend}
    terms = distill_loss(z.requires_grad_(needs_grad), t, y, return_metrics=True, **options)
    check(terms.metrics, want)
    assert isinstance(terms.metrics, Metrics)
    plain = distill_loss(z, t, y, return_terms=True, **options)
    assert plain.metrics is None
    for a, b in zip(terms[:3], plain[:3], strict=True):
        assert torch.equal(a, b)
    if needs_grad:
        (g,), (h,) = (torch.autograd.grad(x.loss, z) for x in (terms, plain))
        assert torch.equal(g, h)


@pytest.mark.parametrize("columns", [2, 3, 17, 127, 129, 1024, 1025])
def test_odd_rows_and_ties(backend, columns):
    """Ties go to the lowest column, wherever in a vector, a tile or a row they stand."""
    z, t = torch.randn(N, columns), torch.randn(N, columns)
    for i in range(N):
        for x in (z, t):
            at = torch.randint(columns, (2,))
            x[i, at] = 9.0
    y = torch.tensor(array(z).argmax(-1))
    terms = distill_loss(z, t, y, temperature=2.0, return_metrics=True, backend=backend)
    check(terms.metrics, truth(array(z), log_softmax(array(t) / 2, -1), y, tau=2.0))
    assert terms.metrics.accuracy == 1


def test_levels_and_absent_columns(backend):
    """Large logits, columns of -inf and a maximum that comes late: the entropy keeps its digits."""
    z, t, y = drawn()
    level = torch.tensor([0.0, 300.0, -5000.0, 1e4, 40.0, -80.0])[torch.arange(N) % 6, None]
    z, t = z + level, t + level
    for x in (z, t):
        x[:, 5:9] = -torch.inf
        x[2, V // 2 :] = -torch.inf
        x[3, -1] = x[3].max() + 30  # sure of itself, at the very end
        x[4] = torch.where(torch.rand(V) < 0.5, -torch.inf, x[4])
    terms = distill_loss(z, t, y, alpha=1.0, return_metrics=True, temperature=3.0, backend=backend)
    want = truth(array(z), log_softmax(array(t) / 3, -1), y, tau=3.0)
    check(terms.metrics, want)


def test_certain_and_even_rows(backend):
    z, t = torch.full((2, V), -1e4), torch.zeros(2, V)
    z[:, 7] = 0
    got = distill_loss(z, t, return_metrics=True, backend=backend).metrics
    assert got.student_entropy == 0
    assert got.teacher_entropy.item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.agreement == 0
    assert got.accuracy is None


def test_only_tokens_that_count(backend):
    z, t, y = drawn()
    z[0], t[1] = torch.nan, torch.inf
    y[0], weights = -100, torch.full((N,), 0.5)
    weights[1] = 0
    alpha = torch.full((N,), 0.5)
    alpha[3] = 1  # unlabelled, and in agreement or not nevertheless
    options = {"weights": weights, "alpha": alpha, "temperature": 2.0, "backend": backend}
    got = distill_loss(z, t, y, return_metrics=True, **options).metrics
    counted = torch.arange(N) > 1
    z[0], t[1] = 0, 0
    log_q = log_softmax(array(t) / 2, -1)
    check(got, truth(array(z), log_q, y, tau=2.0, counted=counted, labelled=alpha != 1))
    none = distill_loss(z, t, torch.full((N,), -100), return_metrics=True, backend=backend)
    assert none.loss == 0
    assert all(x.isnan() for x in none.metrics)


def test_rows_without_a_largest_logit(backend):
    """Of NaN, of +inf and of -inf alone: no accuracy and no agreement, whatever the other one has."""
    z, t, y = torch.randn(4, V), torch.randn(4, V), torch.tensor([0, 3, 0, 5])
    z[0, 5], z[1, 3], z[2] = torch.nan, torch.inf, -torch.inf
    t[:3] = z[:3]
    z[3, 5] = t[3, 5] = 50
    got = distill_loss(z, t, y, return_metrics=True, backend=backend).metrics
    assert got.agreement == 0.25
    assert got.accuracy == 0.25
    assert got.student_entropy.isnan()


def test_without_a_teacher(backend):
    z, _, y = drawn()
    got = distill_loss(z, labels=y, temperature=4.0, z_loss=1e-3, return_metrics=True, backend=backend)
    check(got.metrics, truth(array(z), None, y))
    assert got.z.item() == pytest.approx(1e-3 * (logsumexp(array(z), -1) ** 2).mean(), rel=1e-5)
    assert got.loss.item() == pytest.approx((got.hard + got.z).item(), rel=1e-6)


@pytest.mark.parametrize("z_loss", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_terms_add_up(backend, z_loss, reduction):
    z, t, y = drawn()
    options = {"alpha": 0.3, "temperature": 2.0, "z_loss": z_loss, "reduction": reduction, "backend": backend}
    got = distill_loss(z.requires_grad_(), t, y, return_metrics=True, **options)
    torch.testing.assert_close(got.loss.detach(), 0.3 * got.soft + 0.7 * got.hard + got.z)
    assert not got.z.requires_grad


def test_a_truncated_vocabulary(backend):
    """Accuracy is of all columns, agreement and entropies of those that both have."""
    z, t, y = drawn()
    z[2, V - 3] = z[2, V - 5] = y[2] = 90.0
    y[2] = V - 5
    got = distill_loss(z, t[:, : V - 20], y, vocab="truncate", temperature=2.0, return_metrics=True, backend=backend)
    log_q = log_softmax(array(t[:, : V - 20]) / 2, -1)
    check(got.metrics, truth(array(z), log_q, y, tau=2.0, columns=V - 20))


@pytest.mark.parametrize("ensemble", ["prob", "logit"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 1.5], "per token"], ids=str)
def test_ensembles(backend, ensemble, weights):
    (z, t, y), (_, u, _) = drawn(), drawn()
    third = torch.randn(N, V)
    weights = torch.rand(3, N) if weights == "per token" else weights
    w = np.full((3, 1), 1 / 3) if weights is None else array(torch.as_tensor(weights)).reshape(3, -1)
    w = (w / w.sum(0))[..., None]
    logits = np.stack([array(x) for x in (t, u, third)])
    if ensemble == "logit":
        log_q = log_softmax((w * logits).sum(0) / 2, -1)
    else:
        log_q = logsumexp(log_softmax(logits / 2, -1), 0, b=np.broadcast_to(w, logits.shape))
    options = {"teacher_weights": weights, "ensemble": ensemble, "temperature": 2.0, "backend": backend}
    for leaf in (z, z.clone().requires_grad_()):
        got = distill_loss(leaf, [t, u, third], y, return_metrics=True, **options)
        check(got.metrics, truth(array(z), log_q, y, tau=2.0))


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_kept_columns(backend, tail):
    z, t, y = drawn()
    targets = soft_targets(t, k=8, temperatures=(1.0, 2.0))
    got = distill_loss(z, targets, y, tail=tail, temperature=2.0, return_metrics=True, backend=backend).metrics
    log_q = log_softmax(array(t) / 2, -1)
    kept = np.sort(log_q, -1)[:, -8:]
    if tail == "bucket":
        kept = np.concatenate([kept, np.log1p(-np.exp(kept).sum(-1, keepdims=True))], -1)
    elif tail == "renorm":
        kept = log_softmax(kept, -1)
    want = truth(array(z), log_q, y, tau=2.0) | {"teacher_entropy": entropy(kept).mean()}
    check(got, want)


def test_all_columns_kept_and_none(backend):
    z, t, y = drawn(v=20)
    whole = soft_targets(t, k=20)
    log_q = log_softmax(array(t), -1)
    check(distill_loss(z, whole, y, return_metrics=True, backend=backend).metrics, truth(array(z), log_q, y))
    nothing = SparseTargets(torch.full((N, 2), -1, dtype=torch.int32), torch.zeros(N, 2), vocab_size=20)
    got = distill_loss(z, nothing, y, return_metrics=True, backend=backend).metrics
    assert got.agreement == 0
    assert got.teacher_entropy == 0  # one outcome: all that was not kept


@pytest.mark.parametrize("method", ["sample", "pps"])
def test_sampled_targets(backend, method):
    z, t, y = drawn()
    targets = soft_targets(t, k=16, method=method, seed=3)
    got = distill_loss(z, targets, y, return_metrics=True, backend=backend).metrics
    want = truth(array(z), None, y) | {"teacher_entropy": -array(targets.neg_entropy).mean()}
    check(got, want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("teacher", [True, False])
def test_class_probabilities(backend, smoothing, teacher):
    z, t, y = drawn()
    probabilities = 0.1 * torch.rand(N, V)
    probabilities[torch.arange(N), y] = 0.7
    options = {"label_smoothing": smoothing, "return_metrics": True, "backend": backend}
    if not teacher:
        got = distill_loss(z.requires_grad_(), labels=probabilities, **options)
        assert got.z is None
        assert got.soft is None
        check(got.metrics, truth(array(z), None, y))
        plain = distill_loss(z, labels=probabilities, **options | {"return_metrics": False})
        torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (got.loss, plain)))
        return
    alpha = torch.full((N,), 0.5)
    alpha[0] = 1
    got = distill_loss(z, t, probabilities, alpha=alpha, **options)
    log_q = log_softmax(array(t), -1)
    check(got.metrics, truth(array(z), log_q, y, labelled=alpha != 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [(1.0, None), (0.5, 5.0)])
def test_heads(backend, dtype, cap):
    """In chunks, some tokens dropped."""
    hidden, weight = torch.randn(N, 8).to(dtype), torch.randn(V, 8).to(dtype)
    _, t, y = drawn(dtype)
    y[2] = -100
    head = LMHead(hidden.requires_grad_(), weight, softcap=cap[1], scale=cap[0])
    logits = (hidden.detach() @ weight.T).double() * cap[0]
    logits = logits if cap[1] is None else cap[1] * torch.tanh(logits / cap[1])
    y[3] = logits[3].argmax()
    t[5] = logits[5].to(dtype)
    for budget in (None, 3 * V * 4):
        got = distill_loss(
            head, t, y, temperature=2.0, return_metrics=True, memory_budget=budget, backend=backend
        ).metrics
        want = truth(array(logits), log_softmax(array(t) / 2, -1), y, tau=2.0, counted=torch.arange(N) != 2)
        check(got, want)


def test_other_ways_in(backend):
    """Leading axes, class_dim, the module, and a compiler."""
    z, t, y = drawn(n=8, v=30)
    want = truth(array(z), log_softmax(array(t), -1), y)
    apart = [x.reshape(2, 4, 30).movedim(-1, 1) for x in (z, t)]
    got = distill_loss(*apart, y.reshape(2, 4), class_dim=1, return_metrics=True, backend=backend)
    check(got.metrics, want)
    criterion = kdfast.DistillLoss(return_metrics=True, backend=backend)
    check(criterion(z, t, y).metrics, want)
    compiled = torch.compile(criterion, fullgraph=TRACES, backend="aot_eager")
    for leaf in (z, z.clone().requires_grad_()):
        check(compiled(leaf, t, y).metrics, want)
    torch._dynamo.reset()


@pytest.mark.skipif(KERNEL != "cpu", reason="of the operators' fakes and vmap rules, which all backends share")
def test_vmap():
    z, t, y = drawn(n=8, v=30)
    stacked = [x.reshape(2, 4, *x.shape[1:]) for x in (z, t, y)]
    got = torch.func.vmap(lambda *x: distill_loss(*x, return_metrics=True).metrics)(*stacked)
    for k in range(2):
        each = distill_loss(*(x[k] for x in stacked), return_metrics=True).metrics
        for a, b in zip(got, each, strict=True):
            torch.testing.assert_close(a[k], b)


def test_second_backward_and_pickles():
    z, t, y = drawn()
    terms = distill_loss(z.requires_grad_(), t, y, return_metrics=True)
    first, second = (torch.autograd.grad(terms.loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    again = pickle.loads(pickle.dumps(terms._replace(loss=terms.loss.detach())))
    assert again.metrics == terms.metrics
    assert type(again.metrics).__module__ == "kdfast"
