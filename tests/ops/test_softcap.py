"""Scale and softcap of an LMHead in fp32, whatever the dtype of the product, against fp64 of that product."""

from __future__ import annotations

import math

import pytest
import torch
from machine import INTERPRETING

from kdfast import LMHead, SparseTargets, distill_loss, soft_targets
from kdfast.spec.head import Cap

N, H, V = (5, 6, 140) if INTERPRETING else (13, 16, 1100)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CAPS = [(1.0, 3.0), (0.4, None), (-1.5, 4.0)]  # scale and softcap


def parts(dtype, *, bias=True):
    """Hidden states, weight and bias, whose logits have a spread of about 4."""
    return [
        torch.randn(N, H).to(dtype),
        (4 * torch.randn(V, H) / math.sqrt(H)).to(dtype),
        torch.randn(V).to(dtype) if bias else None,
    ]


def product(hidden, weight, bias):
    """What a matrix product stores, in fp64."""
    return torch.nn.functional.linear(hidden, weight, bias).double()


def capped(x, scale, softcap):
    """The definition."""
    x = scale * x
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def truth(mine, cap, teacher, labels, **options):
    """Loss and gradients of hidden states, weight and bias, in fp64 but for the product's rounding; and of itself."""
    stored = product(*mine).requires_grad_()
    loss = distill_loss(capped(stored, *cap), teacher, labels, backend="reference", **options)
    (g,) = torch.autograd.grad(loss.sum(), stored)
    hidden, weight, bias = mine
    grads = [g @ weight.double(), g.T @ hidden.double(), *([] if bias is None else [g.sum(0)])]
    return loss.detach(), grads


def agree(backend, mine, cap, teacher, labels, *, theirs=None, **options):
    """A backend against the truth; ``teacher`` as it takes it, ``theirs`` as the truth does."""
    want, grads = truth(mine, cap, teacher if theirs is None else theirs, labels, **options)
    leaves = [None if x is None else x.clone().requires_grad_() for x in mine]
    head = LMHead(*leaves, softcap=cap[1], scale=cap[0])
    # three chunks, the last of another size
    loss = distill_loss(head, teacher, labels, backend=backend, memory_budget=2 * 4 * V * (N // 3), **options)
    there = [x for x in leaves if x is not None]
    torch.testing.assert_close(loss.detach().double(), want, rtol=3e-6, atol=3e-6)
    dtype = mine[0].dtype
    # A gradient of the product is rounded where it lies, one of the weight once more: both are the product's rounding.
    slack = 2e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    for got, exact in zip(torch.autograd.grad(loss.sum(), there), grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=slack * exact.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_under_a_cap_of_20(backend, reduction):
    """Capped, 19 and 20 are 0.436 apart, of which a cap in bf16, which steps by 1/16 there, makes 0.5."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[20.0, 0], [19, 0], [10, 0], [0, 1]], dtype=torch.bfloat16)
    loss = distill_loss(
        LMHead(hidden, weight, softcap=20.0), labels=torch.tensor([1]), reduction=reduction, backend=backend
    )
    assert loss.item() == pytest.approx(0.93638, abs=5e-6)


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_students(backend, name, dtype, cap):
    teacher, labels = 2 * torch.randn(N, V, dtype=torch.float64), torch.randint(V, (N,))
    labels[1::4] = -100
    options = {"divergence": name, "temperature": 2.0, "z_loss": 1e-3, "label_smoothing": 0.1}
    for reduction in ("mean", "none"):
        agree(
            backend, parts(dtype), cap, teacher.float(), labels, theirs=teacher.float().double(), reduction=reduction,
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_without_a_teacher_and_over_a_part_of_the_vocabulary(backend, dtype, temperature):
    labels = torch.randint(V, (N,))
    agree(backend, parts(dtype, bias=False), (1.0, 3.0), None, labels)
    agree(backend, parts(dtype), (0.7, 3.0), None, labels, z_loss=0.01, label_smoothing=0.2)
    teacher = torch.randn(N, V - 9)
    options = {"temperature": temperature, "vocab": "truncate", "label_smoothing": 0.1}
    agree(backend, parts(dtype), (0.7, 3.0), teacher, labels, theirs=teacher.double(), **options)


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ensemble", ["prob", "logit"])
def test_teachers(backend, dtype, cap, ensemble):
    theirs, stored, labels = parts(dtype), torch.randn(N, V).to(dtype), torch.randint(V, (N,))
    head = LMHead(*theirs, softcap=cap[1], scale=cap[0])
    exact = capped(product(*theirs), *cap)
    agree(backend, parts(dtype), (1.0, None), head, labels, theirs=exact, temperature=2.0)
    agree(backend, parts(dtype), (0.8, 5.0), head, labels, theirs=exact, divergence="jsd")
    given, truths = [head, stored, head], [exact, stored.double(), exact]
    agree(backend, parts(dtype), (0.8, 5.0), given, labels, theirs=truths, ensemble=ensemble, temperature=1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_student_is_stored(backend, dtype):
    theirs, cap = parts(dtype), (0.5, 4.0)
    student = (2 * torch.randn(N, V)).to(dtype)
    results = []
    for x, teacher, which in (
        (student, LMHead(*theirs, softcap=cap[1], scale=cap[0]), backend),
        (student.double(), capped(product(*theirs), *cap), "reference"),
    ):
        leaf = x.clone().requires_grad_()
        loss = distill_loss(leaf, teacher, temperature=2.0, backend=which)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    (loss, grad), (want, exact) = results
    assert loss.item() == pytest.approx(want.item(), rel=3e-6)
    torch.testing.assert_close(
        grad.double(),
        exact,
        rtol=torch.finfo(dtype).eps,
        atol=max(1e-6 * exact.abs().max().item(), 2.0**-25),  # half of the least fp16
    )


def entries(k, *, tau):
    """Targets of k columns with most of the mass, with the normaliser at a temperature."""
    log_q = torch.log_softmax(2 * torch.randn(N, V, dtype=torch.float64), -1)
    values, ids = log_q.topk(k)
    lse = {tau: torch.logsumexp(log_q / tau, -1).float()}
    return SparseTargets(ids.int(), values.float(), vocab_size=V, lse=lse)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_sparse_targets(backend, tail, dtype, cap):
    targets, labels = entries(20, tau=2.0), torch.randint(V, (N,))
    labels[::3] = targets.ids[::3, 1].long()
    options = {"temperature": 2.0, "tail": tail, "z_loss": 1e-3, "label_smoothing": 0.1}
    for reduction in ("sum", "none"):
        agree(backend, parts(dtype), cap, targets, labels, reduction=reduction, **options)
    if tail != "zero":
        agree(backend, parts(dtype), cap, targets, labels, divergence="jsd", temperature=2.0, tail=tail)


def test_a_learned_temperature_and_weights(backend):
    mine, theirs, labels = parts(torch.bfloat16), parts(torch.bfloat16), torch.randint(V, (N,))
    results = []
    for which in (backend, "truth"):
        given = {k: torch.tensor(v, requires_grad=True) for k, v in {"temperature": 2.0, "z_loss": 0.01}.items()}
        student, teacher = LMHead(*mine, softcap=3.0), LMHead(*theirs, scale=0.5)
        if which == "truth":
            student, teacher = capped(product(*mine), 1.0, 3.0), capped(product(*theirs), 0.5, None)
        loss = distill_loss(student, teacher, labels, backend="reference" if which == "truth" else which, **given)
        results.append([loss, *torch.autograd.grad(loss, list(given.values()))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_column_of_minus_infinity_stays_one(backend, kind, softcap):
    """Its bias makes it so; it has no mass under a cap either, and leaves the others as they would be without it."""
    hidden, weight, bias = parts(torch.bfloat16)
    bias[7], bias[V - 1] = -math.inf, -math.inf
    there = torch.ones(V, dtype=torch.bool)
    there[7] = there[V - 1] = False
    labels = torch.randint(7, (N,))
    targets = entries(9, tau=1.0)
    kept = targets.ids.masked_fill((targets.ids == 7) | (targets.ids == V - 1), -1)
    targets = SparseTargets(kept, targets.logprobs, vocab_size=V, lse=targets.lse)
    moved = kept - (kept > 7).int()
    fewer = SparseTargets(moved, targets.logprobs, vocab_size=V - 2, lse=targets.lse)
    dense = torch.randn(N, V).masked_fill(~there, -math.inf)
    teachers = (dense, dense[:, there]) if kind == "dense" else (targets, fewer)
    results = []
    for columns, teacher in zip((slice(None), there), teachers, strict=True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[columns], bias[columns])]
        head = LMHead(*leaves, softcap=softcap, scale=0.7)
        loss = distill_loss(head, teacher, labels, backend=backend, label_smoothing=0.1, z_loss=1e-3)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    (loss, d_hidden, d_weight, d_bias), want = results
    assert (d_weight[~there] == 0).all()
    assert (d_bias[~there] == 0).all()
    eps = torch.finfo(torch.bfloat16).eps
    for got, exact in zip((loss, d_hidden, d_weight[there], d_bias[there]), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=2 * eps, atol=2 * eps * exact.abs().max().item())
    torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 0.05, 1.0, 40.0])
def test_the_cap_is_as_exact_as_eager(backend, scale):
    """Cross-entropies of two columns, of which one is a capped number over all its range, and 0 is the other."""
    x = torch.linspace(-1, 1, 512 if INTERPRETING else 4096) * 3 * scale
    hidden, weight = torch.stack([x, torch.ones_like(x)], -1), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    softcap = 1.0 if scale > 1 else 30.0 * scale
    leaf = hidden.clone().requires_grad_()
    loss = distill_loss(
        LMHead(leaf, weight, softcap=softcap), labels=torch.zeros(len(x)).long(), reduction="none", backend=backend
    )
    loss.sum().backward()
    errors = []
    exact = x.double().requires_grad_()
    value = torch.nn.functional.softplus(-capped(exact, 1.0, softcap))
    (slope,) = torch.autograd.grad(value.sum(), exact)
    eager = x.clone().requires_grad_()
    rough = torch.nn.functional.softplus(-capped(eager, 1.0, softcap))
    (rough_slope,) = torch.autograd.grad(rough.sum(), eager)
    for got, theirs, want in ((loss, rough, value), (leaf.grad[:, 0], rough_slope, slope)):
        errors = [(y.detach().double() - want.detach()).abs().max().item() for y in (got, theirs)]
        assert errors[0] <= errors[1] + 3e-7 * max(1.0, want.detach().abs().max().item())


def test_fp32_for_16_bits_and_fp64_for_fp64():
    x = torch.tensor([-math.inf, -60.0, 0.5, 17.0, 80.0])
    for dtype, out in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        z = Cap(0.5, 20.0).logits(x.to(dtype))
        assert z.dtype == out
        want = capped(x.to(dtype).double(), 0.5, 20.0)
        want[0] = -math.inf
        torch.testing.assert_close(z.double(), want, rtol=3e-7, atol=0)
    assert LMHead(torch.ones(1, 2).bfloat16(), torch.ones(3, 2).bfloat16()).logits().dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_soft_targets(monkeypatch, backend, dtype, cap):
    monkeypatch.setenv("KDFAST_BACKEND", backend)
    theirs = parts(dtype)
    targets = soft_targets(LMHead(*theirs, softcap=cap[1], scale=cap[0]), k=8, temperatures=(1.0, 2.0))
    log_q = torch.log_softmax(capped(product(*theirs), *cap), -1)
    kept = log_q.gather(-1, targets.ids.long())
    torch.testing.assert_close(targets.logprobs.double(), kept, rtol=0, atol=2e-6)
    torch.testing.assert_close(targets.lse[2.0].double(), torch.logsumexp(log_q / 2, -1), rtol=0, atol=2e-6)
    assert (kept.min(-1).values >= log_q.topk(8).values[:, -1] - 1e-6).all()
