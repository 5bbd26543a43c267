"""The edges of the mathematics, on every backend and every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from formulas import CASES, expected, untie
from machine import INTERPRETING

from kdfast import distill_loss

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("poisoned")


def run(backend, student, teacher=None, labels=None, **options):
    """Loss and gradient; the caller's tensors must come out as they went in."""
    given = [x for x in (student, teacher, labels) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in given]
    leaf = student.detach().requires_grad_()
    loss = distill_loss(leaf, teacher, labels, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    for x, y in zip(given, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    return loss.detach(), grad


def assert_value(got, want, rtol=2e-5, atol=2e-6):
    np.testing.assert_allclose(
        np.asarray(got.double().cpu()), np.asarray(torch.as_tensor(want).cpu()), rtol=rtol, atol=atol
    )


def masked(n, v, columns):
    x = 2 * torch.randn(n, v)
    x[:, columns] = -INF
    return x


# --- -inf -------------------------------------------------------------------------------------------------------------

WHERE = {"middle": slice(3, 6), "last": slice(17, 20), "first": slice(0, 1)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_masked_columns(backend, name, who):
    case = CASES[name]
    for where in WHERE.values():
        s, t = (masked(4, 20, where if who in (x, "both") else slice(0, 0)) for x in ("student", "teacher"))
        for tau in (1.0, 2.5):
            options = {"temperature": tau, "reduction": "none"}
            s = untie(s, t, temperature=tau)
            loss, grad = run(backend, s, t, divergence=case.argument, **options)
            want = expected(s, t, terms=case.terms, **options)[0]
            assert_value(loss, want)
            if who == "both" or (who == "teacher" and name != "reverse_kl") or who == "student":
                # a column of -inf has the gradient that a very negative one tends to
                low = [x.double().clamp(min=-600.0) for x in (s, t)]
                limit = run("reference", *low, divergence=case.argument, **options)[1]
                torch.testing.assert_close(grad.double(), limit, rtol=1e-4, atol=1e-5)
            assert not loss.isnan().any()


@pytest.mark.parametrize(("name", "who"), [("forward_kl", "student"), ("reverse_kl", "teacher")])
def test_infinite_values(backend, name, who):
    s, t = (masked(3, 20, slice(2, 4) if x == who else slice(0, 0)) for x in ("student", "teacher"))
    loss, grad = run(backend, s, t, divergence=name, reduction="none")
    assert (loss == INF).all()
    if name == "forward_kl":
        assert grad.isfinite().all()
        q, p = t.softmax(-1), s.softmax(-1)
        torch.testing.assert_close(grad, p - q, rtol=1e-5, atol=1e-6)
    assert run(backend, s, t, divergence=name)[0].item() == INF


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("v", [1300, 9001])
def test_first_tile_masked(backend, name, v):
    s, t = (masked(3, v, slice(0, 1100)) for _ in range(2))
    s = untie(s, t, temperature=2.0)
    y = torch.tensor([1100, v - 1, 1201])
    options = {"divergence": CASES[name].argument, "temperature": 2.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    loss, grad = run(backend, s, t, y, **options)
    short_loss, short_grad = run("reference", s[:, 1100:].double(), t[:, 1100:].double(), y - 1100, **options)
    assert_value(loss, short_loss.item())
    torch.testing.assert_close(grad[:, 1100:].double(), short_grad, rtol=1e-4, atol=1e-6)
    assert (grad[:, :1100] == 0).all()


def test_label_on_a_masked_column(backend):
    s = masked(2, 12, slice(4, 5))
    y = torch.tensor([4, 5])
    loss, grad = run(backend, s, labels=y, reduction="none")
    assert loss[0] == INF
    assert loss[1].isfinite()
    onehot = torch.nn.functional.one_hot(y, 12)
    torch.testing.assert_close(grad, s.softmax(-1) - onehot, rtol=1e-5, atol=1e-6)


def test_factor_of_zero_silences_an_infinite_term(backend):
    s, t, y = masked(3, 12, slice(4, 5)), torch.randn(3, 12), torch.tensor([4, 4, 5])
    reverse = {"divergence": "reverse_kl", "alpha": 1.0}
    assert_value(run(backend, s, t, y, **reverse)[0], run(backend, s, t, divergence="reverse_kl")[0].item())
    only_hard, grad = run(backend, s, t, torch.tensor([5, 6, 7]), alpha=0.0)
    assert only_hard.isfinite()
    assert grad.isfinite().all()


def test_smoothing_spreads_over_present_columns(backend):
    s, y = masked(4, 30, slice(10, 25)), torch.tensor([0, 9, 25, 29])
    loss, grad = run(backend, s, labels=y, label_smoothing=0.3, reduction="none")
    assert_value(loss, expected(s, labels=y, label_smoothing=0.3, reduction="none")[0])
    assert (grad[:, 10:25] == 0).all()
    assert grad.sum(-1).abs().max() < 1e-5


# --- Dropped tokens, NaN, size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["ignore_index", "weights", "both"])
@pytest.mark.parametrize("filler", [0.5, math.nan, -INF])
def test_all_tokens_dropped(backend, reduction, how, filler):
    s = torch.full((3, 10), filler)
    options = {"labels": torch.full((3,), -100 if how != "weights" else 2), "reduction": reduction, "z_loss": 0.1}
    if how != "ignore_index":
        options["weights"] = torch.zeros(3)
    loss, grad = run(backend, s, s.clone(), **options)
    assert (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_stays_in_its_token(backend, name, who):
    s, t = torch.randn(5, 40), torch.randn(5, 40)
    options = {"divergence": CASES[name].argument, "temperature": 2.0, "reduction": "none"}
    clean_loss, clean_grad = run(backend, s, t, **options)
    (s if who == "student" else t)[2, 7] = math.nan
    loss, grad = run(backend, s, t, **options)
    assert loss[2].isnan()
    assert grad[2].isnan().any()
    others = [0, 1, 3, 4]
    torch.testing.assert_close(loss[others], clean_loss[others], rtol=0, atol=0)
    torch.testing.assert_close(grad[others], clean_grad[others], rtol=0, atol=0)
    assert run(backend, s, t, divergence=CASES[name].argument)[0].isnan()


@pytest.mark.parametrize("how", ["ignore_index", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "mixture"])
def test_a_dropped_token_may_hold_nan(backend, how, reduction, name):
    s, t, y = torch.randn(5, 40), torch.randn(5, 40), torch.arange(5)
    s[2], t[2, 3], s[2, 1] = math.nan, math.nan, INF
    options = {"divergence": CASES[name].argument, "reduction": reduction, "z_loss": 0.01}
    kept = [0, 1, 3, 4]
    want_loss, want_grad = run(backend, s[kept], t[kept], y[kept], **options)
    if how == "weights":
        options["weights"] = torch.tensor([1.0, 1, 0, 1, 1])
    else:
        y[2] = -100
    loss, grad = run(backend, s, t, y, **options)
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, want_loss)
    torch.testing.assert_close(grad[kept], want_grad)
    assert (grad[2] == 0).all()
    if reduction == "none":
        assert loss[2] == 0


def test_a_dropped_token_may_hold_any_label(backend):
    s, y = torch.randn(3, 6), torch.tensor([1, 10**12, 3])
    loss, _ = run(backend, s, labels=y, weights=torch.tensor([1.0, 0.0, 1.0]))
    assert_value(loss, expected(s[[0, 2]], labels=y[[0, 2]])[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(backend, name, dtype):
    case = CASES[name]
    s, t = (1e4 * torch.randn(4, 50).clamp(-3, 3) for _ in range(2))
    s, t = s.to(dtype), t.to(dtype)
    y = torch.arange(4)
    loss, grad = run(backend, s, t, y, divergence=case.argument, temperature=2.0, reduction="none")
    want = expected(s, t, y, terms=case.terms, temperature=2.0, reduction="none")[0]
    assert grad.isfinite().all()
    assert_value(loss, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("height", [60, 130, 1000, 1e4])
def test_the_maximum_may_come_late(backend, name, height):
    """Sums that began under the first columns' maximum overflow, by any number of octaves, and must notice."""
    n, v = (2, 2000) if INTERPRETING else (6, 5000)
    temperatures = (1.0, 2.0, 1.7)
    for k, places in enumerate(([v - 1000, v - 2000], [v - 1, v - 1], [1200, v - 1])):
        s, t = (torch.randn(n, v) for _ in range(2))
        for x, place in zip((s, t), places, strict=True):
            x[:, place] += height * (1 + torch.rand(n))
        y = torch.randint(v, (n,))
        for tau in temperatures[k : k + 1] if INTERPRETING else temperatures:
            options = {"divergence": CASES[name].argument, "temperature": tau, "reduction": "none"}
            want, want_grad = run("reference", s.double(), t.double(), y, **options)
            loss, grad = run(backend, s, t, y, **options)
            assert_value(loss, want, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(grad.double(), want_grad, rtol=2e-3, atol=2e-6 * height)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("payload", [0x7FC00000, -0x400000, -1, 0x7F800001])
def test_every_nan_is_one(backend, name, payload):
    """Arithmetic on the bits of a number must not take one of the many NaNs for something else."""
    nan = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    for who in range(2):
        logits = [torch.randn(2, 1500), torch.randn(2, 1500)]
        logits[who][1, 1100] = nan
        for tau in (1.0, 2.0, 1.7):
            options = {"divergence": CASES[name].argument, "temperature": tau, "reduction": "none"}
            loss, grad = run(backend, *logits, **options)
            assert loss[0].isfinite()
            assert loss[1].isnan()
            assert grad[0].isfinite().all()
            assert grad[1].isnan().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_shift_of_the_logits_changes_nothing(backend, shift, name):
    """The shifted logits are exact in fp32, and so is their distance to the largest, which is all that counts."""
    s, t = ((64 * torch.randn(3, 40)).round() / 64 for _ in range(2))
    y = torch.arange(3)
    for tau in (1.0, 2.0):  # a division by another temperature would round
        options = {"divergence": CASES[name].argument, "temperature": tau, "label_smoothing": 0.1}
        want, want_grad = run("reference", s.double(), t.double(), y, **options)
        loss, grad = run(backend, s + shift, t + shift, y, **options)
        assert_value(loss, want.item(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=2e-6)


# --- Shapes and strides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 0, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(backend, shape, dtype):
    s = torch.zeros(shape, dtype=dtype)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        for options in ({"teacher": s.clone()}, {"labels": y}, {"teacher": s.clone(), "labels": y, "z_loss": 0.1}):
            loss, grad = run(backend, s, reduction=reduction, **options)
            assert loss.shape == (shape[:-1] if reduction == "none" else ())
            assert (loss == 0).all()
            assert (grad.shape, grad.dtype) == (shape, dtype)


def layouts(x):
    """The same (2, 3, V) logits under other strides."""
    v = x.shape[-1]
    longer = torch.cat([x, torch.randn(2, 1, v)], 1)[:, :-1]
    padded = torch.cat([x, torch.randn(2, 3, 5)], -1)[..., :v]
    strided = torch.stack([x, torch.randn_like(x)], -1)[..., 0]
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    columns_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return {"longer": longer, "padded": padded, "strided": strided, "transposed": transposed, "columns": columns_first}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["longer", "padded", "strided", "transposed", "columns"])
@pytest.mark.parametrize("v", [2, 37, 1025])
def test_non_contiguous(backend, layout, reduction, v):
    s, t = torch.randn(2, 3, v), torch.randn(2, 3, v)
    y, w = torch.randint(v, (2, 3)), torch.rand(2, 3)
    options = {"reduction": reduction, "temperature": 2.0, "z_loss": 0.01}
    want, want_grad = run(backend, s, t, y, weights=w, **options)
    a, b = layouts(s)[layout], layouts(t)[layout]
    assert a.numel() < 10 or not a.is_contiguous()
    y, w = y.T.contiguous().T, w.T.contiguous().T
    for student, teacher in ((a, t), (s, b), (a, b)):
        loss, grad = run(backend, student, teacher, y, weights=w, **options)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)


def test_expanded_tensors(backend):
    row, t = torch.randn(1, 33), torch.randn(1, 1, 33)
    w = torch.tensor(0.5).expand(4, 2)
    leaf = row.clone().requires_grad_()
    loss = distill_loss(leaf.expand(4, 2, 33), t.expand(4, 2, 33), weights=w, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    want, want_grad = run(backend, row, t[0])
    torch.testing.assert_close(loss.detach(), 4 * want)
    torch.testing.assert_close(grad, 4 * want_grad)


@pytest.mark.parametrize("name", CASES)
def test_one_column(backend, name):
    s, t = torch.randn(4, 1), torch.randn(4, 1)
    y = torch.zeros(4, dtype=torch.int64)
    loss, grad = run(backend, s, t, y, divergence=CASES[name].argument, reduction="none")
    assert_value(loss, np.zeros(4))
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_one_token_without_leading_axes(backend):
    s, t, y = torch.randn(9), torch.randn(9), torch.tensor(3)
    for reduction in ("mean", "sum", "none"):
        loss, grad = run(backend, s, t, y, reduction=reduction)
        assert loss.shape == ()
        assert_value(loss, expected(s[None], t[None], y[None])[0])
        assert grad.shape == (9,)


def test_teacher_of_weight_zero_has_no_say(backend):
    s, t, y = torch.randn(3, 8), torch.randn(3, 8), torch.arange(3)
    for filler in (math.nan, -INF, 1e30):
        for ensemble in ("prob", "logit"):
            other = torch.full((3, 8), filler)
            options = {"ensemble": ensemble, "temperature": 2.0, "reduction": "none"}
            want, want_grad = run(backend, s, t, y, **{k: v for k, v in options.items() if k != "ensemble"})
            loss, grad = run(backend, s, [other, t], y, teacher_weights=[0.0, 2.0], **options)
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)
            # per token: the first token listens to t alone, the others to the other teacher too, which is good there
            other[1:] = t[1:]
            w = torch.tensor([[0.0, 1, 1], [1, 1, 1]])
            loss, _ = run(backend, s, [other, t], y, teacher_weights=w, **options)
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_a_label_that_ranks_use_among_themselves_is_no_label(backend):
    s = torch.randn(2, 20)
    with pytest.raises(ValueError, match="labels must be in"):
        distill_loss(s, s, torch.tensor([3, torch.iinfo(torch.int64).min + 1]), backend=backend)
