"""The specification against formulas that were written without it: tables, scipy, numpy, and torch.nn.functional."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import CASES, expected, reported
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

from kdfast import DistillTerms, Divergence, LMHead, distill_loss

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.01, 1.0, 10.0])
temperatures = st.sampled_from([0.5, 1.0, 2.0, 3.7])
names = st.sampled_from(sorted(CASES))


def reference(*args, **options):
    return distill_loss(*args, backend="reference", **options)


def draw(seed, *shape, scale=1.0, grad=False):
    x = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)
    return x.requires_grad_(grad)


def pair(seed, n=4, v=9, scale=2.0, grad=False):
    return draw(seed, n, v, scale=scale, grad=grad), draw(seed + 1, n, v, scale=scale)


def gradient(student, *args, **options):
    student = student.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(reference(student, *args, **options), student)
    return g


# --- Tables -----------------------------------------------------------------------------------------------------------

# q = (1/2, 1/2), p = (3/4, 1/4); worked by hand
TABLE = [
    ("forward_kl", 0.14384103622589042),  # 1/2 ln 4/3
    ("reverse_kl", 0.13081203594113697),  # 3/4 ln 3/2 - 1/4 ln 2
    ("jsd", 0.033822075568605205),  # m = (5/8, 3/8)
    (Divergence("jsd", beta=0.25), 0.026048220951152518),  # m = (11/16, 5/16)
    (Divergence("jsd", beta=0.25, normalize=True), 0.026048220951152518 / 0.1875),
    ("skew_forward_kl", 0.11313672216156873),  # m = (0.725, 0.275)
    ("skew_reverse_kl", 0.10704273641095058),  # m = (0.525, 0.475)
    ("tvd", 0.25),
    (Divergence("alpha_div", a=0.5), 0.1362966948437272),  # 4 hellinger
    (Divergence("alpha_div", a=0.25), 0.1333158322236597),
    ("hellinger", 0.0340741737109318),  # 1 - sqrt(3/8) - sqrt(1/8)
    ({"tvd": 2.0, "forward_kl": 0.5}, 0.5 + 0.07192051811294521),
]


@pytest.mark.parametrize(("divergence", "value"), TABLE, ids=[str(k) for k in range(len(TABLE))])
def test_value_of_the_table(divergence, value):
    student = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    teacher = torch.tensor([[7.0, 7.0]], dtype=torch.float64)
    assert reference(student, teacher, divergence=divergence).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("divergence", "value"),
    [
        ("forward_kl", math.log(2)),  # q = (1, 0), p = (1/2, 1/2)
        ("reverse_kl", math.inf),
        ("jsd", 0.21576155433883565),  # 1/2 ln 4/3 + 1/4 ln 2/3 + 1/4 ln 2 = 3/4 ln 4/3
        ("tvd", 0.5),
        ("hellinger", 1 - math.sqrt(0.5)),
        (Divergence("alpha_div", a=0.5), 4 - 4 * math.sqrt(0.5)),
        ("skew_reverse_kl", 0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(0.5 / 0.05)),
    ],
)
def test_value_where_the_teacher_lacks_a_column(divergence, value):
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    assert reference(student, teacher, divergence=divergence).item() == pytest.approx(value, rel=1e-12)


def test_loss_of_the_table():
    """Z = (ln 3, 0), t = (0, 0), y = 1, tau = 2: every term of the loss by hand."""
    student = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    options = {"temperature": 2.0, "alpha": 0.25, "z_loss": 0.1, "return_terms": True}
    terms = reference(student, torch.zeros(1, 2).double(), torch.tensor([1]), **options)
    p = math.sqrt(3) / (math.sqrt(3) + 1)  # softmax(z / 2)
    kl = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert terms.soft.item() == pytest.approx(4 * kl, rel=1e-12)
    assert terms.hard.item() == pytest.approx(math.log(4), rel=1e-12)
    whole = 0.25 * 4 * kl + 0.75 * math.log(4) + 0.1 * math.log(4) ** 2
    assert terms.z.item() == pytest.approx(0.1 * math.log(4) ** 2, rel=1e-12)
    assert terms.loss.item() == pytest.approx(whole, rel=1e-12)


# --- Values by scipy, numpy and torch.nn.functional -------------------------------------------------------------------


@given(seeds, names, temperatures, scales, st.sampled_from(["mean", "sum", "none"]))
def test_divergence_by_formula(seed, name, tau, scale, reduction):
    s, t = pair(seed, scale=scale)
    case = CASES[name]
    got = reference(s, t, divergence=case.argument, temperature=tau, reduction=reduction)
    want = expected(s, t, terms=case.terms, temperature=tau, reduction=reduction)[0]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-13)


@given(seeds, st.data())
def test_every_option_by_formula(seed, data):
    n, v = data.draw(st.tuples(st.integers(1, 6), st.integers(2, 12)))
    s, t = pair(seed, n, v)
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.integers(0, v, n))
    options = {
        "temperature": data.draw(temperatures),
        "scale_t2": data.draw(st.booleans()),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": data.draw(st.sampled_from([0.0, 1e-2])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if data.draw(st.booleans()):
        options["weights"] = torch.tensor(rng.choice([0.0, 0.3, 1.0, 2.0], n))
    if data.draw(st.booleans()):
        labels[torch.tensor(rng.random(n) < 0.3)] = -7
        options["ignore_index"] = -7
    kind = data.draw(st.sampled_from(["none", "float", "tensor"]))
    if kind == "float":
        options["alpha"] = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    elif kind == "tensor":
        options["alpha"] = torch.tensor(rng.choice([0.0, 0.4, 1.0], n))
    if options["reduction"] == "mean" and data.draw(st.booleans()):
        options["num_items"] = 5.5
    case = CASES[data.draw(names)]
    got = reference(s, t, labels, divergence=case.argument, return_terms=True, **options)
    want = expected(s, t, labels, terms=case.terms, **options)
    for g, w in zip(reported(got), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12)


def test_jsd_is_the_square_of_scipys_distance():
    s, t = pair(3)
    p, q = softmax(s.numpy(), -1), softmax(t.numpy(), -1)
    got = reference(s, t, divergence="jsd", reduction="none")
    np.testing.assert_allclose(got.numpy(), jensenshannon(q, p, axis=-1) ** 2, rtol=1e-10)


def test_relation_to_torch_kl_div():
    s, t = pair(5, 32, 100)
    tau = 4.0
    kl = F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction="batchmean")
    assert reference(s, t, temperature=tau, scale_t2=False).item() == pytest.approx(kl.item(), rel=1e-10)
    assert reference(s, t, temperature=tau).item() == pytest.approx(tau**2 * kl.item(), rel=1e-10)


def test_the_eager_formula_of_the_readme():
    s, t = pair(7, 32, 100)
    y, tau, alpha = torch.randint(100, (32,)), 2.0, 0.7
    kl = F.kl_div(F.log_softmax(s / tau, -1), F.log_softmax(t / tau, -1), log_target=True, reduction="batchmean")
    want = alpha * tau * tau * kl + (1 - alpha) * F.cross_entropy(s, y)
    assert reference(s, t, y, temperature=tau, alpha=alpha).item() == pytest.approx(want.item(), rel=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hard_term_is_torch_cross_entropy(smoothing, reduction):
    s, y = draw(11, 20, 7, scale=3.0), torch.randint(7, (20,))
    y[::3] = -100
    got = reference(s, labels=y, label_smoothing=smoothing, reduction=reduction)
    want = F.cross_entropy(s, y, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient(s, labels=y, label_smoothing=smoothing, reduction="sum"),
        torch.autograd.functional.jacobian(
            lambda x: F.cross_entropy(x, y, label_smoothing=smoothing, reduction="sum"), s
        ),
    )


def test_label_smoothing_leaves_out_masked_columns():
    s = draw(13, 5, 8)
    s[:, 6:] = -math.inf
    y = torch.randint(6, (5,))
    got = reference(s, labels=y, label_smoothing=0.2)
    assert got.item() == pytest.approx(F.cross_entropy(s[:, :6], y, label_smoothing=0.2).item(), rel=1e-12)


def test_z_loss_is_the_squared_logsumexp():
    s, t = pair(17)
    plain, with_z = (reference(s, t, z_loss=z, reduction="none") for z in (0.0, 0.5))
    torch.testing.assert_close(with_z - plain, 0.5 * torch.logsumexp(s, -1) ** 2)
    as_tensor = reference(s, t, z_loss=torch.tensor(0.5, dtype=torch.float64), reduction="none")
    torch.testing.assert_close(as_tensor, with_z)


# --- Properties -------------------------------------------------------------------------------------------------------


@given(seeds, names, temperatures, scales)
def test_zero_at_equality_with_zero_gradient(seed, name, tau, scale):
    s = draw(seed, 3, 11, scale=scale)
    options = {"divergence": CASES[name].argument, "temperature": tau}
    assert reference(s, s.clone(), **options).abs().item() <= 1e-13
    assert gradient(s, s.clone(), **options).abs().max().item() <= 1e-13
    shifted = s + 5.0  # a distribution does not see a shift
    assert reference(s, shifted, **options).abs().item() <= 1e-12


@given(seeds, names, temperatures, scales, st.sampled_from([torch.float32, torch.float64]))
def test_never_negative(seed, name, tau, scale, dtype):
    s, t = (x.to(dtype) for x in pair(seed, scale=scale))
    # alpha_div ends in a sum of rounded terms of either sign
    loss = reference(s, s + 1e-4 * t, divergence=CASES[name].argument, temperature=tau, reduction="none")
    assert loss.min().item() >= (-1e-5 if dtype == torch.float32 else -1e-12)
    assert reference(s, t, divergence=CASES[name].argument, temperature=tau, reduction="none").min().item() >= -1e-5


@given(seeds, st.sampled_from(["forward_kl", "reverse_kl", "jsd", "jsd-0.2", "tvd", "hellinger"]))
def test_exactly_non_negative_in_single_precision(seed, name):
    s, t = (x.float() for x in pair(seed, 8, 50))
    for small in (1e-6, 1e-3, 1.0):
        assert reference(s, s + small * t, divergence=CASES[name].argument, reduction="none").min().item() >= 0


@given(seeds, names, st.floats(1.5, 8.0))
def test_temperature_squared(seed, name, tau):
    s, t = pair(seed)
    options = {"divergence": CASES[name].argument, "temperature": tau}
    plain, scaled = (gradient(s, t, scale_t2=x, **options) for x in (False, True))
    torch.testing.assert_close(scaled, plain * tau**2)
    # the gradient at (z, t, tau) without tau^2 is that at (z / tau, t / tau, 1), over tau
    torch.testing.assert_close(plain, gradient(s / tau, t / tau, divergence=CASES[name].argument) / tau)


def test_gradient_keeps_its_size_at_high_temperature():
    s, t = pair(19, 16, 50)
    s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
    hot = gradient(s, t, temperature=1e4, reduction="sum")
    torch.testing.assert_close(hot, (s - t) / 50, rtol=1e-3, atol=1e-4)  # Hinton: (z - t) / V at the limit


@given(seeds)
def test_limits_of_normalized_jsd(seed):
    s, t = pair(seed, scale=1.0)
    for beta, limit in ((1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")):
        got = reference(s, t, divergence=Divergence("jsd", beta=beta, normalize=True))
        assert got.item() == pytest.approx(reference(s, t, divergence=limit).item(), rel=1e-4, abs=1e-6)


@given(seeds)
def test_limits_of_alpha_div_and_skew(seed):
    s, t = pair(seed, scale=1.0)
    near = {
        "reverse_kl": [Divergence("alpha_div", a=1e-6), Divergence("skew_reverse_kl", lam=1e-6)],
        "forward_kl": [Divergence("alpha_div", a=1 - 1e-6), Divergence("skew_forward_kl", lam=1e-6)],
    }
    for limit, divergences in near.items():
        want = reference(s, t, divergence=limit).item()
        for d in divergences:
            assert reference(s, t, divergence=d).item() == pytest.approx(want, rel=1e-3, abs=1e-5), d


def test_alpha_div_at_one_half_is_four_hellinger():
    s, t = pair(23)
    got = reference(s, t, divergence=Divergence("alpha_div", a=0.5))
    assert got.item() == pytest.approx(4 * reference(s, t, divergence="hellinger").item(), rel=1e-10)


def test_jsd_has_no_jump_near_its_ends():
    s, t = pair(29, 32, 100)
    values = [reference(s, t, divergence=Divergence("jsd", beta=b)).item() for b in np.geomspace(1e-4, 0.5, 40)]
    assert all(0 < a < b < 1.3 * a for a, b in itertools.pairwise(values))
    near = [reference(s, t, divergence=Divergence("jsd", beta=b, normalize=True)).item() for b in (1e-4, 1e-3)]
    assert near[0] == pytest.approx(near[1], rel=0.1)


def test_jsd_beta_weights_the_teacher():
    s, t = pair(31)
    p, q = softmax(s.numpy(), -1), softmax(t.numpy(), -1)
    m = 0.2 * q + 0.8 * p
    want = (0.2 * rel_entr(q, m) + 0.8 * rel_entr(p, m)).sum(-1)
    got = reference(s, t, divergence=Divergence("jsd", beta=0.2), reduction="none")
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)
    swapped = reference(s, t, divergence=Divergence("jsd", beta=0.8), reduction="none")
    assert (got - swapped).abs().min().item() > 1e-6


@given(seeds)
def test_mixture_is_the_weighted_sum(seed):
    s, t = pair(seed)
    parts = {"forward_kl": 0.3, "reverse_kl": 0.0, Divergence("jsd", beta=0.3): 2.0, "hellinger": 1.5}
    want = sum(w * reference(s, t, divergence=d) for d, w in parts.items())
    assert reference(s, t, divergence=parts).item() == pytest.approx(want.item(), rel=1e-12)
    total = sum(w * gradient(s, t, divergence=d) for d, w in parts.items())
    torch.testing.assert_close(gradient(s, t, divergence=parts), total)


@given(seeds, st.integers(1, 4))
def test_micro_batches_sum_to_the_whole(seed, pieces):
    s, t = pair(seed, 12)
    y = torch.arange(12) % 9
    y[:5] = -100
    w = torch.linspace(0.0, 2.0, 12, dtype=torch.float64)
    options = {"temperature": 2.0, "z_loss": 0.01}
    counted = w[y != -100].sum()
    whole = reference(s, t, y, weights=w, **options)
    parts = [
        reference(a, b, c, weights=d, num_items=counted, **options)
        for a, b, c, d in zip(*(x.tensor_split(pieces) for x in (s, t, y, w)), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_mean_is_over_tokens_never_over_columns():
    s, t = pair(37, 32, 100)
    per_token = reference(s, t, temperature=4.0, reduction="none")
    assert per_token.shape == (32,)
    assert reference(s, t, temperature=4.0).item() == pytest.approx(per_token.sum().item() / 32, rel=1e-12)
    wide = torch.cat([s, torch.full((32, 900), -math.inf).double()], -1)
    wide_t = torch.cat([t, torch.full((32, 900), -math.inf).double()], -1)
    assert reference(wide, wide_t, temperature=4.0).item() == pytest.approx(per_token.mean().item(), rel=1e-12)


def test_leading_axes_do_not_matter():
    s, t = pair(41, 12, 5)
    y, w = torch.arange(12) % 5, torch.rand(12).double()
    flat = reference(s, t, y, weights=w)
    cube = reference(s.view(2, 3, 2, 5), t.view(2, 3, 2, 5), y.view(2, 3, 2), weights=w.view(2, 3, 2))
    assert cube.item() == pytest.approx(flat.item(), rel=1e-12)
    assert reference(s[0], t[0], y[0]).item() == pytest.approx(reference(s[:1], t[:1], y[:1]).item(), rel=1e-12)


# --- Ensembles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ["prob", "logit"])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], "per token"])
def test_ensemble_by_formula(ensemble, weights):
    s, teachers = draw(43, 6, 8), [draw(k, 6, 8, scale=2.0) for k in range(3)]
    weights = torch.rand(3, 6, dtype=torch.float64) if weights == "per token" else weights
    options = {"teacher_weights": weights, "ensemble": ensemble, "temperature": 1.7, "reduction": "none"}
    for case in CASES.values():
        got = reference(s, teachers, divergence=case.argument, **options)
        want = expected(s, teachers, terms=case.terms, **options)[0]
        # ensemble weights are kept in fp32
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("ensemble", ["prob", "logit"])
def test_ensembles_that_are_one_teacher(ensemble):
    s, t = pair(47)
    want = reference(s, t, temperature=2.0).item()
    one = reference(s, [t], temperature=2.0, ensemble=ensemble, teacher_weights=[3.0])
    same = reference(s, [t, t, t], temperature=2.0, ensemble=ensemble)
    scaled = reference(s, (t, t), temperature=2.0, ensemble=ensemble, teacher_weights=torch.tensor([2.0, 6.0]))
    assert [x.item() for x in (one, same, scaled)] == pytest.approx([want] * 3, rel=1e-6)


# --- Vocabulary, heads, reported terms --------------------------------------------------------------------------------


@pytest.mark.parametrize(("v", "vt"), [(10, 7), (7, 10)])
def test_truncated_vocabulary(v, vt):
    s, t, y = draw(53, 4, v), draw(54, 4, vt), torch.tensor([0, 6, v - 1, -100])
    case = CASES["jsd-0.2"]
    options = {"z_loss": 0.1, "temperature": 2.0}
    got = reference(s, t, y, divergence=case.argument, vocab="truncate", return_terms=True, **options)
    want = expected(s, t, y, terms=case.terms, **options)
    assert [x.item() for x in reported(got)] == pytest.approx(list(want), rel=1e-10)
    full = reference(s[:, :7], t[:, :7], divergence=case.argument, temperature=2.0)
    alone = reference(s, t, divergence=case.argument, vocab="truncate", temperature=2.0)
    assert alone.item() == pytest.approx(full.item(), rel=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.25), (3.0, 2.0)])
def test_lm_head_equals_its_logits(bias, softcap, scale):
    hidden, weight, y = draw(59, 2, 3, 6), draw(61, 11, 6), torch.randint(11, (2, 3))
    b = draw(67, 11) if bias else None
    t = draw(71, 2, 3, 11)
    leaves = [x.requires_grad_() for x in (hidden, weight, b) if x is not None]
    loss = reference(LMHead(hidden, weight, b, softcap=softcap, scale=scale), t, y, temperature=2.0)
    grads = torch.autograd.grad(loss, leaves)
    z = hidden @ weight.T + (0 if b is None else b)
    z = z * scale  # the scale comes first
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    again = reference(z, t, y, temperature=2.0)
    assert loss.item() == pytest.approx(again.item(), rel=1e-12)
    for got, want in zip(grads, torch.autograd.grad(again, leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_lm_head_as_teacher():
    s, hidden, weight = draw(73, 4, 11), draw(79, 4, 6), draw(83, 11, 6)
    head = LMHead(hidden, weight, softcap=5.0)
    want = reference(s, 5.0 * torch.tanh(hidden @ weight.T / 5.0))
    assert reference(s, head).item() == pytest.approx(want.item(), rel=1e-12)
    assert reference(s, [head, head]).item() == pytest.approx(want.item(), rel=1e-6)


def test_reported_terms():
    s, t = pair(89, grad=True)
    y = torch.tensor([0, 1, -100, 3])
    terms = reference(s, t, y, temperature=3.0, alpha=0.3, return_terms=True)
    assert isinstance(terms, DistillTerms)
    assert terms.loss.requires_grad
    assert not terms.soft.requires_grad
    assert not terms.hard.requires_grad
    other = reference(s, t, y, temperature=3.0, alpha=0.9, return_terms=True)
    assert (other.soft, other.hard) == (terms.soft, terms.hard)  # before alpha
    assert terms.loss.item() == pytest.approx((0.3 * terms.soft + 0.7 * terms.hard).item(), rel=1e-12)
    bare = reference(s, t, y, temperature=3.0, scale_t2=False, return_terms=True)
    assert 9 * bare.soft.item() == pytest.approx(terms.soft.item(), rel=1e-12)
    assert reference(s, t, return_terms=True).hard is None
    assert reference(s, labels=y, return_terms=True).soft is None
    # the terms are reported even where alpha leaves them out of the loss
    assert reference(s, t, y, alpha=0.0, return_terms=True).soft.item() > 0
    assert reference(s, t, y, alpha=1.0, return_terms=True).hard.item() > 0


def test_unlabelled_tokens():
    """Alpha = 1 marks a token without a label: what stands in its place is not read."""
    s, t = pair(97)
    y, alpha = torch.tensor([2, 10**6, -5, 3]), torch.tensor([0.25, 1.0, 1.0, 0.0], dtype=torch.float64)
    got = reference(s, t, y, alpha=alpha, reduction="none", return_terms=True)
    soft = reference(s, t, reduction="none")
    hard = F.cross_entropy(s, torch.tensor([2, 0, 0, 3]), reduction="none") * torch.tensor([1, 0, 0, 1])
    torch.testing.assert_close(got.loss, alpha * soft + (1 - alpha) * hard)
    torch.testing.assert_close(got.hard, hard)


def test_teacher_takes_no_gradient_by_default():
    s, t = pair(101, grad=True)
    t.requires_grad_()
    reference(s, t).backward()
    assert t.grad is None
    reference(s, t, teacher_grad=True).backward()
    assert t.grad.abs().sum() > 0


def test_dtypes_of_the_result():
    s, t = pair(103)
    assert reference(s, t).dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = s.to(dtype).requires_grad_()
        loss = reference(x, t)
        loss.backward()
        assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("number", [np.float32, np.float16, np.float64])
def test_numpy_scalars_are_numbers(backend, number):
    s, t, y = torch.randn(3, 9), torch.randn(3, 9), torch.randint(9, (3,))
    options = {"temperature": 2.0, "alpha": 0.25, "z_loss": 0.5, "label_smoothing": 0.125, "num_items": 2.0}
    results = []
    for of in (float, number):
        leaf = s.clone().requires_grad_()
        divergence = {Divergence("jsd", beta=of(0.25)): of(2.0), "forward_kl": of(0.5)}
        given = {name: of(value) for name, value in options.items()} | {"divergence": divergence}
        loss = distill_loss(leaf, t, y, backend=backend, **given)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
