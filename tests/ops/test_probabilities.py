"""Labels as class probabilities: the value and the gradient of torch's own cross-entropy, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from machine import DEVICE, KERNEL, TRACES

import kdfast
from kdfast import LMHead, distill_loss

V = 37


def drawn(*leading, v=V):
    """Probabilities, some of them 0, as cutmix has them."""
    y = torch.rand(*leading, v) ** 4
    y = torch.where(torch.rand(*leading, v) < 0.5, 0.0, y) + F.one_hot(torch.randint(v, leading), v)
    return y / y.sum(-1, keepdim=True)


def both(loss, leaf):
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().double(), grad.double()


def close(got, want, dtype):
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 2e-3), torch.float16: (2e-3, 1e-3)}[dtype]
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_torch_has_it(backend, dtype, smoothing, reduction):
    z, y = (3 * torch.randn(2, 5, V)).to(dtype).requires_grad_(), drawn(2, 5)
    got = both(distill_loss(z, labels=y, label_smoothing=smoothing, reduction=reduction, backend=backend), z)
    exact = z.detach().double().requires_grad_()
    want = F.cross_entropy(
        exact.flatten(0, 1), y.double().flatten(0, 1), label_smoothing=smoothing, reduction=reduction
    )
    close(got, both(want.reshape(got[0].shape), exact), dtype)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, torch.tensor(0.3), "per token"], ids=str)
@pytest.mark.parametrize("teacher", ["dense", "sparse", "none"])
def test_beside_a_teacher(backend, alpha, teacher):
    z, t, y, w = torch.randn(6, V).requires_grad_(), torch.randn(6, V), drawn(6), torch.rand(6)
    w[2] = 0
    alpha = torch.tensor([0.0, 0.3, 1.0, 0.5, 1.0, 0.2]) if isinstance(alpha, str) else alpha
    options = {"weights": w, "temperature": 2.0, "z_loss": 1e-2}
    if teacher != "none":
        options["alpha"] = alpha
    given = {"dense": t, "sparse": kdfast.soft_targets(t, k=8, temperatures=(2.0,)), "none": None}[teacher]
    got = distill_loss(z, given, y, backend=backend, return_terms=True, **options)
    exact = z.detach().double().requires_grad_()
    ce = -(y.double() * torch.log_softmax(exact, -1)).sum(-1)
    a = torch.as_tensor(alpha if given is not None else 0.0).double()
    want = (w * ((1 - a) * ce + 1e-2 * torch.logsumexp(exact, -1).square())).sum() / w.sum()
    if given is not None:
        soft = distill_loss(exact, given, temperature=2.0, reduction="none", backend="reference")
        want = want + (w * a * soft).sum() / w.sum()
    close(both(got.loss, z), both(want, exact), torch.float32)
    torch.testing.assert_close(got.hard.double(), ((w * ce).sum() / w.sum()).detach(), rtol=1e-5, atol=1e-6)
    assert (got.soft is None) == (given is None)


def test_one_hot_is_the_index(backend):
    z, labels = (5 * torch.randn(7, V)).requires_grad_(), torch.randint(V, (7,))
    options = {"label_smoothing": 0.1, "backend": backend}
    want = both(distill_loss(z, labels=labels, **options), z)
    close(both(distill_loss(z, labels=F.one_hot(labels, V).float(), **options), z), want, torch.float32)


def test_edges(backend):
    z = torch.randn(5, V)
    z[0, 3] = z[1, 4] = -torch.inf
    z[4] = torch.nan
    y = drawn(5)
    y[0, 3], y[1, 4] = 0, 0.5  # no mass where the student has none; mass there
    y[2] = 0  # nothing
    z.requires_grad_()
    loss = distill_loss(z, labels=y, weights=torch.tensor([1.0, 1, 1, 1, 0]), reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss[[0, 2, 3, 4]].sum(), z)
    assert loss[[0, 2, 3, 4]].isfinite().all()
    assert loss[1] == torch.inf
    assert (loss[2], loss[4]) == (0, 0)
    assert grad.isfinite().all()
    assert (grad[[1, 2, 4]] == 0).all()
    torch.testing.assert_close(grad[3], (torch.softmax(z[3], -1) - y[3]).detach(), rtol=1e-5, atol=1e-7)


def test_a_confident_token_is_never_below_0(backend):
    z = torch.zeros(64, V)
    y = F.one_hot(torch.randint(V, (64,)), V).float()
    z[y > 0] = torch.linspace(5, 60, 64)
    loss = distill_loss(z, labels=y, reduction="none", backend=backend)
    assert (loss >= 0).all()


def test_heads_and_axes(backend):
    h, w, y = torch.randn(6, 8), torch.randn(V, 8), drawn(6)
    leaves = [x.clone().requires_grad_() for x in (h, w)]
    loss = distill_loss(LMHead(*leaves), labels=y, label_smoothing=0.1, backend=backend)
    got = torch.autograd.grad(loss, leaves)
    plain = [x.double().requires_grad_() for x in (h, w)]
    want = F.cross_entropy(plain[0] @ plain[1].t(), y.double(), label_smoothing=0.1)
    for a, b in zip(got, torch.autograd.grad(want, plain), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    z, y = torch.randn(2, V, 3, 4), drawn(2, 3, 4).movedim(-1, 1)
    torch.testing.assert_close(distill_loss(z, labels=y, class_dim=1, backend=backend), F.cross_entropy(z, y))


def test_compiled():
    z, y = torch.randn(4, V, requires_grad=True), drawn(4)
    got = both(torch.compile(lambda z: distill_loss(z, labels=y), fullgraph=TRACES, backend="aot_eager")(z), z)
    close(got, both(F.cross_entropy(z, y), z), torch.float32)


def test_what_is_refused():
    z, y = torch.randn(4, V, device=DEVICE), drawn(4)
    with pytest.raises(ValueError, match=r"labels must be >= 0 and finite, got -"):
        distill_loss(z, labels=y - 1)
    with pytest.raises(ValueError, match="overwrite_logits: class probabilities"):
        distill_loss(z, labels=y, overwrite_logits=True)
    with pytest.raises(ValueError, match=r"labels.*class probabilities as floating point \(4, 37\)"):
        distill_loss(z, labels=y[:, :-1])
    with pytest.raises(TypeError, match=r"labels must be int64"):
        distill_loss(z, labels=y[:, 0])
    with pytest.raises(ValueError, match="labels must be class indices"):
        kdfast.methods.dkd_loss(z, z, y)
    with pytest.raises(ValueError, match=r"labels: class probabilities are not served by kdfast.distributed"):
        kdfast.distributed.distill_loss(z, labels=y)


def test_nothing_is_learned_of_the_labels():
    z, y = torch.randn(4, V, requires_grad=True), drawn(4).requires_grad_()
    for backend in ("reference", KERNEL):
        assert torch.autograd.grad(distill_loss(z, labels=y, backend=backend), y, allow_unused=True) == (None,)
