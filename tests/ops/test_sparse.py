"""The kernels' loss of sparse targets against the fp64 reference, and against the dense loss where both apply."""

from __future__ import annotations

import math

import pytest
import torch
from formulas import half_ulp
from machine import DEVICE, INTERPRETING, KERNEL, TRACES, VARIANTS, choose

from kdfast import LMHead, SparseTargets, distill_loss

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.usefixtures("poisoned"),
]

N, V, K = (4, 150, 6) if INTERPRETING else (7, 1300, 37)
TAUS = (1.0, 2.0, 3.7)
#: Every divergence under every rule that defines it.
RULES = [
    ("bucket", "forward_kl"),
    ("bucket", "reverse_kl"),
    ("bucket", "jsd"),
    ("bucket", "mixture"),
    ("renorm", "forward_kl"),
    ("renorm", "jsd"),
    ("zero", "forward_kl"),
]
MIXTURE = {"forward_kl": 0.5, "jsd": 2.0, "reverse_kl": 0.25}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def divergence(name):
    return MIXTURE if name == "mixture" else name


def top_k(t, k, *, shuffled=True):
    """The k largest of each row in any order, with the log-normaliser at every temperature."""
    log_q = t.double().log_softmax(-1)
    values, ids = log_q.topk(k)
    if shuffled:
        order = torch.rand(ids.shape).argsort(-1)
        values, ids = values.gather(-1, order), ids.gather(-1, order)
    lse = {tau: torch.logsumexp(log_q / tau, -1).float() for tau in TAUS}
    return SparseTargets(ids.int(), values.float(), vocab_size=t.shape[-1], lse=lse)


def drawn(t, n, tau):
    """Multinomial counts of n draws."""
    log_q = (t.double() / tau).log_softmax(-1)
    chosen = log_q.exp().multinomial(n, replacement=True)
    counts = torch.zeros_like(log_q).scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    mass, ids = (counts / n).topk(n)
    ids = torch.where(mass > 0, ids, -1)
    neg_entropy = (mass * log_q.gather(-1, ids.clamp(min=0))).sum(-1)
    return SparseTargets(
        ids.int(), None, vocab_size=t.shape[-1], method="sample", mass=mass.float(), neg_entropy=neg_entropy.float(),
        lse={tau: torch.zeros(len(t))},
    )  # fmt: skip


def both(student, targets, y=None, *, upstream=None, **options):
    """(loss, gradient) of the kernel, and of the fp64 reference."""
    out = []
    for backend, dtype in ((KERNEL, student.dtype), ("reference", torch.float64)):
        leaf = student.detach().to(dtype).clone().requires_grad_()
        loss = distill_loss(leaf, targets, y, backend=backend, **options)
        up = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
        out.append((loss.detach().double(), torch.autograd.grad(loss, leaf, up)[0]))
    return out


def agree(student, targets, y=None, *, rtol=2e-5, **options):
    (loss, grad), (want, want_grad) = both(student, targets, y, **options)
    torch.testing.assert_close(loss, want, rtol=rtol, atol=rtol)
    assert grad.dtype == student.dtype
    allowed = rtol * want_grad.abs().amax(-1, keepdim=True) + 1e-7
    if student.dtype != torch.float32:
        allowed = allowed + half_ulp(want_grad, student.dtype)
    assert ((grad.double() - want_grad).abs() <= allowed).all()


@pytest.mark.parametrize("labelled", [False, True], ids=["soft", "with labels"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("tail", "name"), RULES)
def test_matrix(monkeypatch, tail, name, tau, labelled):
    dtypes = DTYPES[: 3 if labelled else 1] if INTERPRETING else DTYPES
    for dtype in dtypes:
        s, t = (2 * torch.randn(N, V) for _ in range(2))
        targets, s = top_k(t, K), s.to(dtype)
        y = torch.randint(V, (N,)) if labelled else None
        if labelled:
            y[0], y[1] = targets.ids[0, 0], -100  # a label among the kept columns
        options = {"tail": tail, "divergence": divergence(name), "temperature": tau, "z_loss": 1e-3}
        more = {"alpha": 0.7, "label_smoothing": 0.1} if labelled else {}
        for isa in VARIANTS:
            choose(isa, monkeypatch)
            agree(s, targets, y, reduction="none", upstream=torch.rand(N), **options, **more)
            agree(s, targets, y, reduction="sum", **options, **({"alpha": 0.7} if labelled else {}))


@pytest.mark.parametrize("tau", TAUS)
def test_sampled_targets(monkeypatch, tau):
    for dtype in DTYPES:
        s, t, y = (2 * torch.randn(N, V)).to(dtype), 2 * torch.randn(N, V), torch.randint(V, (N,))
        targets = drawn(t, 12, tau)
        for isa in VARIANTS:
            choose(isa, monkeypatch)
            for reduction in ("none", "mean"):
                agree(s, targets, y, reduction=reduction, temperature=tau, alpha=0.6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_all_columns_kept_is_the_dense_loss(tail, name):
    if (tail, name) not in RULES:
        with pytest.raises(ValueError, match="divergence"):
            distill_loss(torch.randn(2, 5), top_k(torch.randn(2, 5), 5), tail=tail, divergence=name)
        return
    s, t = torch.randn(N, 90).requires_grad_(), torch.randn(N, 90)
    options = {"divergence": name, "temperature": 2.0, "backend": KERNEL}
    dense, sparse = distill_loss(s, t, **options), distill_loss(s, top_k(t, 90), tail=tail, **options)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)
    (want,), (got,) = (torch.autograd.grad(x, s) for x in (dense, sparse))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("height", [5.0, 12.0, 25.0, 40.0])
def test_a_student_that_is_sure(monkeypatch, name, height):
    """The tail's mass sinks below what 1 - sum p can hold, and is summed from its own columns."""
    t = torch.randn(N, V)
    targets = top_k(t, K)
    s = torch.randn(N, V).scatter_add(-1, targets.ids.long(), torch.full((N, K), height))
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        agree(s, targets, divergence=name, reduction="none", rtol=1e-4)


def sure_teacher(tail):
    """Log q over V columns, (N, V) fp64, to all digits: of one column, of K - 1 that share 20 tails, and of a tail."""
    shares = [torch.randn(N, n, dtype=torch.float64).log_softmax(-1) for n in (K - 1, V - K)]
    others = torch.cat([shares[0] + math.log(20 * tail), shares[1] + math.log(tail)], -1)
    return torch.cat([torch.log1p(-others.exp().sum(-1, keepdim=True)), others], -1)


def at_temperature(log_q, tau):
    """(log q at tau, logsumexp(log q / tau)), of rows whose first column is the largest, to all digits."""
    rest = ((log_q[:, 1:] - log_q[:, :1]) / tau).exp().sum(-1, keepdim=True).log1p()
    return (log_q - log_q[:, :1]) / tau - rest, log_q[:, :1] / tau + rest


def divergence_of(name, log_q, log_p):
    """By its definition, from log-probabilities of the outcomes, (..., K) -> (...)."""

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return {
        "forward_kl": kl(log_q, log_p),
        "reverse_kl": kl(log_p, log_q),
        "jsd": 0.5 * (kl(log_q, log_m) + kl(log_p, log_m)),
    }[name]


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_sure_teacher(backend, name, tau):
    """The tail's mass is what the largest lacks less that of the others, which all are small: it keeps its digits."""
    for tail in (1e-3, 1e-5, 1e-7, 1e-9):
        full = sure_teacher(tail)
        log_q, lse = at_temperature(full, tau)
        order, column = torch.rand(N, K).argsort(-1), torch.rand(N, V).argsort(-1)  # no rank nor column is told apart
        ids, values = column[:, :K].gather(-1, order).int(), full[:, :K].gather(-1, order).float()
        targets = SparseTargets(ids, values, vocab_size=V, lse={tau: lse[:, 0].float()})
        s = torch.randn(N, V).scatter_add(-1, column[:, :1], torch.full((N, 1), 9.0))
        leaf = s.clone().requires_grad_()
        loss = distill_loss(leaf, targets, divergence=name, temperature=tau, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)

        exact = s.double().requires_grad_()
        log_p = (exact / tau).log_softmax(-1).gather(-1, column)
        log_q, log_p = (torch.cat([x[:, :K], x[:, K:].logsumexp(-1, True)], -1) for x in (log_q, log_p))
        want = tau**2 * divergence_of(name, log_q, log_p)
        (want_grad,) = torch.autograd.grad(want.sum(), exact)
        # a student's tail is 1 less the others, so a few roundings near 1 off, and meets log q of the tail
        of_one = 2e-6 * (1 - math.log(tail))
        torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=of_one)
        error = (grad.double() - want_grad).abs().gather(-1, column)
        largest = want_grad.abs().amax(-1)
        assert (error[:, 0] <= 3e-5 * largest + of_one).all()
        assert (error[:, 1:].amax(-1) <= 1e-6 * largest + 1e-8).all()


def test_a_tail_below_what_entries_resolve():
    """It has the least of masses, on every backend, where its entries leave none."""
    t = torch.randn(N, V).double()
    t[:, 5:7] += 60  # two that share all
    s = torch.randn(N, V)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        agree(s, top_k(t, K), divergence=name, reduction="none", rtol=1e-4)


def test_one_entry_and_padding():
    s, t, y = torch.randn(N, V), torch.randn(N, V), torch.randint(V, (N,))
    agree(s, top_k(t, 1), y, reduction="none")
    full = top_k(t, K)
    k_eff = torch.randint(1, K, (N,), dtype=torch.int32)
    beyond = torch.arange(K) >= k_eff[:, None]
    ids, logprobs = full.ids.masked_fill(beyond, -1), full.logprobs.masked_fill(beyond, math.nan)
    padded = SparseTargets(ids, logprobs, vocab_size=V, lse=full.lse, k_eff=k_eff)
    for tail in ("bucket", "renorm", "zero"):
        agree(s, padded, y, tail=tail, temperature=2.0, reduction="none")


@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_no_entries(tail):
    """Everything is in the tail, and the divergence 0."""
    s, y = torch.randn(N, V), torch.randint(V, (N,))
    none = SparseTargets(torch.zeros(N, 0, dtype=torch.int32), torch.zeros(N, 0), vocab_size=V)
    agree(s, none, y, tail=tail, reduction="none", alpha=0.5)


def test_truncated_vocabulary_joins_the_tail():
    s, t = torch.randn(N, V), torch.randn(N, V + 40)
    t[:, V:] += 1.5  # many of the kept ones lie beyond, and one does not
    t[:, 3] += 9
    for student, teacher in ((s, t), (torch.randn(N, V + 60), t)):
        for tail in ("bucket", "renorm", "zero"):
            agree(student, top_k(teacher, K), torch.randint(V, (N,)), tail=tail, vocab="truncate", temperature=2.0)


def test_masked_columns():
    s, t = torch.randn(N, V), torch.randn(N, V)
    targets = top_k(t, K)
    s[:, 7], s[0, targets.ids[0, 2]] = -math.inf, -math.inf
    (loss, grad), (want, _) = both(s, targets, reduction="none")
    assert loss[0] == math.inf == want[0]
    torch.testing.assert_close(loss[1:], want[1:], rtol=2e-5, atol=1e-6)
    assert grad.isfinite().all()
    agree(s, targets, divergence="reverse_kl", reduction="none")
    agree(s, targets, divergence="jsd", reduction="none")


def test_nan_stays_in_its_token():
    s, t = torch.randn(N, V), torch.randn(N, V)
    for tail in ("bucket", "renorm", "zero"):
        clean, _ = both(s, top_k(t, K, shuffled=False), tail=tail, reduction="none")
        bad = s.clone()
        bad[1, 9] = math.nan
        (loss, grad), _ = both(bad, top_k(t, K, shuffled=False), tail=tail, reduction="none")
        others = torch.arange(N) != 1
        assert loss[1].isnan()
        assert grad[1].isnan().any()
        torch.testing.assert_close(loss[others], clean[0][others], rtol=0, atol=0)
        torch.testing.assert_close(grad[others], clean[1][others], rtol=0, atol=0)


def test_dropped_tokens_are_not_read():
    s, t, y = torch.randn(N, V), torch.randn(N, V), torch.randint(V, (N,))
    y[1] = -100
    full = top_k(t, K)
    ids = full.ids.clone()
    ids[1] = V + 9
    (loss, grad), _ = both(s, full, y, reduction="none")
    bad = SparseTargets(ids, full.logprobs, vocab_size=V)
    got = distill_loss(s.requires_grad_(), bad, y, reduction="none", backend=KERNEL)
    torch.testing.assert_close(got.double(), loss, rtol=0, atol=0)
    assert loss[1] == 0
    assert (grad[1] == 0).all()


# --- How the gradient comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_both_modes_and_overwriting_agree(name, dtype):
    s, y = torch.randn(N, V).to(dtype), torch.randint(V, (N,))
    targets = top_k(torch.randn(N, V), K)
    options = {"divergence": name, "temperature": 2.0, "backend": KERNEL}
    grads = []
    for reduction, overwrite in (("sum", False), ("none", False), ("sum", True), ("none", True)):
        leaf = s.clone().requires_grad_()
        loss = distill_loss(leaf, targets, y, reduction=reduction, overwrite_logits=overwrite, **options)
        grads.append(torch.autograd.grad(loss.sum(), leaf)[0].float())
        assert (grads[-1].data_ptr() == leaf.data_ptr()) == (overwrite and dtype == torch.float32)
    for g in grads[1:]:
        torch.testing.assert_close(g, grads[0], rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)


@pytest.mark.skipif(INTERPRETING, reason="of the threads of a CPU")
@pytest.mark.parametrize("rows", [1, 5])
def test_any_number_of_threads_gives_the_same_bits(threads, rows):
    s, y = torch.randn(rows, 40000), torch.randint(40000, (rows,))
    targets = top_k(torch.randn(rows, 40000), 64)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        leaf = s.clone().requires_grad_()
        loss = distill_loss(leaf, targets, y, temperature=2.0, backend=KERNEL)
        results.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    for value, grad in results[1:]:
        assert value == results[0][0]
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_as_student(reduction):
    hidden, weight = torch.randn(N, 12), torch.randn(V, 12)
    targets, y = top_k(torch.randn(N, V), K), torch.randint(V, (N,))
    y[1] = -100
    out = []
    for backend, dtype in ((KERNEL, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = distill_loss(
            LMHead(*leaves), targets, y, temperature=2.0, reduction=reduction, backend=backend, memory_budget=4 * V * 2
        )
        out.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for got, want in zip(*out, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 * want.abs().max().item())


def test_leading_axes():
    s, t, y = torch.randn(2, 3, V), torch.randn(2, 3, V), torch.randint(V, (2, 3))
    flat = top_k(t.flatten(0, 1), K)
    lse = {tau: x.view(2, 3) for tau, x in flat.lse.items()}
    targets = SparseTargets(flat.ids.view(2, 3, K), flat.logprobs.view(2, 3, K), vocab_size=V, lse=lse)
    (loss, grad), _ = both(s, targets, y, temperature=2.0, reduction="none")
    (want, want_grad), _ = both(s.flatten(0, 1), flat, y.flatten(), temperature=2.0, reduction="none")
    torch.testing.assert_close(loss.flatten(), want, rtol=0, atol=0)
    torch.testing.assert_close(grad.flatten(0, 1), want_grad, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph(reduction):
    s, y = torch.randn(N, V).requires_grad_(), torch.randint(V, (N,))
    targets = top_k(torch.randn(N, V), K)

    def loss(s, ids, logprobs, lse, y):
        given = SparseTargets(ids, logprobs, vocab_size=V, lse={2.0: lse})
        return distill_loss(s, given, y, temperature=2.0, reduction=reduction, backend=KERNEL)

    inputs = (s, targets.ids, targets.logprobs, targets.lse[2.0], y)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=TRACES, backend="aot_eager")):
        value = function(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), s)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_func_transforms():
    s, targets = torch.randn(N, V), top_k(torch.randn(N, V), K)
    leaf = s.clone().requires_grad_()
    (want,) = torch.autograd.grad(distill_loss(leaf, targets, backend=KERNEL), leaf)
    got = torch.func.grad(lambda z: distill_loss(z, targets, backend=KERNEL))(s)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    values = torch.func.vmap(lambda z: distill_loss(z, targets, backend=KERNEL))(torch.stack([s, 2 * s]))
    torch.testing.assert_close(values, torch.stack([distill_loss(z, targets, backend=KERNEL) for z in (s, 2 * s)]))


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [(V, rf"ids must be in \[0, {V}\).*got {V}"), (-2, "got -2"), (None, "duplicates.*stands there twice")],
)
def test_bad_ids(backend, bad, words, monkeypatch):
    if DEVICE != "cpu":
        monkeypatch.setenv("KDFAST_CHECK", "1")
    targets = top_k(torch.randn(N, V), K)
    ids = targets.ids.clone()
    ids[2, 3] = ids[2, 1] if bad is None else bad
    with pytest.raises(ValueError, match=words):
        distill_loss(torch.randn(N, V), SparseTargets(ids, targets.logprobs, vocab_size=V), backend=backend)
