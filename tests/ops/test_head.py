"""Logits from an LMHead, made and consumed in chunks, against the fp64 loss of the whole logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from formulas import CASES, pairs_of, untie
from machine import DEVICE, INTERPRETING, KERNEL, TRACES, VARIANTS
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import LMHead, distill_loss
from kdfast.ops.dense.inputs import Inputs
from kdfast.ops.head import operators as head

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.usefixtures("poisoned"),
]

N, H, V = (7, 5, 130) if INTERPRETING else (23, 16, 300)
#: Bytes of a few tokens' logits, so that a call takes several chunks, the last of another size.
BUDGET = 2 * 4 * V * (N // 3)


def parts(dtype=torch.float32, *, bias=True, shape=(N,)):
    """Hidden states, weight and bias, whose logits have a spread of about 2."""
    hidden, weight = torch.randn(*shape, H), 2 * torch.randn(V, H) / math.sqrt(H)
    return [x.to(dtype) for x in (hidden, weight, *([torch.randn(V)] if bias else []))]


def gradients(tensors, make, backend, dtype=None, **options):
    """Loss and the gradients of ``tensors``, from which ``make`` makes (student, teacher, labels)."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in tensors]
    loss = distill_loss(*make(leaves, dtype), backend=backend, **options)
    grads = torch.autograd.grad(loss.sum(), leaves)
    return [loss.detach(), *grads]


def agree(tensors, make, *, rtol=2e-5, **options):
    """The chunked fp32 result against the materialised fp64 one, relative to the largest element of each."""
    want = gradients(tensors, make, "reference", torch.float64, **options)
    got = gradients(tensors, make, KERNEL, memory_budget=BUDGET, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * b.abs().max().item() + 1e-9)


def low_rank(dtype=torch.float32, rank=3):
    """What LoRA adds to a product, of about its size."""
    return [torch.randn(N, rank).to(dtype), torch.randn(V, rank).to(dtype)]


def labels(*, ignored=True):
    y = torch.randint(V, (N,))
    if ignored:
        y[1::4] = -100
    return y


def cast(x, dtype):
    return x if dtype is None or x is None else x.to(dtype)


# --- Values and gradients ---------------------------------------------------------------------------------------------

CALLS = itertools.product(["logits", "head", "logits and head"], ["forward_kl", "reverse_kl", "jsd", "hellinger"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("teacher", "name"), [("none", "forward_kl"), *CALLS])
def test_matrix(name, teacher, reduction):
    mine, (th, tw), y = parts(), parts(bias=False), labels()
    stored = 2 * torch.randn(N, V)

    def make(leaves, dtype):
        heads = LMHead(cast(th, dtype), cast(tw, dtype), scale=0.5)
        logits = cast(stored, dtype)
        given = {"none": None, "logits": logits, "head": heads, "logits and head": [logits, heads]}[teacher]
        return LMHead(*leaves), given, y

    options = {} if teacher == "none" else {"alpha": 0.7, "temperature": 2.0}
    agree(mine, make, divergence=CASES[name].argument, reduction=reduction, z_loss=1e-3, label_smoothing=0.1, **options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tvd"])
def test_only_the_teacher_is_a_head(name, reduction):
    (th, tw, tb), y = parts(), labels()
    stored = untie(2 * torch.randn(N, V), LMHead(th, tw, tb).logits(), temperature=2.0)

    def make(leaves, dtype):
        return leaves[0], LMHead(*(cast(x, dtype) for x in (th, tw, tb))), y

    agree([stored], make, divergence=name, temperature=2.0, reduction=reduction)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_scale_and_softcap(scale, softcap, bias):
    mine, (th, tw), y = parts(bias=bias), parts(bias=False), labels()

    def make(leaves, dtype):
        teacher = LMHead(cast(th, dtype), cast(tw, dtype), softcap=softcap)
        return LMHead(*leaves, scale=scale, softcap=softcap), teacher, y

    for reduction in ("mean", "none"):
        agree(mine, make, temperature=2.0, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("who", ["student", "both"])
def test_a_low_rank_product_is_added(who, bias, reduction):
    mine, theirs, y = parts(bias=bias), [*parts(bias=False), *low_rank()], labels()
    n = len(mine)

    def make(leaves, dtype):
        th, tw, ta, tb = (cast(x, dtype) for x in theirs)
        teacher = LMHead(th, tw, softcap=5.0, low_rank=(ta, tb) if who == "both" else None)
        return LMHead(*leaves[:n], scale=0.5, softcap=9.0, low_rank=tuple(leaves[n:])), teacher, y

    agree([*mine, *low_rank()], make, reduction=reduction, temperature=2.0, z_loss=1e-3)


@pytest.mark.parametrize("taught", ["top-k", "heads", "heads and logits"])
def test_a_low_rank_product_beside_other_teachers(taught):
    mine, theirs, y = [*parts(bias=False), *low_rank()], [*parts(bias=False), *low_rank()], labels()
    stored = 2 * torch.randn(N, V)
    targets = kdfast.soft_targets(stored, k=7, temperatures=(2.0,))

    def make(leaves, dtype):
        h, w, a, b = (cast(x, dtype) for x in theirs)
        others = [LMHead(h, w, low_rank=(a, b)), LMHead(h, w) if taught == "heads" else cast(stored, dtype)]
        return LMHead(*leaves[:2], low_rank=tuple(leaves[2:])), targets if taught == "top-k" else others, y

    agree(mine, make, temperature=2.0)


@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (1, 3), (0, 1, 2)])
def test_a_frozen_part_of_a_low_rank_product(frozen):
    tensors, teacher = [*parts(bias=False), *low_rank()], torch.randn(N, V)
    learned = [x for k, x in enumerate(tensors) if k not in frozen]

    def make(leaves, dtype):
        leaves = iter(leaves)
        h, w, a, b = (cast(x, dtype) if k in frozen else next(leaves) for k, x in enumerate(tensors))
        return LMHead(h, w, low_rank=(a, b)), cast(teacher, dtype), None

    agree(learned, make)


@pytest.mark.parametrize("leave", [True, False], ids=["known to the host", "not known"])
def test_a_low_rank_product_of_dropped_tokens(monkeypatch, leave):
    monkeypatch.setattr(head, "_knows_counts", lambda counted: leave)
    tensors, teacher, y = [*parts(bias=False), *low_rank()], torch.randn(N, V), labels(ignored=False)
    dropped = torch.arange(N) % 3 == 0
    results = []
    for fill in (0.0, math.nan):
        h, w, a, b = (x.clone() for x in tensors)
        h[dropped], a[dropped] = fill, fill
        leaves = [x.requires_grad_() for x in (h, w, a, b)]
        student = LMHead(leaves[0], leaves[1], low_rank=(leaves[2], leaves[3]))
        loss = distill_loss(student, teacher, y.masked_fill(dropped, -100), backend=KERNEL, memory_budget=BUDGET)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_low_rank_product_in_16_bit_and_under_autocast():
    whole, y = [*parts(), *low_rank()], labels()
    teacher = torch.randn(N, V)

    def make(leaves, dtype):
        h, w, b, x, up = leaves
        return LMHead(h, w, b, low_rank=(x, up)), cast(teacher, dtype), y

    want = gradients([x.bfloat16() for x in whole], make, "reference", torch.float64)
    got = gradients([x.bfloat16() for x in whole], make, KERNEL, memory_budget=BUDGET)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
    with torch.autocast(DEVICE, torch.bfloat16):
        cast_ = gradients(whole, make, KERNEL, memory_budget=BUDGET)
    for a, b in zip(cast_, got, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-2, atol=2e-2 * b.abs().max().item())


def test_soft_targets_of_a_low_rank_product():
    h, w, a, b = *parts(bias=False), *low_rank()
    by_head = kdfast.soft_targets(LMHead(h, w, low_rank=(a, b)), k=5)
    whole = kdfast.soft_targets(h @ w.T + a @ b.T, k=5)
    assert torch.equal(by_head.ids, whole.ids)
    torch.testing.assert_close(by_head.logprobs, whole.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ensemble", ["prob", "logit"])
def test_ensemble_of_heads_with_weights_per_token(ensemble):
    mine, y = parts(), labels()
    teachers, weights = [parts() for _ in range(3)], torch.rand(3, N)

    def make(leaves, dtype):
        return LMHead(*leaves), [LMHead(*(cast(x, dtype) for x in t)) for t in teachers], y

    agree(mine, make, ensemble=ensemble, teacher_weights=weights, temperature=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_16_bit_is_as_good_as_eager(dtype, reduction, softcap):
    """The yardstick makes 16-bit logits too, and the rest of the loss in fp32."""
    mine, theirs, y = parts(dtype), parts(dtype), labels()

    def make(leaves, as_type):
        return LMHead(*leaves, softcap=softcap), LMHead(*(cast(x, as_type) for x in theirs)), y

    options = {"temperature": 2.0, "reduction": reduction}
    truth = gradients(mine, make, "reference", torch.float64, **options)
    eager = gradients(mine, make, "reference", **options)
    got = gradients(mine, make, KERNEL, memory_budget=BUDGET // 2, **options)
    for g, e, t in zip(got, eager, truth, strict=True):
        error, yard = ((x.double() - t).norm() / t.norm() for x in (g, e))
        assert error <= 1.5 * yard + 3 * torch.finfo(dtype).eps
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype, dtype]


def test_truncated_vocabulary_and_temperature():
    mine, (th, tw, tb), y = parts(), parts(), labels()

    def make(leaves, dtype):
        return LMHead(*leaves), LMHead(*(cast(x, dtype) for x in (th, tw[: V - 7], tb[: V - 7]))), y

    agree(mine, make, vocab="truncate", temperature=2.0, reduction="none")
    agree(mine, make, vocab="truncate", temperature=torch.tensor(3.0), label_smoothing=0.2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_learned_temperature_and_coefficients(reduction):
    mine, theirs, y = parts(), parts(), labels(ignored=False)
    values = {"temperature": 2.0, "alpha": 0.3, "z_loss": 0.01}

    def both(backend, dtype):
        given = {k: torch.tensor(v, dtype=dtype, requires_grad=True) for k, v in values.items()}
        student, teacher = (LMHead(*(x.to(dtype) for x in t)) for t in (mine, theirs))
        student.weight.requires_grad_()
        loss = distill_loss(student, teacher, y, backend=backend, memory_budget=BUDGET, reduction=reduction, **given)
        return torch.autograd.grad(loss.sum(), list(given.values()))

    for got, want in zip(both(KERNEL, torch.float32), both("reference", torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_leading_axes_and_strides():
    x, weight, y = torch.randn(2, N + 1, H), parts()[1], torch.stack([labels(), labels()])
    teacher = torch.randn(2, N + 1, V)

    def make(leaves, dtype):  # cast copies are views again: shifted ones, whose rows are not one block
        return LMHead(leaves[0][:, :-1], leaves[1]), cast(teacher, dtype)[:, 1:], y

    agree([x, weight], make)
    agree([x, weight], make, reduction="none", weights=torch.rand(2, N))


@pytest.mark.parametrize("budget", [1, 4 * V, 10**12])
def test_any_budget_gives_the_same_loss(budget):
    mine, theirs, y = parts(), parts(), labels()
    results = []
    for b in (budget, BUDGET):
        tensors = [x.clone().requires_grad_() for x in mine]
        loss = distill_loss(LMHead(*tensors), LMHead(*theirs), y, memory_budget=b, backend=KERNEL)
        results.append([loss.detach(), *torch.autograd.grad(loss, tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- Chunks, and who leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "per_token", "budget", "rows"),
    [(10, 4, 16, 4), (10, 4, 40, 10), (10, 4, 1, 1), (0, 4, 16, 0), (9, 4, 16, 3)],
)
def test_chunk_rows(tokens, per_token, budget, rows):
    assert head.chunk_rows(tokens, per_token, budget) == rows


class Largest(TorchDispatchMode):
    """Watches what is allocated: the elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.skipif(INTERPRETING, reason="the interpreter's own tensors are as large")
@pytest.mark.parametrize("wanted", [[True] * 5, [True, False, False, False, False]])
def test_the_logits_never_exist(wanted):
    (h, w, b), (th, tw, tb), (low, up) = parts(), parts(), low_rank()
    inputs = Inputs([th], None, labels(), None, torch.tensor(2.0), ["forward_kl"], [1.0], [0.0], False, V, 0.0, KERNEL)
    heads = ([w, tw], [b, tb], [low, None], [up, None], [0.0, 0.0], [1.0, 1.0], BUDGET)
    c = torch.ones(N)
    watch = Largest()
    inputs = inputs._replace(labels=inputs.labels.clamp(min=0))
    with watch:
        head._head_fused(h, *inputs.arguments, *heads, False, False, c, c, None, wanted)
    assert watch.elements == V * H
    assert BUDGET // 8 < V * H < N * V


@pytest.mark.parametrize("leave", [True, False], ids=["known to the host", "not known"])
@pytest.mark.parametrize("how", ["ignore_index", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropped_tokens_may_hold_anything(monkeypatch, leave, how, reduction):
    monkeypatch.setattr(head, "_knows_counts", lambda counted: leave)
    (h, w, b), theirs, y = parts(), parts(), labels(ignored=False)
    options = {"temperature": 2.0, "reduction": reduction, "backend": KERNEL, "memory_budget": BUDGET}
    kept = torch.ones(N, dtype=torch.bool)
    kept[::3] = False
    results = []
    for drop in (False, True):
        tensors = [x.clone() for x in (h, w, b)]
        teacher = [theirs[0].clone(), *theirs[1:]]
        labels_, given = y.clone(), dict(options)
        if drop:
            tensors[0][~kept], teacher[0][~kept] = math.nan, math.inf
            if how == "weights":
                given["weights"] = kept.float()
            else:
                labels_[~kept] = -100
        else:
            tensors[0], teacher[0], labels_ = h[kept], theirs[0][kept], y[kept]
        leaves = [x.requires_grad_() for x in tensors]
        loss = distill_loss(LMHead(*leaves), LMHead(*teacher), labels_, **given)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    (loss, dh, *rest), (loss_, dh_, *rest_) = results
    torch.testing.assert_close(loss_[kept] if reduction == "none" else loss_, loss)
    torch.testing.assert_close(dh_[kept], dh)
    assert (dh_[~kept] == 0).all()
    for a, b_ in zip(rest_, rest, strict=True):
        torch.testing.assert_close(a, b_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tokens(shape, reduction):
    tensors = [x.requires_grad_() for x in parts(shape=shape)]
    y = torch.zeros(shape, dtype=torch.int64)
    loss = distill_loss(LMHead(*tensors), labels=y, reduction=reduction, backend=KERNEL)
    assert loss.shape == (shape if reduction == "none" else ())
    assert (loss == 0).all()
    for x, g in zip(tensors, torch.autograd.grad(loss.sum(), tensors), strict=True):
        assert g.shape == x.shape
        assert (g == 0).all()


def test_all_tokens_dropped():
    tensors = [x.requires_grad_() for x in parts()]
    loss = distill_loss(LMHead(*tensors), labels=torch.full((N,), -100), backend=KERNEL)
    assert loss == 0
    for x, g in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
        assert g.shape == x.shape
        assert (g == 0).all()


# --- Autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(1, 2), (0,), (0, 1), (2,)])
def test_frozen_parts(reduction, frozen):
    tensors, theirs, y = parts(), parts(), labels()
    for k, x in enumerate(tensors):
        x.requires_grad_(k not in frozen)
    want = None
    for backend in ("reference", KERNEL):
        loss = distill_loss(LMHead(*tensors), LMHead(*theirs), y, reduction=reduction, backend=backend)
        loss.sum().backward()
        grads = [x.grad for x in tensors]
        assert [g is None for g in grads] == [k in frozen for k in range(3)]
        if want is not None:
            torch.testing.assert_close(grads, want, rtol=1e-4, atol=1e-6)
        want = grads
        for x in tensors:
            x.grad = None


def test_a_tied_weight_sums_its_gradients():
    """The embedding is the head: its gradient has two parts."""
    table, ids, y = (0.3 * torch.randn(V, H)).requires_grad_(), torch.randint(V, (N,)), labels()
    teacher = torch.randn(N, V)
    grads = []
    for backend in ("reference", KERNEL):
        hidden = torch.tanh(table[ids])
        loss = distill_loss(LMHead(hidden, table), teacher, y, backend=backend, temperature=2.0)
        grads.append(torch.autograd.grad(loss, table)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_and_two_backwards(reduction):
    tensors, theirs, y = [x.requires_grad_() for x in parts()], parts(), labels()
    losses = [
        distill_loss(LMHead(*tensors), LMHead(*theirs), y, reduction=reduction, backend=b, memory_budget=BUDGET)
        for b in (KERNEL, "reference")
    ]
    upstreams = [torch.tensor(1.0), torch.tensor(65536.0)]
    if reduction == "none":
        upstreams.append(torch.randn(N))
    for upstream in upstreams:
        got, want = (torch.autograd.grad(x, tensors, upstream.expand(x.shape), retain_graph=True) for x in losses)
        scale = upstream.abs().max()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a / scale, b / scale, rtol=1e-4, atol=2e-6)


def test_double_backward_names_the_remedy():
    tensors, y = [x.requires_grad_() for x in parts()], labels()
    for reduction in ("mean", "none"):
        loss = distill_loss(LMHead(*tensors), labels=y, reduction=reduction, backend=KERNEL).sum()
        (grad,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            grad.square().sum().backward()


def test_grad_scaler_in_fp16():
    """Gradients of 1e-7 vanish in fp16 unless the scale enters before they are rounded."""
    h, w = (x.half() for x in parts(bias=False))
    teacher, y = torch.randn(N, V).half(), labels(ignored=False)

    def gradient(dtype, backend, scale):
        leaf = w.to(dtype).clone().requires_grad_()
        loss = distill_loss(LMHead(h.to(dtype), leaf), teacher.to(dtype), y, backend=backend) * 1e-4
        (grad,) = torch.autograd.grad(loss * scale, leaf)
        return grad.double() / scale

    want, got = gradient(torch.float64, "reference", 1.0), gradient(torch.float16, KERNEL, 65536.0)
    assert ((got - want).norm() / want.norm()).item() < 5e-3


def test_autocast_computes_as_a_linear_layer():
    tensors, theirs, y = [x.requires_grad_() for x in parts()], parts(), labels()
    got = []
    for backend in (KERNEL, "reference"):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = distill_loss(LMHead(*tensors), LMHead(*theirs), y, temperature=2.0, backend=backend)
        got.append([loss.detach(), *torch.autograd.grad(loss, tensors)])
    for a, b in zip(*got, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_reported_terms():
    mine, theirs, y = parts(), parts(), labels()
    options = {"temperature": 2.0, "alpha": 0.3, "return_terms": True, "memory_budget": BUDGET}
    for reduction in ("mean", "none"):
        got, want = (
            distill_loss(LMHead(*mine), LMHead(*theirs), y, backend=b, reduction=reduction, **options)
            for b in (KERNEL, "reference")
        )
        for a, b in pairs_of(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- Compilers and operators ------------------------------------------------------------------------------------------


def arguments(*, with_gradient, low=False):
    (h, w, b), (th, tw, _) = parts(), parts()
    inputs = Inputs(
        [th], None, labels(ignored=False), None, torch.tensor(2.0), ["forward_kl"], [1.0], [0.0], False, V, 0.0, KERNEL
    )
    low, up = low_rank() if low else (None, None)
    heads = ([w, tw], [b, None], [low, None], [up, None], [0.0, 3.0], [1.0, 0.5], BUDGET)
    c, wanted = torch.rand(N), [True, True, False, low is not None, low is not None]
    return (h, *inputs.arguments, *heads, True, True, *((c, c, c, wanted) if with_gradient else ()))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("op", ["head_forward", "head_fused"])
def test_opcheck(op, low):
    function = getattr(torch.ops.kdfast, op).default
    torch.library.opcheck(function, arguments(with_gradient=op == "head_fused", low=low))


@pytest.mark.skipif(INTERPRETING, reason="the compiled CPU graph is the same for both backends")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph(reduction):
    mine, theirs, y = [x.requires_grad_() for x in parts()], parts(), labels()

    def step(h, w, b, th, tw, tb, y):
        student, teacher = LMHead(h, w, b, softcap=20.0), LMHead(th, tw, tb)
        return distill_loss(student, teacher, y, temperature=2.0, reduction=reduction, memory_budget=BUDGET)

    results = []
    for function in (step, torch.compile(step, fullgraph=TRACES, backend="aot_eager")):
        loss = function(*mine, *theirs, y)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), mine)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_func_grad_runs_through_the_reference(monkeypatch):
    monkeypatch.delenv("KDFAST_BACKEND", raising=False)
    (h, w, _), teacher = parts(), torch.randn(N, V)

    def loss(weight):
        return distill_loss(LMHead(h, weight), teacher)

    leaf = w.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(w), want, rtol=1e-4, atol=1e-7)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_wrong_heads(who):
    good = LMHead(torch.randn(N, H), torch.randn(V, H))
    bad = {
        "float32": LMHead(torch.randn(N, H, dtype=torch.bfloat16), torch.randn(V, H)),
        "int64": LMHead(torch.zeros(N, H, dtype=torch.int64), torch.randn(V, H)),
        "meta": LMHead(torch.randn(N, H), torch.randn(V, H, device="meta")),
    }
    for word, other in bad.items():
        pair = (other, good) if who == "student" else (good, other)
        with pytest.raises((TypeError, ValueError), match=rf"{who}.*LMHead.*{word}"):
            distill_loss(*pair)


def test_wrong_low_rank_products():
    h, w, a, b = *parts(bias=False), *low_rank()
    for given, message in (
        ((a, b.T), "low_rank must be"),
        ((a[1:], b), "low_rank must be"),
        ((a, b[:, 1:]), "low_rank must be"),
        (a, "low_rank must be two tensors"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            LMHead(h, w, low_rank=given)
    with pytest.raises(TypeError, match=r"student: LMHead.low_rank\[1\] is torch.bfloat16"):
        distill_loss(LMHead(h, w, low_rank=(a, b.bfloat16())), LMHead(h, w))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"teacher_grad": True}, "gradients to a teacher"), ({"overwrite_logits": True}, "overwrite_logits")],
)
def test_a_named_backend_says_what_it_declines(options, reason):
    logits, teacher = torch.randn(N, V, requires_grad=True), LMHead(torch.randn(N, H), torch.randn(V, H))
    with pytest.raises(RuntimeError, match=reason):
        distill_loss(logits, teacher, backend=KERNEL, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU such a token is NaN instead")
def test_labels_out_of_range():
    y = labels(ignored=False)
    y[N // 2] = V
    with pytest.raises(ValueError, match=rf"labels must be in \[0, {V}\)"):
        distill_loss(LMHead(*(x.requires_grad_() for x in parts())), labels=y, backend=KERNEL)


def test_a_token_without_an_axis():
    hidden, weight, t = torch.randn(6).requires_grad_(), torch.randn(9, 6).requires_grad_(), torch.randn(9)
    for student, teacher in (
        (LMHead(hidden, weight), t),
        (hidden @ weight.T, LMHead(hidden.detach(), weight.detach())),
    ):
        loss = distill_loss(student, teacher, torch.tensor(3), temperature=2.0)
        want = distill_loss(
            hidden @ weight.T, teacher if teacher is t else teacher.logits(), torch.tensor(3), temperature=2.0
        )
        torch.testing.assert_close(loss, want)
        for a, b in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
