"""Sparse targets through the specification: the three tails, captured temperatures, sampled masses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import CASES
from scipy.special import log_softmax, rel_entr, softmax

from kdfast import Divergence, SparseTargets, distill_loss

N, V, K = 5, 12, 4
TAUS = (1.0, 2.0, 4.0)


def top_k(logits, k, temperatures=TAUS, dtype=torch.float64):
    """Top-k targets of logits, made by hand: numpy's order, scipy's log_softmax."""
    z = logits.double().numpy()
    logprobs = log_softmax(z, -1)
    ids = np.argsort(-z, -1)[..., :k]
    lse = {t: torch.tensor(np.log(np.exp(logprobs / t).sum(-1)), dtype=dtype) for t in temperatures if t != 1}
    return SparseTargets(
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(np.take_along_axis(logprobs, ids, -1), dtype=dtype),
        vocab_size=z.shape[-1],
        lse=lse,
    )


@pytest.fixture
def logits():
    return 2 * torch.randn(N, V, dtype=torch.float64), 2 * torch.randn(N, V, dtype=torch.float64)


def loss_of(student, targets, **options):
    return distill_loss(student, targets, **{"backend": "reference", "reduction": "none"} | options)


def gradient(student, targets, **options):
    z = student.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(z, targets, **options).sum(), z)
    return g.numpy()


def kept(targets):
    """(N, V) bool: the columns that the targets keep."""
    out = np.zeros((N, V), bool)
    np.put_along_axis(out, targets.ids.numpy().astype(int), True, -1)
    return out


# --- Top-k: values and the gradients of the table ---------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
def test_bucket(logits, tau):
    """K + 1 outcomes; inside the gradient is exactly p - t, outside p (M - P) / (1 - P)."""
    s, t = logits
    targets = top_k(t, K)
    q, p, inside = softmax(t.numpy() / tau, -1), softmax(s.numpy() / tau, -1), kept(targets)
    mass_q, mass_p = (np.where(inside, x, 0).sum(-1, keepdims=True) for x in (q, p))
    want = np.where(inside, rel_entr(q, p), 0).sum(-1) + rel_entr(1 - mass_q, 1 - mass_p)[:, 0]
    got = loss_of(s, targets, temperature=tau)
    np.testing.assert_allclose(got.numpy(), tau**2 * want, rtol=1e-9, atol=1e-12)
    table = np.where(inside, p - q, p * (mass_q - mass_p) / (1 - mass_p))
    np.testing.assert_allclose(gradient(s, targets, temperature=tau), tau * table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_renorm(logits, tau):
    s, t = logits
    targets = top_k(t, K)
    q, p, inside = softmax(t.numpy() / tau, -1), softmax(s.numpy() / tau, -1), kept(targets)
    scaled = np.where(inside, q, 0) / np.where(inside, q, 0).sum(-1, keepdims=True)
    got = loss_of(s, targets, temperature=tau, tail="renorm", scale_t2=False)
    np.testing.assert_allclose(got.numpy(), rel_entr(scaled, p).sum(-1), rtol=1e-9, atol=1e-12)
    grad = gradient(s, targets, temperature=tau, tail="renorm", scale_t2=False)
    np.testing.assert_allclose(grad, (p - scaled) / tau, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_zero(logits, tau):
    s, t = logits
    targets = top_k(t, K)
    q, p, inside = softmax(t.numpy() / tau, -1), softmax(s.numpy() / tau, -1), kept(targets)
    head = np.where(inside, q, 0)
    got = loss_of(s, targets, temperature=tau, tail="zero")
    np.testing.assert_allclose(got.numpy(), tau**2 * (head * np.log(q / p)).sum(-1), rtol=1e-9, atol=1e-12)
    table = head.sum(-1, keepdims=True) * p - head
    np.testing.assert_allclose(gradient(s, targets, temperature=tau, tail="zero"), tau * table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "mixture"])
def test_bucket_of_other_divergences_by_formula(logits, name):
    s, t = logits
    targets = top_k(t, K)
    divergence = {"forward_kl": 0.3, "reverse_kl": 1.5} if name == "mixture" else name
    q, p, inside = softmax(t.numpy(), -1), softmax(s.numpy(), -1), kept(targets)

    def outcomes(x):
        head = x[inside].reshape(N, K)
        return np.concatenate([head, 1 - head.sum(-1, keepdims=True)], -1)

    q, p = outcomes(q), outcomes(p)
    m = (p + q) / 2
    forward, reverse = rel_entr(q, p).sum(-1), rel_entr(p, q).sum(-1)
    jsd = (rel_entr(q, m) + rel_entr(p, m)).sum(-1) / 2
    want = {"reverse_kl": reverse, "jsd": jsd, "mixture": 0.3 * forward + 1.5 * reverse}[name]
    np.testing.assert_allclose(loss_of(s, targets, divergence=divergence).numpy(), want, rtol=1e-9, atol=1e-12)


def test_bucket_is_a_lower_bound_that_grows_with_k(logits):
    s, t = logits
    values = torch.stack([loss_of(s, top_k(t, k)) for k in range(1, V + 1)])
    assert (values.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(values[-1], loss_of(s, t))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_all_entries_are_the_dense_loss(logits, tail, tau):
    s, t = logits
    targets = top_k(t, V)
    options = {"temperature": tau, "reduction": "none"}
    want = distill_loss(s, t, backend="reference", **options)
    torch.testing.assert_close(loss_of(s, targets, tail=tail, **options), want, rtol=1e-9, atol=1e-11)
    dense = gradient(s, t, temperature=tau)
    np.testing.assert_allclose(gradient(s, targets, tail=tail, temperature=tau), dense, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "jsd-0.2", "jsd-normalized"])
def test_zero_at_equality(logits, name):
    _, t = logits
    for tau in TAUS:
        targets = top_k(t, K)
        loss = loss_of(t + 3.0, targets, divergence=CASES[name].argument, temperature=tau)
        assert loss.abs().max() < 1e-12
        assert np.abs(gradient(t, targets, divergence=CASES[name].argument, temperature=tau)).max() < 1e-12


def test_single_precision_of_a_full_head():
    """A head that holds all but 1e-7 of the mass: the tail must not come out negative or NaN."""
    t = torch.zeros(2, 1000)
    t[:, :3] = torch.tensor([30.0, 29.0, 28.0])
    targets = top_k(t, 8, dtype=torch.float32)
    for student in (t.clone(), t + 0.1 * torch.randn(2, 1000), torch.randn(2, 1000)):
        for name in ("forward_kl", "reverse_kl", "jsd"):
            z = student.clone().requires_grad_()
            loss = loss_of(z, targets, divergence=name)
            (grad,) = torch.autograd.grad(loss.sum(), z)
            assert (loss > -1e-6).all(), name
            assert loss.isfinite().all(), name
            assert grad.isfinite().all(), name


def test_gradcheck(logits):
    s, t = (x[:2] for x in logits)
    targets = top_k(t, 3)
    for tail, names in {
        "bucket": ["forward_kl", "reverse_kl", "jsd"],
        "renorm": ["forward_kl", "jsd"],
        "zero": ["forward_kl"],
    }.items():
        for name in names:
            options = {"tail": tail, "divergence": name, "temperature": 2.0}
            assert torch.autograd.gradcheck(lambda z, o=options: loss_of(z, targets, **o), s.clone().requires_grad_())
    tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)  # renorm takes any temperature, a learned one too
    assert torch.autograd.gradcheck(
        lambda z, x: loss_of(z, targets, tail="renorm", temperature=x), (s.clone().requires_grad_(), tau)
    )


# --- With the rest of the loss ----------------------------------------------------------------------------------------


def test_with_labels_weights_and_dropped_tokens(logits):
    s, t = (x.clone() for x in logits)
    targets, y = top_k(t, K), torch.tensor([0, 3, -100, 11, 5])
    w = torch.tensor([1.0, 0.5, 3.0, 0.0, 2.0], dtype=torch.float64)
    soft = loss_of(s, targets, temperature=2.0)
    hard = torch.nn.functional.cross_entropy(s, y, reduction="none")
    counted = w * (y != -100)
    want = (counted * (0.3 * soft + 0.7 * hard)).sum() / counted.sum()
    s[2], s[3] = math.nan, math.nan
    z = s.requires_grad_()
    got = loss_of(z, targets, labels=y, alpha=0.3, weights=w, temperature=2.0, reduction="mean")
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, z)
    assert (grad[2:4] == 0).all()
    assert grad.isfinite().all()


def test_unused_entries(logits):
    """Entries past k_eff hold id -1 and any logprob."""
    s, t = logits
    targets = top_k(t, K)
    ids, logprobs = targets.ids.clone(), targets.logprobs.clone()
    ids[:, 2:], logprobs[:, 2:] = -1, math.nan
    shorter = SparseTargets(ids, logprobs, vocab_size=V, k_eff=torch.full((N,), 2, dtype=torch.int32))
    for tail in ("bucket", "renorm", "zero"):
        torch.testing.assert_close(loss_of(s, shorter, tail=tail), loss_of(s, top_k(t, 2), tail=tail))
        np.testing.assert_allclose(gradient(s, shorter, tail=tail), gradient(s, top_k(t, 2), tail=tail), atol=1e-12)


def test_ids_beyond_a_truncated_vocabulary_join_the_tail(logits):
    s, t = logits
    targets, columns = top_k(t, K), 9
    q, inside = softmax(t.numpy(), -1)[:, :columns], kept(targets)[:, :columns]
    p = softmax(s[:, :columns].numpy(), -1)
    tails = [1 - np.where(inside, x, 0).sum(-1) for x in (q, p)]
    want = np.where(inside, rel_entr(q, p), 0).sum(-1) + rel_entr(*tails)
    got = loss_of(s[:, :columns], targets, vocab="truncate")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)


def test_a_student_with_more_columns(logits):
    """The distillation term runs over the common columns; cross-entropy over all of the student's."""
    s, t = logits
    wide = torch.cat([s, torch.randn(N, 3, dtype=torch.float64)], -1)
    y = torch.tensor([14, 0, 1, 2, 3])
    got = loss_of(wide, top_k(t, K), labels=y, vocab="truncate", return_terms=True)
    torch.testing.assert_close(got.soft, loss_of(s, top_k(t, K)))
    torch.testing.assert_close(got.hard, torch.nn.functional.cross_entropy(wide, y, reduction="none"))


def test_only_captured_temperatures(logits):
    s, t = logits
    targets = top_k(t, K)
    assert targets.temperatures == TAUS
    with pytest.raises(ValueError, match=r"temperature 3 .*1, 2, 4"):
        loss_of(s, targets, temperature=3.0)
    assert loss_of(s, targets, temperature=3.0, tail="renorm").isfinite().all()
    tensor = torch.tensor(2.0)
    with pytest.raises(ValueError, match=r"pass a number, or a tensor with tail=\"renorm\""):
        loss_of(s, targets, temperature=tensor)
    renormalised = [loss_of(s, targets, temperature=tau, tail="renorm") for tau in (2.0, tensor)]
    torch.testing.assert_close(*renormalised)


# --- Sampled targets --------------------------------------------------------------------------------------------------


def multinomial(t, draws):
    """Counts drawn by numpy, as targets; beside them the dense counts / draws."""
    q = softmax(t.numpy(), -1)
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    counts = np.stack([rng.multinomial(draws, row / row.sum()) for row in q])
    k = int((counts > 0).sum(-1).max())
    ids = np.argsort(-counts, -1, kind="stable")[:, :k]
    mass = np.take_along_axis(counts, ids, -1) / draws
    neg_entropy = (counts / draws * np.log(q)).sum(-1)
    targets = SparseTargets(
        torch.tensor(np.where(mass > 0, ids, -1), dtype=torch.int32),
        None,
        vocab_size=V,
        method="sample",
        mass=torch.tensor(mass),
        neg_entropy=torch.tensor(neg_entropy),
    )
    return targets, counts / draws, q


def test_sampled_gradient_is_p_minus_the_shares(logits):
    s, t = logits
    targets, shares, q = multinomial(t, 50)
    p = softmax(s.numpy(), -1)
    np.testing.assert_allclose(gradient(s, targets), p - shares, rtol=1e-9, atol=1e-12)
    want = (shares * (np.log(q) - np.log(p))).sum(-1)
    np.testing.assert_allclose(loss_of(s, targets).numpy(), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(targets.dense().numpy(), shares)
    weighted = loss_of(s, targets, divergence={"forward_kl": 0.25})
    np.testing.assert_allclose(weighted.numpy(), 0.25 * want, rtol=1e-9)


def test_sampled_loss_is_an_unbiased_kl(logits):
    s, t = logits
    draws = torch.stack([loss_of(s, multinomial(t, 20)[0]) for _ in range(400)])
    error = (draws.mean(0) - loss_of(s, t)).abs()
    assert (error < 6 * draws.std(0) / 20).all()  # six standard errors


def test_threshold_sampling_gradient(logits):
    """Weights that need not sum to 1: (sum w) p - w."""
    s, _ = logits
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)]).to(torch.int32)
    mass = torch.rand(N, K, dtype=torch.float64)
    options = {"method": "pps", "mass": mass, "neg_entropy": torch.zeros(N, dtype=torch.float64)}
    targets = SparseTargets(ids, None, vocab_size=V, **options)
    w = targets.dense().numpy()
    want = w.sum(-1, keepdims=True) * softmax(s.numpy(), -1) - w
    np.testing.assert_allclose(gradient(s, targets), want, rtol=1e-9, atol=1e-12)


# --- The container ----------------------------------------------------------------------------------------------------


def test_dense(logits):
    _, t = logits
    targets = top_k(t, K)
    want = np.where(kept(targets), softmax(t.numpy(), -1), 0)
    np.testing.assert_allclose(targets.dense().numpy(), want, rtol=1e-12)
    assert targets.shape == (N, K)


def test_slicing_and_stacking(logits):
    s, t = logits
    targets = top_k(t, K)
    parts = [targets[k] for k in range(N)]
    assert parts[0].shape == (K,)
    assert parts[0].lse[2.0].shape == ()
    again = SparseTargets.stack(parts)
    torch.testing.assert_close(again.dense(), targets.dense())
    torch.testing.assert_close(loss_of(s, again, temperature=2.0), loss_of(s, targets, temperature=2.0))
    torch.testing.assert_close(
        loss_of(s[1:4], targets[1:4], temperature=4.0), loss_of(s, targets, temperature=4.0)[1:4]
    )
    mask = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(loss_of(s[mask], targets[mask]), loss_of(s, targets)[mask])
    with pytest.raises(IndexError, match="at most 1"):
        targets[0, 0]
    with pytest.raises(IndexError, match=r"\.\.\."):
        targets[..., 0]


def test_stacking_what_does_not_fit(logits):
    _, t = logits
    targets = top_k(t, K)
    others = {
        "temperatures": top_k(t, K, temperatures=(1.0, 2.0)),
        r"shapes .* got \[\(5, 3\), \(5, 4\)\]: pad ids with -1": top_k(t, K - 1),
        "vocab_size": SparseTargets(targets.ids, targets.logprobs, vocab_size=V + 1, lse=targets.lse),
        "missing": SparseTargets(
            targets.ids, targets.logprobs, vocab_size=V, lse=targets.lse, gold_logprob=torch.zeros(N)
        ),
    }
    for fragment, other in others.items():
        with pytest.raises(ValueError, match=fragment):
            SparseTargets.stack([targets, other])
    with pytest.raises(ValueError, match="at least one"):
        SparseTargets.stack([])


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [(0, ValueError, "at least 1, got 0"), (-3, ValueError, "got -3"), (9.0, TypeError, "an int.*got 9.0"),
     (True, TypeError, "got True"), (None, TypeError, "got None")],
)  # fmt: skip
def test_vocabulary_sizes_that_cannot_be_meant(size, error, words):
    with pytest.raises(error, match=f"vocab_size must be .*{words}"):
        SparseTargets(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3), vocab_size=size)


def test_numpy_sizes_are_sizes():
    targets = SparseTargets(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1), vocab_size=np.int64(9))
    assert type(targets.vocab_size) is int
    assert targets.dense().shape == (2, 9)


def test_moving(logits):
    _, t = logits
    moved = top_k(t, K).to("meta")
    assert {x.device.type for x in (moved.ids, moved.logprobs, *moved.lse.values())} == {"meta"}
    assert moved.vocab_size == V
    same = top_k(t, K).to(torch.device("cpu"))
    torch.testing.assert_close(same.dense(), top_k(t, K).dense())


def test_jsd_beta_weights_the_teacher(logits):
    s, t = logits
    options = {"divergence": Divergence("jsd", beta=0.2)}
    torch.testing.assert_close(
        loss_of(s, top_k(t, V), **options), distill_loss(s, t, backend="reference", reduction="none", **options)
    )
