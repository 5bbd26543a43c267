"""Universal logit distillation against numpy in fp64, and the sort beneath it against torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from machine import DEVICE, TRACES
from scipy.special import softmax

from kdfast import LMHead, uld_loss
from kdfast.ops.uld import operators as uld
from kdfast.ops.uld.sort import sort_rows

SIZES = {"equal": (50, 50), "longer student": (61, 37), "longer teacher": (37, 61), "two columns": (2, 9)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(student, teacher, tau=1.0):
    """(loss, gradient of the student), per token: the definition, token by token, in fp64."""
    z, t = (x.detach().double().cpu().numpy().reshape(-1, x.shape[-1]) for x in (student, teacher))
    losses, grads = np.zeros(len(z)), np.zeros_like(z)
    for i in range(len(z)):
        p, q = softmax(z[i] / tau), softmax(t[i] / tau)
        places = np.argsort(-z[i], kind="stable")
        width = max(len(p), len(q))
        sorted_p, sorted_q = np.zeros(width), np.zeros(width)
        sorted_p[: len(p)], sorted_q[: len(q)] = p[places], np.sort(q)[::-1]
        losses[i] = np.abs(sorted_p - sorted_q).sum()
        s = np.zeros_like(p)
        s[places] = np.sign(sorted_p - sorted_q)[: len(p)]
        grads[i] = p * (s - (s * p).sum()) / tau
    shape = student.shape[:-1]
    return losses.reshape(shape), grads.reshape(*shape, -1)


def logits(*shape, dtype=torch.float32):
    return (3 * torch.randn(*shape)).to(dtype)


def pair(leading, v, u, dtype=torch.float32, tau=1.0):
    """Student and teacher that stay clear of the gradient's jumps, where p = q at some rank and fp32 may see either."""
    while True:
        student, teacher = logits(*leading, v, dtype=dtype), logits(*leading, u, dtype=dtype)
        p, q = (np.sort(softmax(x.double().cpu().numpy() / tau, -1), -1)[..., ::-1] for x in (student, teacher))
        n = min(v, u)
        if (np.abs(p[..., :n] - q[..., :n]) > 1e-5 * p[..., :n]).all():
            return student, teacher


def run(student, teacher, **options):
    """Loss and gradient, as fp64 numpy."""
    z = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = uld_loss(z, teacher, **options)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert grad.dtype == student.dtype
    assert grad.shape == student.shape
    return loss.detach().double().cpu().numpy(), grad.double().cpu().numpy()


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_against_the_definition(sizes, dtype, tau):
    student, teacher = pair((7,), *sizes, dtype, tau)
    loss, grad = run(student, teacher, temperature=tau, reduction="none")
    want, want_grad = truth(student, teacher, tau)
    exact = dtype == torch.float64
    np.testing.assert_allclose(loss, want, rtol=1e-12 if exact else 2e-6, atol=1e-15 if exact else 5e-7)
    rounding = 0.0 if exact else torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * rounding
    np.testing.assert_allclose(
        grad, want_grad, rtol=rounding + (1e-10 if exact else 1e-5), atol=(1e-15 if exact else 1e-6) + smallest
    )


def test_dtype_of_the_loss():
    for dtype in DTYPES:
        loss = uld_loss(logits(2, 5, dtype=dtype), logits(2, 6, dtype=torch.bfloat16))
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradcheck(sizes):
    spaced = torch.stack([torch.randperm(sizes[0]) for _ in range(3)])  # finite steps must not change the order
    student = (0.1 * spaced + 0.02 * torch.rand(spaced.shape)).double().requires_grad_()
    teacher = logits(3, sizes[1], dtype=torch.float64)
    tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda z, t, r=reduction: uld_loss(z, teacher, temperature=t, weights=weights, reduction=r), (student, tau)
        )


def test_gradient_of_the_weights():
    student, teacher = logits(4, 9), logits(4, 12)
    weights = torch.rand(4).requires_grad_()
    uld_loss(student, teacher, weights=weights, reduction="sum").backward()
    np.testing.assert_allclose(weights.grad.cpu().numpy(), truth(student, teacher)[0], rtol=1e-5)


def test_reductions():
    student, teacher = pair((2, 3), 20, 31)
    w = torch.rand(2, 3)
    w[0, 1] = 0
    token, (loss, grad) = w.double().cpu().numpy(), truth(student, teacher)
    cases = {
        "mean": ({}, (token * loss).sum() / token.sum(), token / token.sum()),
        "items": ({"num_items": 7}, (token * loss).sum() / 7, token / 7),
        "tensor": ({"num_items": torch.tensor(7.0)}, (token * loss).sum() / 7, token / 7),
        "sum": ({"reduction": "sum"}, (token * loss).sum(), token),
        "none": ({"reduction": "none"}, token * loss, token),
    }
    for name, (options, want, factor) in cases.items():
        got, got_grad = run(student, teacher, weights=w, **options)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(got_grad, factor[..., None] * grad, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("upstream", [65536.0, torch.tensor([0.0, 3.0, -1e-3])], ids=["scalar", "per token"])
def test_upstream_twice(upstream):
    student, teacher = pair((3,), 30, 25, torch.float16)
    student.requires_grad_()
    loss = uld_loss(student, teacher, reduction="none")
    weights = torch.as_tensor(upstream).expand(3)
    first, second = (torch.autograd.grad(loss, student, weights, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    want = (weights.double().cpu().numpy()[:, None] * truth(student, teacher)[1]).astype(np.float16)
    np.testing.assert_allclose(first.cpu().numpy(), want, rtol=2e-3, atol=1e-6)


# --- What the loss does not depend on ---------------------------------------------------------------------------------


def test_order_of_columns_and_shifts():
    student, teacher = logits(5, 40, dtype=torch.float64), logits(5, 33, dtype=torch.float64)
    loss, grad = run(student, teacher, reduction="none")
    mine, theirs = torch.randperm(40), torch.randperm(33)
    moved, moved_grad = run(student[:, mine] + 7, teacher[:, theirs] - 3, reduction="none")
    np.testing.assert_allclose(moved, loss, rtol=1e-12)
    np.testing.assert_allclose(moved_grad, grad[:, mine.cpu().numpy()], rtol=1e-9, atol=1e-15)


def test_equal_distributions():
    student = logits(4, 30)
    loss, grad = run(student, student[:, torch.randperm(30)], reduction="none")
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    loss, grad = run(student, student, reduction="none")  # the same bits: sign(0) = 0
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_columns_of_minus_infinity_are_padding():
    student, teacher = pair((4,), 30, 22)
    loss, grad = run(student, teacher, reduction="none")

    def padded(x, n):
        out = torch.full((*x.shape[:-1], x.shape[-1] + n), -math.inf)
        out[..., n:] = x
        return out

    for extra_student, extra_teacher in ((3, 0), (0, 5), (2, 20)):
        got, got_grad = run(padded(student, extra_student), padded(teacher, extra_teacher), reduction="none")
        np.testing.assert_allclose(got, loss, rtol=1e-5, atol=1e-6)
        assert (got_grad[:, :extra_student] == 0).all()
        np.testing.assert_allclose(got_grad[:, extra_student:], grad, rtol=1e-5, atol=2e-6)


def test_the_same_bits_for_any_chunk_and_threads(monkeypatch, threads):
    student, teacher = logits(13, 300), logits(13, 200)
    weights = torch.rand(13).round()
    want = run(student, teacher, weights=weights)
    for count, elements in ((1, 1), (2, 700), (3, 10**6)):
        threads(count)
        monkeypatch.setattr(uld, "CHUNK", {DEVICE: elements})
        for got, expected in zip(run(student, teacher, weights=weights), want, strict=True):
            assert np.array_equal(got, expected)


def test_views():
    base_s, base_t = logits(4, 6, 30), logits(4, 6, 45)
    want, want_grad = run(base_s[:, :-1].contiguous(), base_t[:, 1:].contiguous(), reduction="none")
    views = {
        "shifted": (base_s[:, :-1], base_t[:, 1:]),
        "columns apart": (base_s.mT.contiguous().mT[:, :-1], base_t.mT.contiguous().mT[:, 1:]),
        "transposed": (base_s[:, :-1].transpose(0, 1).contiguous().transpose(0, 1), base_t[:, 1:]),
    }
    for name, (student, teacher) in views.items():
        got, got_grad = run(student, teacher, reduction="none")
        assert np.array_equal(got, want), name
        assert np.array_equal(got_grad, want_grad), name
    student = base_s[0, :1].expand(4, 30).requires_grad_()  # rows that share memory
    np.testing.assert_allclose(
        uld_loss(student, base_t[0, :4], reduction="none").detach().cpu().numpy(),
        truth(student, base_t[0, :4])[0],
        rtol=1e-5,
    )


def test_no_token_axis():
    student, teacher = pair((), 20, 25)
    loss, grad = run(student, teacher)
    want, want_grad = truth(student, teacher)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=1e-6)


# --- Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, "all -inf"])
def test_nan_stays_in_its_token(side, bad):
    x = {"student": logits(3, 20), "teacher": logits(3, 26)}
    clean, clean_grad = run(*x.values(), reduction="none")
    if bad == "all -inf":
        x[side][1] = -math.inf
    else:
        x[side][1, 4] = bad
    loss, grad = run(*x.values(), reduction="none")
    assert np.isnan(loss[1])
    assert np.isnan(grad[1]).all()
    assert np.array_equal(loss[::2], clean[::2])
    assert np.array_equal(grad[::2], clean_grad[::2])
    for reduction in ("mean", "sum"):  # weight 0 drops the token
        weights = torch.tensor([1.0, 0.0, 1.0])
        loss, grad = run(*x.values(), weights=weights, reduction=reduction)
        np.testing.assert_allclose(loss, clean[::2].sum() / (2 if reduction == "mean" else 1), rtol=1e-5, atol=1e-6)
        assert (grad[1] == 0).all()
        assert np.isfinite(grad).all()


def test_all_dropped_and_empty():
    student, teacher = torch.full((3, 8), math.nan), logits(3, 9)
    for reduction in ("mean", "sum", "none"):
        loss, grad = run(student, teacher, weights=torch.zeros(3), reduction=reduction)
        assert (loss == 0).all()
        assert (grad == 0).all()
    for shape in ((0,), (2, 0)):
        for reduction in ("mean", "sum"):
            loss, grad = run(logits(*shape, 8), logits(*shape, 9), reduction=reduction)
            assert loss == 0
            assert grad.shape == (*shape, 8)
        assert uld_loss(logits(*shape, 8), logits(*shape, 9), reduction="none").shape == shape


def test_large_logits_and_ties():
    student = torch.tensor([[1e4, -1e4, 0, 9999], [1, 1, 1, 1]])
    teacher = torch.tensor([[-1e4, 1e4, 1e4, 0, 0], [2, 2, 0, 0, 0]])
    loss, grad = run(student, teacher, reduction="none")
    want, want_grad = truth(student, teacher)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-6)


def test_real_vocabularies():
    student, teacher = logits(2, 50257, dtype=torch.bfloat16), logits(2, 32000)
    loss, grad = run(student, teacher, reduction="none")
    want, want_grad = truth(student, teacher)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    # where p and q are within fp32's rounding of each other, the sign may be either
    wrong = np.abs(grad - want_grad) > 1e-2 * np.abs(want_grad) + 1e-7
    assert wrong.mean() < 1e-3


# --- Autograd ---------------------------------------------------------------------------------------------------------


def test_teacher_is_detached():
    student, teacher = logits(2, 5).requires_grad_(), logits(2, 6).requires_grad_()
    uld_loss(student, teacher).backward()
    assert teacher.grad is None
    assert not uld_loss(student.detach(), teacher).requires_grad


def test_what_is_kept_for_backward():
    """The student itself, one byte per logit, a few numbers per token."""
    n, v = 6, 1000
    student, teacher = logits(n, v).requires_grad_(), logits(n, v)
    kept = {}

    def pack(x):
        if x.data_ptr() != student.data_ptr():
            kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        uld_loss(student, teacher).backward()
    assert n * v <= sum(kept.values()) <= n * v + 64 * n


def test_logits_that_were_changed_since():
    leaf = logits(2, 5).requires_grad_()
    student = leaf * 1
    loss = uld_loss(student, logits(2, 6))
    student.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_raises():
    student = logits(2, 5).requires_grad_()
    (grad,) = torch.autograd.grad(uld_loss(student, logits(2, 6)), student, create_graph=True)
    with pytest.raises(RuntimeError, match="uld_loss has no second derivative"):
        grad.sum().backward()


def test_func_grad():
    student, teacher = logits(4, 15), logits(4, 18)
    got = torch.func.grad(lambda z: uld_loss(z, teacher))(student)
    np.testing.assert_allclose(got.double().cpu().numpy(), run(student, teacher)[1], rtol=1e-5, atol=1e-6)


def test_compiles_into_one_graph():
    student, teacher = logits(4, 15), logits(4, 18)
    weights = torch.tensor([1.0, 0, 2, 1])
    leaf = student.clone().requires_grad_()
    compiled = torch.compile(lambda z, t, w: uld_loss(z, t, weights=w), fullgraph=TRACES, backend="aot_eager")
    loss = compiled(leaf, teacher, weights)
    loss.backward()
    want, want_grad = run(student, teacher, weights=weights)
    np.testing.assert_allclose(loss.item(), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(leaf.grad.double().cpu().numpy(), want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [True, False])
def test_operators(asked):
    ops = torch.ops.kdfast
    student, teacher, tau, counted = logits(2, 3, 15), logits(2, 3, 18), torch.tensor(2.0), torch.rand(2, 3) > 0.3
    for z in (student, student.transpose(0, 1).contiguous().transpose(0, 1).bfloat16()):
        for mask in (counted, None):
            torch.library.opcheck(ops.uld_forward.default, (z, teacher, tau, mask, asked, asked))
            _, signs, stats, _ = ops.uld_forward(z, teacher, tau, mask, True, asked)
            torch.library.opcheck(ops.uld_backward.default, (z, tau, mask, signs, stats, torch.rand(2, 3)))


# --- The sort ---------------------------------------------------------------------------------------------------------


def specials(dtype=torch.float32):
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, math.inf, -math.inf, tiny, -tiny, tiny / 4, -tiny / 4, 1.0, -1.0, 1.0, 3e38, -3e38]
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("columns", [1, 2, 13, 2048, 5000])
def test_sort_rows(columns):
    some = specials()
    rows = [
        torch.randn(columns),
        some[torch.randint(len(some), (columns,))],
        torch.randn(columns).bfloat16().float(),  # ties, and low bits of 0
        torch.full((columns,), -math.inf),
        torch.randint(-3, 3, (columns,)).float(),
        torch.randint(-(2**31), 2**31, (columns,), dtype=torch.int64).to(torch.int32).view(torch.float32),  # any bits
    ]
    x = torch.stack(rows)
    values, order = sort_rows(x, ordered=True)
    want, want_order = x.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(order, want_order)
    alone, nothing = sort_rows(x.mT.contiguous().mT, ordered=False)
    torch.testing.assert_close(alone, values, rtol=0, atol=0, equal_nan=True)
    assert nothing.shape == (len(rows), 0)


def test_sort_of_no_rows_and_of_fp64():
    assert sort_rows(torch.empty(0, 7), ordered=True)[0].shape == (0, 7)
    values, _ = sort_rows(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64), ordered=False)
    assert values[0, 0] > values[0, 1]


# --- Wrong arguments --------------------------------------------------------------------------------------------------

S, T = torch.zeros(2, 3, 8), torch.zeros(2, 3, 9)
WRONG = {
    "student is a list": ({"student": [[1.0]]}, TypeError, ["student", "tensor", "list"]),
    "student is a head": (
        {"student": LMHead(torch.zeros(2, 3, 4), torch.zeros(8, 4))},
        TypeError,
        ["student", "LMHead", "student.logits()"],
    ),
    "student is token ids": ({"student": S.long()}, TypeError, ["student", "torch.int64", "logits"]),
    "student has no columns": ({"student": S[..., :0]}, ValueError, ["student", "(2, 3, 0)", "V >= 2"]),
    "teacher is missing": ({"teacher": None}, TypeError, ["teacher", "tensor", "NoneType"]),
    "teacher is several": ({"teacher": [T, T]}, TypeError, ["teacher", "tensor", "list"]),
    "teacher has no columns": ({"teacher": T[..., :0]}, ValueError, ["teacher", "(2, 3, 0)"]),
    "teacher is token ids": ({"teacher": T.int()}, TypeError, ["teacher", "torch.int32"]),
    "teacher of another batch": ({"teacher": T[:1]}, ValueError, ["teacher", "(2, 3)", "(1, 3)"]),
    "teacher elsewhere": ({"teacher": T.to("meta")}, ValueError, ["teacher", "meta", ".to("]),
    "temperature 0": ({"temperature": 0.0}, ValueError, ["temperature", "> 0", "0.0"]),
    "temperature nan": ({"temperature": math.nan}, ValueError, ["temperature", "nan"]),
    "temperature is text": ({"temperature": "hot"}, TypeError, ["temperature", "str"]),
    "temperature per token": ({"temperature": torch.ones(2, 3)}, ValueError, ["temperature", "0-d", "(2, 3)"]),
    "weights are a list": ({"weights": [1.0]}, TypeError, ["weights", "list"]),
    "weights of another shape": ({"weights": torch.ones(3)}, ValueError, ["weights", "(2, 3)", "(3,)"]),
    "batchmean": ({"reduction": "batchmean"}, ValueError, ["reduction", "batchmean", "'mean'", "'sum'", "'none'"]),
    "num_items with sum": ({"num_items": 5, "reduction": "sum"}, ValueError, ["num_items", "mean", "'sum'"]),
    "num_items 0": ({"num_items": 0}, ValueError, ["num_items", "> 0"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name):
    changes, error, fragments = WRONG[name]
    with pytest.raises(error) as caught:
        uld_loss(**{"student": S, "teacher": T} | changes)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at where that is free")
def test_temperature_tensor_out_of_range():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        uld_loss(S, T, temperature=torch.tensor(-1.0))
