"""A weight of 0 silences its term: an infinite value adds nothing to the loss, and its gradient nothing to anybody's.

By every way of saying 0: a number, a 0-d tensor, a token's own; of the distillation term, the cross-entropy, the z term
and a loss of a Distiller.
"""

from __future__ import annotations

import math

import pytest
import torch
from machine import INTERPRETING
from torch import nn

from kdfast import Distiller, LMHead, SparseTargets, distill_loss
from kdfast.methods import KD, CrossEntropy, Loss, response

INF = math.inf
N, V = 3, 12


def scene():
    """A student, a teacher without mass in a column where the student has some, and labels elsewhere."""
    s, t = torch.randn(N, V), torch.randn(N, V)
    t[:, 4] = -INF
    return s, t, torch.tensor([0, 5, V - 1])


def gradients(loss, *leaves):
    return torch.autograd.grad(loss.sum(), leaves)


#: Ways of saying that the distillation term has no weight.
ZEROS = {
    "number": lambda: 0.0,
    "tensor": lambda: torch.tensor(0.0),
    "learned": lambda: torch.tensor(0.0, requires_grad=True),
    "per token": lambda: torch.zeros(N),
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1.0, 3.0, "learned"])
@pytest.mark.parametrize("divergence", ["reverse_kl", {"reverse_kl": 0.5, "tvd": 0.5}])
def test_alpha(backend, zero, reduction, temperature, divergence):
    s, t, y = scene()
    options = {"reduction": reduction, "divergence": divergence, "backend": backend}
    leaf, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
    tau = torch.tensor(3.0, requires_grad=True) if temperature == "learned" else temperature
    alpha = ZEROS[zero]()
    loss = distill_loss(leaf, t, y, alpha=alpha, temperature=tau, **options)
    want = distill_loss(plain, labels=y, reduction=reduction)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss.sum(), leaf), gradients(want, plain))
    if temperature == "learned":
        leaf, alpha = s.clone().requires_grad_(), ZEROS[zero]()
        loss = distill_loss(leaf, t, y, alpha=alpha, temperature=tau, **options)
        assert gradients(loss, tau)[0] == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_alpha_of_some_tokens(backend, reduction):
    s, t, y = scene()
    t[1:, 4] = 0.0  # finite where it counts
    alpha = torch.tensor([0.0, 0.5, 1.0])
    leaf, some = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = distill_loss(leaf, t, y, alpha=alpha, divergence="reverse_kl", reduction=reduction, backend=backend)
    t = t.clone()
    t[0, 4] = 0.0  # has no weight there
    want = distill_loss(some, t, y, alpha=alpha, divergence="reverse_kl", reduction=reduction, backend="reference")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, leaf), gradients(want, some))


def test_terms_are_reported_though_they_have_no_weight(backend):
    s, t, y = scene()
    leaf, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
    terms = distill_loss(leaf, t, y, alpha=0.0, divergence="reverse_kl", return_terms=True, backend=backend)
    assert terms.soft == INF
    want = distill_loss(plain, labels=y)
    torch.testing.assert_close(terms.loss, want)
    torch.testing.assert_close(gradients(terms.loss, leaf), gradients(want, plain))


@pytest.mark.parametrize("one", [1.0, torch.tensor(1.0), torch.ones(N)], ids=["number", "tensor", "per token"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy(backend, one, reduction):
    s, t, y = scene()
    s[:, 5] = -INF  # a label's column, among others
    t[:, 5] = -INF
    t[:, 4] = 0.0
    leaf, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = distill_loss(leaf, t, y, alpha=one, reduction=reduction, backend=backend)
    want = distill_loss(plain, t, reduction=reduction, backend="reference")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, leaf), gradients(want, plain))


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_z_loss(backend, zero):
    s, t, y = scene()
    s[0] = t[0] = -INF  # no logsumexp
    alpha, leaf = torch.tensor([1.0, 0.5, 0.5]), s.clone().requires_grad_()
    loss = distill_loss(leaf, t, y, alpha=alpha, z_loss=zero, reduction="none", backend=backend)
    plain = s[1:].clone().requires_grad_()
    want = distill_loss(plain, t[1:], y[1:], reduction="none", backend="reference")
    torch.testing.assert_close(loss[1:], want)
    torch.testing.assert_close(gradients(loss[1:], leaf)[0][1:], gradients(want, plain)[0])


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads(backend, zero, reduction):
    s, t, y = scene()
    weight, hidden = torch.eye(V, requires_grad=True), s.clone().requires_grad_()
    options = {"alpha": ZEROS[zero](), "divergence": "reverse_kl", "reduction": reduction, "backend": backend}
    loss = distill_loss(LMHead(hidden, weight), t, y, **options)
    leaves = torch.eye(V, requires_grad=True), s.clone().requires_grad_()
    want = distill_loss(leaves[1] @ leaves[0].T, labels=y, reduction=reduction)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, weight, hidden), gradients(want, *leaves))


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_targets(backend, zero, tail, reduction):
    s, _, y = scene()
    s[:, 3] = -INF  # kept by the teacher: forward KL is infinite
    ids = torch.tensor([[3, 1, 7]], dtype=torch.int32).expand(N, 3).contiguous()
    targets = SparseTargets(ids, torch.tensor([0.4, 0.3, 0.2]).log().expand(N, 3).contiguous(), vocab_size=V)
    leaf, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
    loss = distill_loss(leaf, targets, y, alpha=ZEROS[zero](), tail=tail, reduction=reduction, backend=backend)
    want = distill_loss(plain, labels=y, reduction=reduction)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradients(loss, leaf), gradients(want, plain))


@pytest.mark.skipif(INTERPRETING, reason="plain PyTorch, beside kernels that are tested above")
class TestMethods:
    """Losses of methods, and a Distiller's sum of them."""

    @pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
    @pytest.mark.parametrize("name", ["adaptive_kl_loss", "standardised_loss", "ttm_loss", "dist_loss"])
    def test_alpha(self, backend, name, zero, monkeypatch):
        monkeypatch.setenv("KDFAST_BACKEND", backend)
        s, t, y = scene()
        s[:, 2] = -INF  # for forward KL
        leaf, plain = s.clone().requires_grad_(), s.clone().requires_grad_()
        loss = getattr(response, name)(leaf, t, y, alpha=zero)
        want = distill_loss(plain, labels=y)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradients(loss, leaf), gradients(want, plain))

    @pytest.mark.parametrize("part", ["alpha", "beta"])
    def test_decoupled(self, backend, part, monkeypatch):
        monkeypatch.setenv("KDFAST_BACKEND", backend)
        s, t, y = torch.randn(N, V), torch.randn(N, V), torch.tensor([0, 5, V - 1])
        s[0, 3 if part == "beta" else 0] = -INF  # infinite among the others, or of the label
        leaf = s.clone().requires_grad_()
        loss = response.dkd_loss(leaf, t, y, **{part: 0.0})
        assert loss.isfinite()
        assert gradients(loss, leaf)[0].isfinite().all()

    @pytest.mark.parametrize("weight", [0.0, torch.tensor(0.0), lambda step: 0.0], ids=["number", "tensor", "schedule"])
    def test_distiller(self, backend, weight, monkeypatch):
        monkeypatch.setenv("KDFAST_BACKEND", backend)
        student, plain = nn.Linear(4, V), nn.Linear(4, V)
        plain.load_state_dict(student.state_dict())
        x, (_, t, y) = torch.randn(N, 4), scene()
        silent = KD(divergence="reverse_kl", temperature=1.0, weight=weight, name="silent")
        with Distiller(student, Constant(t), [CrossEntropy(), silent]) as d:
            loss, terms = d((x, y))
        loss.backward()
        want = distill_loss(plain(x), labels=y)
        want.backward()
        assert terms["silent"] == INF
        torch.testing.assert_close(loss, want)
        for got, p in zip(student.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, p.grad)

    def test_distiller_whose_only_loss_is_silent(self):
        student = nn.Linear(4, V)
        x, (_, t, y) = torch.randn(N, 4), scene()
        with Distiller(student, Constant(t), [KD(divergence="reverse_kl", weight=0.0)]) as d:
            loss, _ = d((x, y))
        loss.backward()
        assert loss == 0
        assert all((p.grad == 0).all() for p in student.parameters())

    def test_parameters_of_a_silent_loss(self):
        loss_of = Scaled(weight=0.0)
        with Distiller(nn.Linear(4, V), None, [CrossEntropy(), loss_of]) as d:
            loss, terms = d((torch.randn(N, 4), torch.zeros(N, dtype=torch.int64)))
            loss.backward()
        assert terms["scaled"] == INF
        assert loss_of.scale.grad == 0


class Constant(nn.Module):
    """A teacher that always says the same."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits


class Scaled(Loss):
    """Infinite, with a parameter of its own."""

    default_name = "scaled"

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, step):
        return (self.scale * step.student_logits().square().mean()) / 0.0
