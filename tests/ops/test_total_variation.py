"""The total variation's gradient, p (s - sum p s) / (2 tau) with s = sign(p - q): s is right close to equality, too.

Right means that of fp64, from the logits as they are stored, wherever p and q are 1e-9 apart. Columns that are closer
may go either way, and their mass is what they can move the others by.
"""

from __future__ import annotations

import pytest
import torch
from formulas import balanced, half_ulp
from machine import KERNEL, VARIANTS, choose

from kdfast import distill_loss

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
N = 4


def noise(*shape):
    """Of either sign, 1e-7 to 1e-3, and of many columns none."""
    size = 10 ** (-7 + 4 * torch.rand(*shape))
    return torch.where(torch.rand(*shape) < 0.4, torch.randn(*shape).sign() * size, 0.0)


def teachers(z, tau):
    """Teachers near z everywhere, but for one column, but for a level, and in some columns only."""
    one = z.clone()
    one[torch.arange(len(z)), torch.randint(z.shape[-1], (len(z),))] += 0.5
    chosen = torch.rand(z.shape) < 0.2
    apart = torch.randn(z.shape).sign() * 10 ** (-8 + 2 * torch.rand(z.shape))
    even = balanced(z.double(), 3 * torch.randn(z.shape).double(), tau, chosen, apart)
    return {
        "stored like the student": (z.float() + noise(*z.shape)).to(z.dtype),
        "near": z.float() + noise(*z.shape),
        "one column": one,
        "one column and noise": one.float() + noise(*z.shape),
        "level": z.float() + noise(*z.shape) + 9.7,
        "balanced": even.float(),
        "balanced at a level": (even - 40).float(),
    }


def excused(z, t, tau):
    """(p, columns that are closer than 1e-9, columns that fp32 would get wrong and are not excused)."""
    lp, lq = (torch.log_softmax(x.double() / tau, -1) for x in (z, t))
    p, difference = lp.exp(), (lp.exp() - lq.exp()).abs()
    return p, difference <= 1e-9, (difference > 1e-9) & ((lp - lq).abs() < 1e-7)


def gradient(z, t, tau, divergence, reduction, backend):
    leaf = z.detach().clone().requires_grad_()
    options = {"divergence": divergence, "temperature": tau, "scale_t2": False, "reduction": reduction}
    distill_loss(leaf, t, backend=backend, **options).sum().backward()
    return leaf.grad.double()


def check(z, t, tau, divergence="tvd", weight=1.0, slack=0.0):
    """Hold the gradient, in both modes, to that of fp64; returns how many columns fp32 could not have told apart."""
    p, tied, close = excused(z, t, tau)
    truth = gradient(z.double(), t.double(), tau, divergence, "sum", "reference")
    mass = (p * tied).sum(-1, keepdim=True)
    allowed = weight * p / tau * (mass + 1e-4) + half_ulp(truth, z.dtype) + slack / tau
    for reduction in ("sum", "none"):
        got = gradient(z, t, tau, divergence, reduction, KERNEL)
        wrong = ((got - truth).abs() > allowed) & ~tied
        assert not wrong.any(), f"{int(wrong.sum())} columns, {reduction}"
    return int(close.sum())


@pytest.mark.parametrize("tau", [0.7, 2.0])
@pytest.mark.parametrize("v", [6, 37, 2500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_near_equality(monkeypatch, dtype, v, tau):
    few = v == 6
    z = (torch.randn(32, v) / 5 if few else 2 * torch.randn(N, v)).to(DTYPES[dtype])
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        close = 0
        for name, t in teachers(z, tau).items():
            try:
                close += check(z, t, tau)
            except AssertionError as error:
                raise AssertionError(f"{isa}, {name}: {error}") from None
        assert close > 0 or not few  # of more columns hardly a p is so large that 1e-9 does not excuse such a one


def test_masked_columns_and_large_logits(monkeypatch):
    z = 2 * torch.randn(N, 300)
    t = z + noise(N, 300)
    z[0, :20] = t[0, 10:30] = -torch.inf
    z[1] += 9000
    t[1] += 9000
    z[2, 7:40] = t[2, 7:40] = -3e38
    t[3, 5:80] = -torch.inf
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        check(z, t, 1.0)


@pytest.mark.parametrize("v", [37, 2500])
def test_mixture(monkeypatch, v):
    z = 2 * torch.randn(N, v)
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        for t in teachers(z, 2.0).values():
            check(z, t, 2.0, {"tvd": 1.0, "jsd": 0.5}, slack=1e-6)


def test_equal_logits_have_no_gradient(monkeypatch):
    z = 3 * torch.randn(N, 1100)
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        for dtype in DTYPES.values():
            x = z.to(dtype)
            assert gradient(x, x.clone(), 0.7, "tvd", "none", KERNEL).abs().max() == 0


def test_mixed_logits(monkeypatch):
    """Of teachers whose weighted sum fp32 has exactly."""
    z = 2 * torch.randn(N, 700)
    first = (z + noise(N, 700)).bfloat16().float()
    z = (first + noise(N, 700)).bfloat16()
    teachers = [first, first]
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        leaf = z.clone().requires_grad_()
        options = {"divergence": "tvd", "ensemble": "logit", "scale_t2": False, "reduction": "sum", "backend": KERNEL}
        distill_loss(leaf, teachers, **options).backward()
        p, tied, _ = excused(z, first, 1.0)
        truth = gradient(z.double(), first.double(), 1.0, "tvd", "sum", "reference")
        allowed = p * ((p * tied).sum(-1, keepdim=True) + 1e-4) + half_ulp(truth, z.dtype)
        assert (((leaf.grad.double() - truth).abs() <= allowed) | tied).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_number_that_is_none_is_seen(monkeypatch, who, reduction):
    z, t = torch.randn(2, 50), torch.randn(2, 50)
    (z if who == "student" else t)[0, 17] = torch.nan
    for isa in VARIANTS:
        choose(isa, monkeypatch)
        grad = gradient(z, t, 1.0, "tvd", reduction, KERNEL)
        assert grad[0].isnan().all()
        assert grad[1].isfinite().all()
