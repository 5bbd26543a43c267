"""Sparse targets from logits, on every backend and every instruction set of this machine, against numpy in fp64."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from machine import DEVICE, INTERPRETING, KERNEL, TRITON, VARIANTS, choose
from scipy.special import logsumexp

import kdfast.ops._registry as registry
from kdfast import LMHead, SparseTargets, distill_loss, soft_targets
from kdfast.spec import selection

INF = math.inf
MODULE = sys.modules[soft_targets.__module__]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = {"topk": {}, "topp": {"p": 0.9}, "sample": {"seed": 11}, "pps": {"seed": 11}}
DRAWN_AT = list(zip(DTYPES, [1.0, 2.0, 0.7], strict=True))
# the interpreter takes a second for some ten rows, and its tile has 512 columns
SIZES = [2, 15, 64, 1100] if INTERPRETING else [2, 15, 64, 1000, 50257, 151643]
DRAWN_SIZES = [2, 40, 1300] if INTERPRETING else [2, 40, 5003, 50257]
LONG = 1500 if INTERPRETING else 20000
FEW = 100 if INTERPRETING else 700

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def by(request, monkeypatch):
    """Calls of this file go to the backend that the test is run for, where it is run for several."""
    if "backend" in request.fixturenames:
        monkeypatch.setenv("KDFAST_BACKEND", request.getfixturevalue("backend"))


def capture(x, method="topk", **options):
    """Targets, on the CPU; the caller's tensor must come out as it went in."""
    before = x.clone()
    targets = soft_targets(x, method=method, **METHODS[method] | options)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    assert targets.method == method
    assert targets.vocab_size == x.shape[-1]
    assert targets.ids.dtype == torch.int32
    assert targets.k_eff.dtype == torch.int32
    assert targets.logprobs.dtype == torch.float32
    assert targets.ids.device == x.device
    return targets.to("cpu")


def wide(x):
    return np.asarray(x.double().cpu())


def same(a: SparseTargets, b: SparseTargets):
    for name, value in a._tensors().items():
        torch.testing.assert_close(value, b._tensors()[name], rtol=0, atol=0, equal_nan=True)
    assert a.temperatures == b.temperatures
    for t, lse in a.lse.items():
        torch.testing.assert_close(lse, b.lse[t], rtol=0, atol=0, equal_nan=True)


def check_lse(x, targets, temperatures):
    """Within a few units in the last place of a number as large as the logits' spread."""
    log_q = x - logsumexp(x, -1, keepdims=True)
    assert list(targets.lse) == list(temperatures)
    for t in temperatures:
        np.testing.assert_allclose(targets.lse[t], logsumexp(log_q / t, -1), rtol=1e-6, atol=2e-6)
    return log_q


def check_entries(x, targets, log_q):
    """Ids in use come first, are distinct and no column of -inf; log-probabilities are those of the vocabulary."""
    for i in range(len(x)):
        n = int(targets.k_eff[i])
        ids = targets.ids[i, :n].numpy()
        assert (targets.ids[i, n:] == -1).all()
        assert (targets.logprobs[i, n:] == -INF).all()
        assert len(set(ids.tolist())) == n
        assert ((ids >= 0) & (ids < x.shape[-1])).all()
        assert (x[i, ids] > -INF).all()
        np.testing.assert_allclose(targets.logprobs[i, :n], log_q[i, ids], rtol=1e-6, atol=2e-6)


def check_topk(x, targets, temperatures=(1.0,)):
    x, k = wide(x), targets.ids.shape[-1]
    check_entries(x, targets, check_lse(x, targets, temperatures))
    for i in range(len(x)):
        order = np.lexsort((np.arange(x.shape[-1]), -x[i]))[:k]
        order = order[x[i, order] > -INF]
        assert targets.k_eff[i] == len(order)
        np.testing.assert_array_equal(targets.ids[i, : len(order)], order)


# --- The largest columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", SIZES)
def test_topk(backend, dtype, v):
    temperatures = (1.0, 2.0, 0.5, 3.0)
    x = (3 * torch.randn(3, v)).to(dtype)
    for k in (5, 64) if INTERPRETING else (1, 64) if v > 1000 else (1, 5, 64, 1200):
        check_topk(x, capture(x, k=k, temperatures=temperatures), temperatures)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [1, 2, 30])
def test_ties_go_to_the_lower_id(backend, dtype, values):
    x = torch.randint(values, (4, LONG)).to(dtype)
    x[1, ::3] = -INF
    x[2, : 3 * LONG // 4] = -INF
    x[3] = torch.where(x[3] == 0, -0.0, x[3])  # equal to 0
    for k in (64,) if INTERPRETING else (1, 64, 2000):
        check_topk(x, capture(x, k=k))


@pytest.mark.parametrize("descending", [False, True])
def test_ordered_rows(backend, descending):
    x = (1e-3 * torch.randn(2, LONG)).sort(-1, descending=descending).values
    check_topk(x, capture(x))


def test_absent_columns_are_never_kept(backend):
    x = torch.randn(3, LONG)
    x[0, 100:] = -INF
    x[1, torch.randperm(LONG)[10:]] = -INF
    targets = capture(x, temperatures=(2.0,))
    check_topk(x, targets, (2.0,))
    assert targets.k_eff.tolist() == [64, 10, 64]


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(backend, shift):
    x = shift + 3 * torch.randn(3, LONG)
    x[0, LONG - 100] += 1e4
    check_topk(x, capture(x, temperatures=(1.0, 2.0, 5.0)), (1.0, 2.0, 5.0))


def sure(rows, v):
    """Logits of teachers whose other columns have 1e-1 to 1e-12 of what the largest has, the smallest rest last."""
    x, row = 3 * torch.randn(rows, v), torch.arange(rows)
    at = torch.randint(v, (rows,))
    x[row, at] = -INF
    x[row, at] = x.logsumexp(-1) + math.log(10) * torch.linspace(1, 12, rows)
    return x


def log_sum_beside_the_largest(x, t):
    """Logsumexp(x / t) - max(x / t), (..., 1), to all digits however small it is."""
    w = np.exp((x - x.max(-1, keepdims=True)) / t)
    np.put_along_axis(w, x.argmax(-1)[..., None], 0.0, -1)
    return np.log1p(w.sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [3, 40, 1100] if INTERPRETING else [3, 40, 5003, 50257])
def test_a_sure_teacher(backend, dtype, v):
    """How far the largest is from certain is known to about 1e-6 of itself, and so is the mass of the tail."""
    x = sure(8 if INTERPRETING else 24, v).to(dtype)
    x[0] = 0  # all are the largest
    x[1, [0, v - 1]] = x[1].max() + 1  # two are
    temperatures, k = (1.0, 2.0, 0.5, 3.0), min(v - 1, 9)
    targets, x = capture(x, k=k, temperatures=temperatures), wide(x)
    log_sum = {t: log_sum_beside_the_largest(x, t) for t in temperatures}
    logprobs, ids = wide(targets.logprobs), targets.ids.numpy().astype(np.int64)
    kept = np.take_along_axis(x, ids, -1) - x.max(-1, keepdims=True)
    np.testing.assert_allclose(logprobs, kept - log_sum[1.0], rtol=2e-6, atol=0)
    for t in temperatures:
        lse, slack = wide(targets.lse[t])[:, None], log_sum[t] + log_sum[1.0] / t
        assert (np.abs(lse - (log_sum[t] - log_sum[1.0] / t)) <= 2e-6 * slack).all()
        q = np.exp((x - x.max(-1, keepdims=True)) / t - log_sum[t])
        np.put_along_axis(q, ids, 0.0, -1)
        log_q = logprobs / t - lse
        tail = -np.expm1(log_q[:, 0]) - np.exp(log_q[:, 1:]).sum(-1)
        assert (np.abs(tail - q.sum(-1)) <= 2e-6 * slack[:, 0]).all()


@pytest.mark.parametrize("p", [1e-4, 0.3, 0.9, 0.999, 1.0, 1])
def test_topp(backend, p):
    x = 3 * torch.randn(3 if INTERPRETING else 6, 900 if INTERPRETING else 3000)
    x[1] *= 20  # one column has it all
    x[2, 40:] = -INF
    least, most = (5, 100) if INTERPRETING else (5, 400)
    targets = capture(x, "topp", p=p, k=(least, most))
    log_q = check_lse(wide(x), targets, (1.0,))
    check_entries(wide(x), targets, log_q)
    for i in range(len(x)):
        n, there = int(targets.k_eff[i]), int((x[i] > -INF).sum())
        mass = np.cumsum(np.exp(np.sort(log_q[i])[::-1]))
        np.testing.assert_array_equal(targets.ids[i, :n], np.argsort(-log_q[i], kind="stable")[:n])
        assert least <= n <= min(most, there)
        assert n in (most, there) or mass[n - 1] > p - 1e-6  # reached, but for rounding
        assert n == least or mass[n - 2] < p + 1e-6  # and with no entry less
    one = capture(x, "topp", p=p, k=most)
    assert ((one.k_eff == targets.k_eff) | (targets.k_eff == least)).all()


many_tokens = pytest.mark.skipif(INTERPRETING, reason="20,000 tokens take the interpreter half an hour")

# --- Draws ------------------------------------------------------------------------------------------------------------


def distribution(x, tau):
    q = np.exp(wide(x) / tau - logsumexp(wide(x) / tau, -1, keepdims=True))
    return q, np.cumsum(q, -1)


def check_neg_entropy(targets, tau):
    log_q = wide(targets.logprobs) / tau - wide(targets.lse[tau])[:, None]
    want = np.where(wide(targets.mass) > 0, wide(targets.mass) * np.where(wide(targets.mass) > 0, log_q, 0), 0).sum(-1)
    np.testing.assert_allclose(targets.neg_entropy, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tau"), DRAWN_AT)
@pytest.mark.parametrize("v", DRAWN_SIZES)
def test_draws_lie_where_the_uniforms_say(backend, dtype, tau, v):
    x, n = (2 * torch.randn(3, v)).to(dtype), 100
    targets = capture(x, "sample", k=n, temperatures=(tau,), seed=2**62 + 12345)
    check_entries(wide(x), targets, check_lse(wide(x), targets, (tau,)))
    check_neg_entropy(targets, tau)
    _, cumulative = distribution(x, tau)
    points = np.sort(selection.uniforms(2**62 + 12345, torch.arange(3)[:, None], torch.arange(n)).cpu().numpy(), -1)
    for i in range(3):
        used = int(targets.k_eff[i])
        counts = np.rint(wide(targets.mass[i, :used]) * n).astype(int)
        assert counts.sum() == n
        drawn = np.repeat(targets.ids[i, :used].numpy(), counts)
        assert (np.diff(drawn) >= 0).all()
        before = np.where(drawn > 0, cumulative[i][drawn - 1], 0)
        assert (points[i] > before - 1e-6).all()
        assert (points[i] < cumulative[i][drawn] + 1e-6).all()


def threshold(q, k):
    """1 / l of threshold sampling, by bisection; 0 where every column that has mass is certain."""
    if (q > 0).sum() <= k:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, q / middle).sum() > k else (low, middle)
    return high


@pytest.mark.parametrize(("dtype", "tau"), DRAWN_AT)
@pytest.mark.parametrize("v", DRAWN_SIZES)
def test_threshold_sampling(backend, dtype, tau, v):
    x = (2 * torch.randn(4, v)).to(dtype)
    x[1] = 0  # none is certain, or all are
    x[2, 1:] -= 25
    if v > 30:
        x[3, 30:] = -INF
    for k in (1, 50):
        targets = capture(x, "pps", k=k, temperatures=(tau,))
        check_entries(wide(x), targets, check_lse(wide(x), targets, (tau,)))
        check_neg_entropy(targets, tau)
        q, _ = distribution(x, tau)
        for i in range(4):
            step, used = threshold(q[i], k), int(targets.k_eff[i])
            assert used == min(k, (q[i] > 0).sum())
            ids = targets.ids[i, :used].numpy()
            assert (np.diff(ids) > 0).all()
            assert set(np.flatnonzero(q[i] > step * (1 + 1e-5))) <= set(ids)
            np.testing.assert_allclose(targets.mass[i, :used], np.maximum(q[i][ids], step), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("tau", [0.1, 0.02])
def test_a_mass_that_fp32_does_not_have(backend, tau):
    """Of a low temperature: what is drawn for certain because k columns have room may weigh less than any number."""
    x = 3 * torch.randn(8, 100)
    targets = capture(x, "pps", k=80, temperatures=(tau,))
    place = torch.arange(80) < targets.k_eff[:, None]
    assert torch.equal(targets.mass > 0, place)
    assert torch.equal(targets.ids >= 0, place)
    q = torch.softmax(x.double() / tau, -1)
    if tau == 0.02:
        assert int(targets.k_eff.min()) < 80
    torch.testing.assert_close(targets.dense().double(), q, rtol=1e-4, atol=1e-7)


@many_tokens
@pytest.mark.parametrize("method", ["sample", "pps"])
def test_unbiased(backend, method):
    """The mean of the mass over many tokens is q, within 5 standard errors of each column."""
    tau, k, tokens, v = 1.5, 12, 20000, 60
    logits = 2 * torch.randn(v)
    q, _ = distribution(logits, tau)
    dense = capture(logits.expand(tokens, v), method, k=k, temperatures=(tau,), seed=5).dense().double()
    error = (dense.mean(0).numpy() - q) / np.maximum(dense.std(0).numpy(), 1e-9) * math.sqrt(tokens)
    certain = dense.std(0).numpy() < 1e-9
    np.testing.assert_allclose(dense.mean(0).numpy()[certain], q[certain], rtol=1e-5)
    # A column that is met once in 20000 tokens or less often has no standard error to speak of.
    rare = q * k * tokens < 30
    assert np.abs(error[~certain & ~rare]).max() < 5
    assert (np.abs(dense.mean(0).numpy() - q)[rare] < 30 / (k * tokens)).all()


@many_tokens
@pytest.mark.parametrize("method", ["sample", "pps"])
def test_a_sampled_loss_is_an_unbiased_kl(backend, method, monkeypatch):
    tokens, v, tau = 20000, 60, 2.0
    teacher, student = 2 * torch.randn(v), 2 * torch.randn(v)
    targets = capture(teacher.expand(tokens, v), method, k=12, temperatures=(tau,), seed=3)
    monkeypatch.setenv("KDFAST_BACKEND", "reference")
    each = distill_loss(student.expand(tokens, v), targets.to(DEVICE), temperature=tau, reduction="none").double()
    exact = distill_loss(student.double()[None], teacher.double()[None], temperature=tau)
    assert abs(each.mean() - exact) < 5 * each.std() / math.sqrt(tokens) + 1e-5


def test_random_numbers():
    word = [torch.tensor(x) for x in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    known = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # of the authors' Random123
    assert [x.item() for x in selection.philox(word, [0xA4093822, 0x299F31D0])] == known
    ones = [torch.tensor(0xFFFFFFFF)] * 4
    known = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert [x.item() for x in selection.philox(ones, [0xFFFFFFFF] * 2)] == known
    u = selection.uniforms(2**63 - 1, torch.arange(2**33, 2**33 + 1000)[:, None], torch.arange(100))
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * u.numel())
    assert u.unique().numel() == u.numel()


@pytest.mark.skipif(not VARIANTS, reason="the compiled extension is missing")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_backends_agree(variant, method, monkeypatch):
    x = 2 * torch.randn(6 if INTERPRETING else 64, LONG)
    options = {"temperatures": (2.0,), "k": 50}
    monkeypatch.setenv("KDFAST_BACKEND", "reference")
    want = capture(x, method, **options)
    monkeypatch.setenv("KDFAST_BACKEND", KERNEL)
    choose(variant, monkeypatch)
    got = capture(x, method, **options)
    # a point that falls on the border of two columns may go to either, and one row more or less reach p
    differ = ((got.ids != want.ids).any(-1) | (got.k_eff != want.k_eff)).sum()
    assert differ <= (0 if method == "topk" else 2)
    torch.testing.assert_close(got.lse[2.0], want.lse[2.0], rtol=1e-6, atol=2e-6)


@pytest.mark.skipif(TRITON, reason="of the threads of a CPU")
@pytest.mark.parametrize("method", METHODS)
def test_threads_and_chunks_do_not_show(method, threads, monkeypatch):
    for shape in ((1, 70001), (3, 40000), (40, 999)):
        x = torch.randn(shape).bfloat16()
        threads(1)
        one = capture(x, method)
        threads(5)
        same(capture(x, method), one)
        monkeypatch.setattr(MODULE, "CHUNK_BYTES", {"cpu": 2 * shape[-1] * x.element_size()})
        same(capture(x.mT.contiguous().mT, method), one)


def test_seeds():
    x = torch.randn(2, FEW)
    for method in ("sample", "pps"):
        same(capture(x, method, seed=8), capture(x, method, seed=8))
        assert not torch.equal(capture(x, method, seed=8).ids, capture(x, method, seed=9).ids)
        torch.manual_seed(1)
        first, second = (capture(x, method, seed=None) for _ in range(2))
        assert not torch.equal(first.ids, second.ids)
        torch.manual_seed(1)
        same(capture(x, method, seed=None), first)
        # tokens do not share their draws
        assert not torch.equal(*capture(x[:1].expand(2, -1), method).ids)


# --- Shapes, rows without a distribution, heads -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,), (2, 3, 9), (1, 2)])
def test_shapes(backend, method, shape):
    x = torch.randn(shape)
    targets = capture(x, method, k=12, temperatures=(2.0,))
    assert targets.ids.shape == (*shape[:-1], 12)
    assert targets.lse[2.0].shape == targets.k_eff.shape == shape[:-1]
    assert (targets.k_eff <= shape[-1]).all()
    if method == "topk":
        assert (targets.k_eff == min(12, shape[-1])).all()


@pytest.mark.parametrize("method", METHODS)
def test_strides(backend, method):
    base = torch.randn((2, 2, 14) if INTERPRETING else (4, 6, 1100))
    whole = capture(base.contiguous(), method)
    views = {
        "shifted": (base[:, :-1], base[:, :-1].contiguous()),
        "step": (base[::2, ::3, ::5], base[::2, ::3, ::5].contiguous()),
        "transposed": (base.mT, base.mT.contiguous()),
        "columns": (base[..., 3:-7], base[..., 3:-7].contiguous()),
        "expanded": (base[:1].expand(3, -1, -1), base[:1].repeat(3, 1, 1)),
    }
    for view, contiguous in views.values():
        same(capture(view, method), capture(contiguous, method))
    same(capture(base.requires_grad_().detach().requires_grad_(), method), whole)
    assert not soft_targets(base.detach().requires_grad_(), **METHODS[method], method=method).logprobs.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_a_distribution_is_nan_alone(backend, method, dtype):
    for v in (40, FEW) if INTERPRETING else (40, 5000):
        clean = torch.randn(6, v).to(dtype)
        x = clean.clone()
        x[1, v - 1] = math.nan
        x[2, 7] = INF
        x[4] = -INF
        targets, want = capture(x, method, temperatures=(2.0,)), capture(clean, method, temperatures=(2.0,))
        good = torch.tensor([0, 3, 5])
        same(targets[good], want[good])
        for i in (1, 2, 4):
            n = int(targets.k_eff[i])
            assert targets.ids[i].tolist() == [*range(n), *[-1] * (64 - n)]
            assert n == min(64, v)
            assert targets.logprobs[i].isnan().all()
            assert targets.lse[2.0][i].isnan()
            if method in ("sample", "pps"):
                assert targets.mass[i].isnan().all()
                assert targets.neg_entropy[i].isnan()


def test_fp64_logits_keep_an_order_that_fp32_does_not_see(monkeypatch):
    monkeypatch.delenv("KDFAST_BACKEND", raising=False)
    x = 1 + 1e-12 * torch.arange(50, dtype=torch.float64)
    assert soft_targets(x, k=3).ids.tolist() == [49, 48, 47]


HEADS = {"plain": {}, "bias": {"bias": torch.linspace(-1, 1, FEW)}, "softcap": {"softcap": 5.0, "scale": 2.0}}
TOKENS = (1, 3) if INTERPRETING else (3, 7)


def alike(a, b):
    """
    Whether (..., K) ids are the same but for a few.

    A product's rounding may depend on how many rows it has, and so exchange two near-equal columns or move a draw to
    the next one. One id more or less in ascending order then shifts those behind it: ranks are not compared.
    """
    return all(len({*x} ^ {*y}) <= 4 for x, y in zip(a.flatten(0, -2).tolist(), b.flatten(0, -2).tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_heads(backend, method, options, monkeypatch):
    head = LMHead(torch.randn(*TOKENS, 16), torch.randn(FEW, 16), **options)
    whole = soft_targets(head, method=method, **METHODS[method])
    assert whole.ids.shape == (*TOKENS, 64)
    want = capture(head.logits(), method)
    assert alike(whole.ids, want.ids)
    torch.testing.assert_close(whole.lse[1.0], want.lse[1.0], rtol=0, atol=1e-5)
    seen, logits = [], LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda self: seen.append(len(self.hidden)) or logits(self))
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", {DEVICE: 2 * FEW * 4})
    chunked = soft_targets(head, method=method, **METHODS[method])
    assert sum(seen) == math.prod(TOKENS)
    assert max(seen) <= 2
    assert alike(chunked.ids, whole.ids)


def test_heads_of_low_precision():
    hidden, weight = torch.randn(3, 32).bfloat16(), torch.randn(FEW, 32).bfloat16()
    targets = soft_targets(LMHead(hidden, weight)).to("cpu")
    check_topk(LMHead(hidden, weight).logits(), targets)


# --- Arguments and backends -------------------------------------------------------------------------------------------

X = torch.zeros(2, 8)
WRONG = {
    "logits, integers": ((X.long(),), {}, TypeError, "logits_or_head must be floating point"),
    "logits, a list": (([0.0, 1.0],), {}, TypeError, "logits_or_head must be a tensor"),
    "logits, 0-d": ((torch.tensor(1.0),), {}, ValueError, r"logits_or_head must be \(..., V\)"),
    "logits, no columns": ((torch.zeros(3, 0),), {}, ValueError, "V >= 2"),
    "method": ((X,), {"method": "top-k"}, ValueError, "method must be one of 'topk'.*got 'top-k'"),
    "k, zero": ((X,), {"k": 0}, ValueError, "k must be at least 1.*got 0"),
    "k, a float": ((X,), {"k": 4.0}, TypeError, "k must be an int, got 4.0"),
    "k, a bool": ((X,), {"k": True}, TypeError, "k must be an int"),
    "k, a pair": ((X,), {"k": (1, 2)}, ValueError, 'pair.*method="topp".*pass an int'),
    "k, three": ((X,), {"k": (1, 2, 3), "method": "topp", "p": 0.5}, TypeError, "pair"),
    "k, falling": ((X,), {"k": (3, 2), "method": "topp", "p": 0.5}, ValueError, r"least <= most.*got \(3, 2\)"),
    "k, large": ((X,), {"k": 2**31}, ValueError, "k must be at least 1 and at most"),
    "p, missing": ((X,), {"method": "topp"}, ValueError, "p must be given"),
    "p, not meant": ((X,), {"p": 0.5}, ValueError, "p is the mass.*leave p out"),
    "p, zero": ((X,), {"method": "topp", "p": 0.0}, ValueError, r"p must be in \(0, 1\], got 0.0"),
    "p, a percentage": ((X,), {"method": "topp", "p": 95}, ValueError, r"p must be in \(0, 1\], got 95"),
    "p, NaN": ((X,), {"method": "topp", "p": math.nan}, ValueError, "got nan"),
    "p, a string": ((X,), {"method": "topp", "p": "0.5"}, TypeError, "p must be a number.*str"),
    "temperatures, a number": ((X,), {"temperatures": 2.0}, TypeError, r"such as \(1.0, 2.0\), got float"),
    "temperatures, a string": ((X,), {"temperatures": "2"}, TypeError, "sequence"),
    "temperatures, of strings": ((X,), {"temperatures": ("2",)}, TypeError, "must be numbers"),
    "temperatures, zero": ((X,), {"temperatures": (1.0, 0.0)}, ValueError, "> 0 and finite, got 0.0"),
    "temperatures, infinite": ((X,), {"temperatures": (INF,)}, ValueError, "finite, got inf"),
    "temperatures, none": ((X,), {"temperatures": ()}, ValueError, "at least one"),
    "temperatures, drawn": ((X,), {"method": "pps", "temperatures": (1.0, 2.0)}, ValueError, "one temperature"),
    "seed, a float": ((X,), {"seed": 1.5}, TypeError, "seed must be an int"),
    "seed, negative": ((X,), {"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
    "seed, large": ((X,), {"seed": 2**63}, ValueError, "seed must be in"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_arguments(case):
    arguments, options, error, words = case
    with pytest.raises(error, match=words):
        soft_targets(*arguments, **options)


def test_numpy_scalars_are_numbers():
    x = torch.randn(3, 50)
    for of_int in (np.int64, np.int32, np.uint8):
        drawn = {"method": "pps", "seed": 5, "k": 7}
        numpy = drawn | {"seed": of_int(5), "k": of_int(7), "temperatures": (np.float32(2),)}
        same(soft_targets(x, **numpy), soft_targets(x, **drawn, temperatures=(2.0,)))
    want = soft_targets(x, method="topp", k=(2, 9), p=0.5)
    same(soft_targets(x, method="topp", k=(np.int64(2), np.int64(9)), p=np.float32(0.5)), want)
    with pytest.raises(TypeError, match="k must be an int"):
        soft_targets(x, k=np.float64(4))


def test_dtensors_are_refused(monkeypatch):
    monkeypatch.setattr(MODULE, "_is_dtensor", lambda x: x is X)
    for x in (X, LMHead(X, torch.zeros(3, 8)), LMHead(torch.zeros(3, 8), X)):
        with pytest.raises(TypeError, match=r"got a DTensor: pass x.to_local\(\)"):
            soft_targets(x)


def test_compiled_code_may_call_it():
    x = torch.randn(3, 500)
    got = torch.compile(lambda x: soft_targets(2 * x).logprobs + 1, backend="eager")(x)
    torch.testing.assert_close(got, soft_targets(2 * x).logprobs + 1, rtol=0, atol=0)


def test_temperatures_that_repeat_are_one():
    assert list(soft_targets(X, temperatures=[2, 1.0, 2.0, 1]).lse) == [2.0, 1.0]
    assert soft_targets(X, method="pps", temperatures=(2, 2.0), seed=1).temperatures == (1.0, 2.0)


def test_named_backends(monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"cuda.*no CUDA kernels"):
        soft_targets(X)
    monkeypatch.setenv("KDFAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="KDFAST_BACKEND must be one of"):
        soft_targets(X)
    if VARIANTS:
        monkeypatch.setenv("KDFAST_BACKEND", KERNEL)
        with pytest.raises(RuntimeError, match=f"{KERNEL}.*float64 logits"):
            soft_targets(X.double())


@pytest.mark.skipif(TRITON, reason="of a machine without a GPU or an interpreter")
def test_triton_needs_a_gpu(monkeypatch):
    def triton_says(reason):
        rows = [replace(row, unavailable=lambda: reason) if row.name == "triton" else row for row in registry.SELECTORS]
        monkeypatch.setattr(registry, "SELECTORS", tuple(rows))

    triton_says("no GPU")
    monkeypatch.setenv("KDFAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"triton.*no GPU"):
        soft_targets(X)
    triton_says(None)
    with pytest.raises(RuntimeError, match=r"triton.*logits on cpu"):
        soft_targets(X)


@pytest.mark.skipif(not TRITON, reason="of the Triton kernels")
def test_what_triton_declines():
    with pytest.raises(RuntimeError, match=r"triton.*k = 2049 \(they keep up to 2048\)"):
        soft_targets(X, k=2049)
    with pytest.raises(RuntimeError, match=r"triton.*16777217 columns"):
        soft_targets(X[:, :1].expand(2, (1 << 24) + 1))


def test_the_fallback_speaks_once_at_a_large_vocabulary(monkeypatch):
    monkeypatch.delenv("KDFAST_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_warned", set())
    soft_targets(torch.zeros(1, registry.LARGE_VOCABULARY - 1, dtype=torch.float64))
    large = torch.zeros(1, registry.LARGE_VOCABULARY, dtype=torch.float64)
    with pytest.warns(UserWarning, match="soft_targets runs in plain PyTorch.*float64 logits"):
        soft_targets(large)
    soft_targets(large)


def test_losses_from_captured_targets():
    """With all columns kept, the sparse loss is the dense one at every captured temperature."""
    teacher, student = 2 * torch.randn(5, 30), torch.randn(5, 30)
    targets = soft_targets(teacher, k=30, temperatures=(1.0, 2.0, 3.5))
    for tau in targets.temperatures:
        got = distill_loss(student, targets, temperature=tau, tail="zero", backend="reference")
        want = distill_loss(student, teacher, temperature=tau, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
