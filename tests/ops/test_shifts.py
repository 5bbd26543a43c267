"""Adding a number to all logits of a token changes nothing, whatever the level and the temperature.

Logits are multiples of a power of 2 that leave room for the level, so that they move without rounding. A softmax does
not see the level; a kernel may, where an exponential is taken relative to a maximum of another temperature, or where a
term that the call does not have overflows before it is multiplied by 0.
"""

from __future__ import annotations

import pytest
import torch
from formulas import CASES, untie
from machine import INTERPRETING

from kdfast import LMHead, distill_loss, soft_targets
from kdfast.methods import response

TEMPERATURES = (0.05, 0.25, 1.0, 2.0, 4.0, 50.0)
LEVELS = (0.0, 1e4, -1e4, 30.0, -200.0)
# By dtype, the size of a step between logits and the levels that leave room for it.
STEPS = {
    torch.float32: (2.0**-8, LEVELS),
    torch.float16: (0.25, (0.0, 400.0, -400.0, 30.0)),
    torch.bfloat16: (1.0, (0.0, 120.0, -120.0, 64.0)),
}


def drawn(n, v, tau, dtype=torch.float32):
    """Multiples of the dtype's step, whose spread leaves several columns with mass at this temperature."""
    step = STEPS[dtype][0]
    return (torch.randn(n, v) * min(4.0, 8 * tau**0.5) / step).round() * step


def outcome(loss, *leaves):
    """A loss and its gradients."""
    return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss.sum(), leaves)]


def assert_same(got, want, tau):
    """Loss and gradient in fp32: to a part of the largest entry, and of what p = 1 has where all but cancels.

    A small temperature magnifies the rounding of its inverse, 1e-7 of the logits' spread.
    """
    slack = 3e-5 if tau >= 1 else 1e-4
    units = [tau**2, *[tau] * len(got[1])]
    for g, w, unit in zip([got[0], *got[1]], [want[0], *want[1]], units, strict=True):
        torch.testing.assert_close(g, w, rtol=slack, atol=slack * (w.abs().max().item() + 0.3 * unit))


def dense(s, t, y, **options):
    leaf = s.detach().requires_grad_()
    return outcome(distill_loss(leaf, t, y, **options), leaf)


def test_term_that_is_not_asked_for(backend):
    s, t = torch.tensor([[30.0, 30.5]], requires_grad=True), torch.tensor([[30.5, 30.0]])
    distill_loss(s, t, temperature=0.25, backend=backend).backward()
    torch.testing.assert_close(s.grad, torch.tensor([[-0.190399, 0.190399]]), rtol=1e-5, atol=1e-6)
    s, t = torch.tensor([[-200.0, -199.0]], requires_grad=True), torch.tensor([[-199.0, -200.0]])
    distill_loss(s, t, temperature=4.0, backend=backend).backward()
    assert s.grad.isfinite().all()
    torch.testing.assert_close(s.grad[:, 0], -s.grad[:, 1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense(backend, name, labelled, reduction):
    n, v = (2, 21) if INTERPRETING else (3, 70)
    y = torch.randint(v, (n,)) if labelled else None
    for tau in (0.05, 0.25, 4.0) if INTERPRETING else TEMPERATURES:
        s, t = drawn(n, v, tau), drawn(n, v, tau)
        s = untie(s, t, temperature=tau)
        s = (s * 256).round() / 256
        options = {"divergence": CASES[name].argument, "temperature": tau, "reduction": reduction}
        want = dense(s.double(), t.double(), y, backend="reference", **options)
        for level in LEVELS:
            other = LEVELS[torch.randint(len(LEVELS), ()).item()]
            assert_same(dense(s + level, t + other, y, backend=backend, **options), want, tau)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labelled", [False, True])
def test_dtypes_and_rows_of_several_tiles(backend, name, dtype, labelled):
    n, v = (2, 1100) if INTERPRETING else (2, 9000)
    y = torch.randint(v, (n,)) if labelled else None
    for tau in (0.25,) if INTERPRETING else (0.25, 2.0, 20.0):
        s, t = drawn(n, v, tau, dtype), drawn(n, v, tau, dtype)
        options = {"divergence": name, "temperature": tau, "reduction": "sum"}
        want = dense(s.double(), t.double(), y, backend="reference", **options)
        for level in STEPS[dtype][1]:
            moved = [(x + level).to(dtype) for x in (s, t)]
            loss, (grad,) = dense(*moved, y, backend=backend, **options)
            rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(loss, want[0], rtol=1e-4, atol=1e-5 * tau**2)
            torch.testing.assert_close(
                grad, want[1][0], rtol=rounding, atol=3e-5 * tau + rounding * want[1][0].abs().max().item()
            )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_truncated_vocabulary(backend, labelled, wider):
    n, v, more = 3, 40, 30
    y = torch.randint(v, (n,)) if labelled else None
    for tau in (0.25, 4.0) if INTERPRETING else TEMPERATURES:
        s, t = (drawn(n, v + more * (who == wider), tau) for who in ("student", "teacher"))
        s[:, v:] += 8  # its largest logits are not distilled
        options = {"temperature": tau, "vocab": "truncate", "reduction": "sum"}
        want = dense(s.double(), t.double(), y, backend="reference", **options)
        for level in LEVELS:
            assert_same(dense(s + level, t - level, y, backend=backend, **options), want, tau)


@pytest.mark.parametrize("labelled", [False, True])
def test_ensemble(backend, labelled):
    n, v = 3, 40
    y = torch.randint(v, (n,)) if labelled else None
    for tau in (0.25, 4.0):
        s, *ts = (drawn(n, v, tau) for _ in range(3))
        options = {"temperature": tau, "divergence": "reverse_kl", "teacher_weights": [1.0, 3.0], "reduction": "sum"}
        want = dense(s.double(), [t.double() for t in ts], y, backend="reference", **options)
        for level in LEVELS:
            assert_same(dense(s + level, [ts[0] - level, ts[1] + level], y, backend=backend, **options), want, tau)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("tail", "name"), [("bucket", "forward_kl"), ("bucket", "reverse_kl"), ("renorm", "jsd"), ("zero", "forward_kl")]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_targets(backend, labelled, tail, name, reduction):
    n, v = (2, 30) if INTERPRETING else (3, 70)
    y = torch.randint(v, (n,)) if labelled else None
    for tau in (0.25, 4.0) if INTERPRETING else TEMPERATURES:
        s, t = drawn(n, v, tau), drawn(n, v, tau)
        targets = soft_targets(t, k=9, temperatures=(tau,))
        options = {"divergence": name, "temperature": tau, "tail": tail, "reduction": reduction}
        want = dense(s.double(), targets, y, backend="reference", **options)
        if tau == 0.05:  # the mass of such a tail is not in the targets' fp32, see SparseTargets
            want = dense(s, targets, y, backend=backend, **options)
        for level in LEVELS:
            assert_same(dense(s + level, targets, y, backend=backend, **options), want, tau)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads(backend, labelled, name, reduction):
    n, v = (2, 20) if INTERPRETING else (4, 40)
    y = torch.randint(v, (n,)) if labelled else None
    for tau in (0.25, 4.0):
        x, t = drawn(n, v, tau), drawn(n, v, tau)
        options = {"divergence": name, "temperature": tau, "reduction": reduction, "backend": backend}
        want = None
        for level in LEVELS:
            hidden, bias = x.clone().requires_grad_(), torch.full((v,), level)
            weight = torch.eye(v, requires_grad=True)
            head, teacher = LMHead(hidden, weight, bias), LMHead(t, torch.eye(v), -bias)
            got = outcome(distill_loss(head, teacher, y, **options), hidden, weight)
            want = want or got
            assert_same(got, want, tau)


def test_label_smoothing(backend):
    n, v = (2, 30) if INTERPRETING else (3, 5000)
    y = torch.randint(v, (n,))
    s, t = drawn(n, v, 1.0), drawn(n, v, 1.0)
    want = dense(s.double(), t.double(), y, label_smoothing=0.3, backend="reference")
    for level in LEVELS:
        assert_same(dense(s + level, t, y, label_smoothing=0.3, backend=backend), want, 1.0)


METHODS = {
    "dkd": lambda s, t, y, tau: response.dkd_loss(s, t, y, temperature=tau),
    "nkd": lambda s, t, y, tau: response.nkd_loss(s, t, y, temperature=tau),
    "adaptive_kl": lambda s, t, y, tau: response.adaptive_kl_loss(s, t, temperature=tau),
    "adaptive_kl, labelled": lambda s, t, y, tau: response.adaptive_kl_loss(s, t, y, temperature=tau, alpha=0.4),
    "dist": lambda s, t, y, tau: response.dist_loss(s, t, temperature=tau),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(backend, name, monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", backend)
    n, v, loss = 3, 12, METHODS[name]
    y = torch.randint(v, (n,))
    for tau in (0.25, 1.0, 4.0):
        s, t = drawn(n, v, tau), drawn(n, v, tau)
        monkeypatch.setenv("KDFAST_BACKEND", "reference")
        leaf = s.double().requires_grad_()
        want = outcome(loss(leaf, t.double(), y, tau), leaf)
        monkeypatch.setenv("KDFAST_BACKEND", backend)
        for level in LEVELS:
            leaf = (s + level).requires_grad_()
            assert_same(outcome(loss(leaf, t - level, y, tau), leaf), want, tau)
