"""How the gradient comes back: both modes of the kernel, upstream gradients, a second backward, overwritten logits."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from formulas import CASES, untie
from machine import KERNEL, TRITON, VARIANTS

from kdfast import DistillLoss, distill_loss

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.usefixtures("poisoned"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: (1e-5, 1e-8), torch.bfloat16: (8e-3, 1e-6), torch.float16: (1e-3, 1e-6)}


def inputs(dtype=torch.float32, n=5, v=1100, shape=None):
    s, t = (torch.randn(shape or (n, v)).to(dtype) for _ in range(2))
    s = untie(s, t, temperature=2.0).requires_grad_()
    return s, t, torch.randint(s.shape[-1], s.shape[:-1])


def loss_of(s, t, y, **options):
    return distill_loss(s, t, y, **{"temperature": 2.0, "z_loss": 1e-3, "backend": KERNEL} | options)


def truth(s, t, y, upstream, **options):
    z = s.detach().double().requires_grad_()
    loss = loss_of(z, t.double(), y, **options | {"backend": "reference", "overwrite_logits": False})
    return torch.autograd.grad(loss, z, upstream.double().expand(loss.shape))[0]


def assert_gradient(got, want, dtype, scale=1.0):
    rtol, atol = TOLERANCE[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=rtol, atol=max(atol, 2e-7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CASES)
def test_upstream_gradients_and_two_backwards(name, reduction, dtype):
    s, t, y = inputs(dtype)
    options = {"reduction": reduction, "divergence": CASES[name].argument}
    loss = loss_of(s, t, y, **options)
    factors = [torch.tensor(1.0), torch.tensor(0.25)]
    if dtype != torch.float16:
        factors.append(torch.tensor(65536.0))
    if reduction == "none":
        factors.append(torch.randn(5))
    for upstream in factors:  # the same graph again and again
        (grad,) = torch.autograd.grad(loss, s, upstream.expand(loss.shape), retain_graph=True)
        assert_gradient(grad, truth(s, t, y, upstream, **options), dtype, scale=max(1.0, upstream.abs().max().item()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_from_every_backward(reduction):
    s, t, y = inputs()
    loss = loss_of(s, t, y, reduction=reduction)
    first, second = (torch.autograd.grad(loss.sum(), s, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    loss.sum().backward()
    assert torch.equal(s.grad, first)


def test_gradients_accumulate():
    s, t, y = inputs()
    for _ in range(2):
        loss_of(s, t, y).backward()
    assert_gradient(s.grad, 2 * truth(s, t, y, torch.tensor(1.0)), torch.float32)


def test_upstream_through_a_graph():
    """The loss as a part of another: its gradient is scaled by what comes after it."""
    s, t, y = inputs()
    factor = torch.tensor(3.0, requires_grad=True)
    (factor * loss_of(s, t, y) + s.square().sum()).backward()
    assert_gradient(s.grad, 3 * truth(s, t, y, torch.tensor(1.0)) + 2 * s.detach().double(), torch.float32)
    assert factor.grad.item() == pytest.approx(loss_of(s, t, y).item(), rel=1e-6)


def test_no_gradient_wanted():
    s, t, y = inputs()
    with torch.no_grad():
        plain = loss_of(s, t, y)
    assert not plain.requires_grad
    assert plain.item() == pytest.approx(loss_of(s, t, y).item(), rel=1e-6)
    assert not loss_of(s.detach(), t, y).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_a_grad_scaler(dtype, reduction):
    """Gradients of 1e-7 vanish in fp16 unless the scale enters before they are rounded."""
    torch.manual_seed(0)
    hidden, y = torch.randn(8, 6, dtype=dtype), torch.randint(500, (8,))
    teacher = torch.randn(8, 500).to(dtype)
    weight = torch.randn(500, 6).div(4).to(dtype)

    def gradient(scale):
        w = weight.clone().requires_grad_()
        loss = loss_of(hidden @ w.T, teacher, y, reduction=reduction, z_loss=0.0).mean() * 1e-3
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD([w], lr=0.0)
        scaler.scale(loss).backward()
        if dtype != torch.float16:  # it refuses to unscale fp16 parameters
            scaler.unscale_(optimizer)
            return w.grad.double()
        return w.grad.double() / scale

    z = (hidden @ weight.T).detach()
    exact = 1e-3 * truth(
        z, teacher, y, torch.tensor(1.0 / (8 if reduction == "none" else 1)), reduction=reduction, z_loss=0.0
    )
    want = exact.T @ hidden.double()
    got = gradient(65536.0)
    assert ((got - want).norm() / want.norm()).item() < {
        torch.float32: 1e-5,
        torch.bfloat16: 1e-2,
        torch.float16: 2e-3,
    }[dtype]


# --- Logits that change, or give way to their gradient ----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_logits_modified_before_backward(reduction, who):
    s, t, y = inputs()
    z = s * 1.0
    loss = loss_of(z, t, y, reduction=reduction).sum()
    want = truth(s, t, y, torch.tensor(1.0), reduction=reduction)
    with torch.no_grad():
        (z if who == "student" else t).add_(1.0)
    if reduction == "mean":  # its gradient was made before the change; a second one cannot be
        (grad,) = torch.autograd.grad(loss, s, retain_graph=True)
        assert_gradient(grad, want, torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CASES)
def test_overwritten_logits(name, reduction, dtype):
    s, t, y = inputs(dtype)
    options = {"reduction": reduction, "divergence": CASES[name].argument}
    upstream = torch.rand(5) if reduction == "none" else torch.tensor(0.5)
    want_loss = loss_of(s, t, y, **options)
    (want,) = torch.autograd.grad(want_loss, s, upstream)
    z = s.detach().clone().requires_grad_()
    loss = loss_of(z, t, y, overwrite_logits=True, **options)
    torch.testing.assert_close(loss, want_loss, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(loss, z, upstream, retain_graph=True)
    torch.testing.assert_close(grad, want, rtol=0, atol=0)
    assert grad.data_ptr() == z.data_ptr()
    with pytest.raises(RuntimeError, match=r"overwrite_logits|modified by an inplace operation"):
        torch.autograd.grad(loss, z, upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_overwriting_inside_a_model(reduction):
    hidden = torch.randn(4, 3, 6)
    y, t = torch.randint(300, (4, 3)), torch.randn(4, 3, 300)
    grads = []
    for overwrite in (False, True):
        layer = torch.nn.Linear(6, 300)
        torch.nn.init.constant_(layer.bias, 0.1)
        layer.weight.data = torch.linspace(-1, 1, 1800).view(300, 6).sin()
        loss_of(layer(hidden), t, y, reduction=reduction, overwrite_logits=overwrite).sum().backward()
        grads.append((layer.weight.grad, layer.bias.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_another_consumer_of_overwritten_logits_raises(reduction):
    """Square saves its argument, and must not see the gradient in the place of the logits."""
    s, t, y = inputs()
    z = s * 1.0
    other = z.square().sum()
    total = loss_of(z, t, y, reduction=reduction, overwrite_logits=True).sum() + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_logits_that_share_memory_cannot_be_overwritten():
    s, t = torch.randn(1, 50), torch.randn(4, 50)
    leaf = s.clone().requires_grad_()
    with pytest.raises((RuntimeError, ValueError), match=r"overwrite_logits|memory"):
        loss_of(leaf.expand(4, 50), t, torch.arange(4), overwrite_logits=True).backward()
    torch.testing.assert_close(leaf.detach(), s)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_overwriting_a_view(reduction):
    """A part of longer logits: its memory takes the gradient, the rest stays, and autograd goes on through the view."""
    s, t, y = inputs(shape=(2, 4, 60))
    full = s * 1.0
    before = full.detach().clone()
    loss_of(full[:, :-1], t[:, :-1], y[:, :-1], reduction=reduction, overwrite_logits=True).sum().backward()
    want = truth(s[:, :-1], t[:, :-1], y[:, :-1], torch.tensor(1.0), reduction=reduction)
    assert_gradient(s.grad[:, :-1], want, torch.float32)
    assert (s.grad[:, -1] == 0).all()
    assert torch.equal(full.detach()[:, -1], before[:, -1])


def test_overwriting_strided_rows():
    s, t, y = inputs(shape=(4, 60))
    strided = torch.stack([s.detach(), s.detach()], -1)[..., 0].requires_grad_()
    want = truth(s, t, y, torch.tensor(1.0))
    try:
        loss = loss_of(strided, t, y, overwrite_logits=True)
    except (RuntimeError, ValueError) as error:
        assert "overwrite_logits" in str(error)  # noqa: PT017 - an error is one of two right answers
        return
    (grad,) = torch.autograd.grad(loss, strided)
    assert_gradient(grad, want, torch.float32)


def test_a_second_derivative_is_refused():
    s, t, y = inputs()
    for reduction in ("mean", "none"):
        loss = loss_of(s, t, y, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, s, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|second derivative"):
            grad.square().sum().backward()


def test_the_graph_is_freed():
    s, t, y = inputs()
    loss = loss_of(s, t, y, reduction="none").sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# --- Threads and processes --------------------------------------------------------------------------------------------


one_thread = pytest.mark.skipif(TRITON, reason="of the threads and processes of a CPU")


@one_thread
def test_many_python_threads_at_once():
    work = [inputs(v=9000) for _ in range(8)]
    want = [torch.autograd.grad(loss_of(*x), x[0])[0] for x in work]
    got = [None] * len(work)

    def call(k):
        for _ in range(5):
            got[k] = torch.autograd.grad(loss_of(*work[k]), work[k][0])[0]

    running = [threading.Thread(target=call, args=(k,)) for k in range(len(work))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


FORK = """
import os, warnings, torch, kdfast
warnings.simplefilter("ignore")
torch.set_num_threads(2)
s, t = torch.randn(64, 9000, requires_grad=True), torch.randn(64, 9000)
def value():
    loss = kdfast.distill_loss(s, t, temperature=2.0, backend="cpu")
    return loss.item(), torch.autograd.grad(loss, s)[0].sum().item()
torch.set_num_threads({parent})
before = value() if {parent} else None
child = os.fork()
if child == 0:
    with torch.no_grad():  # the autograd engine itself cannot be used after a fork
        got = kdfast.distill_loss(s, t, temperature=2.0, backend="cpu").item()
    os._exit(0 if before is None or got == before[0] else 3)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 0, status
assert value() == before
print("ok")
"""


@one_thread
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("parent", [1, 2])
def test_after_a_fork(parent, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORK.replace("{parent}", str(parent))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,  # where no source tree stands before the installed package
    )
    assert done.stdout == "ok\n", done.stderr


def test_module_in_a_training_step():
    """Twenty steps on the student's logits bring it to the teacher."""
    teacher = torch.randn(16, 30)
    student = torch.nn.Parameter(torch.zeros(16, 30))
    criterion = DistillLoss(temperature=2.0, reduction="sum", backend=KERNEL)
    optimizer = torch.optim.SGD([student], lr=2.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = criterion(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(b < a for a, b in itertools.pairwise(losses))
