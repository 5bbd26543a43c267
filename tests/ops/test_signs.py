"""What cannot be below 0 is not, in fp32: cross-entropy, z^2 and every divergence, where they all but vanish.

Sampled targets and tail="zero" are left out: of them a term may be negative by its definition.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formulas import CASES, eager
from machine import INTERPRETING

from kdfast import Divergence, LMHead, SparseTargets, distill_loss, soft_targets

WIDTHS = (2, 21, 1100) if INTERPRETING else (2, 21, 1100, 9001)
DIVERGENCES = {
    **{name: case.argument for name, case in CASES.items()},
    "alpha_div-0.01": Divergence("alpha_div", a=0.01),
    "alpha_div-0.99": Divergence("alpha_div", a=0.99),
}


def confident(n, v):
    """Logits of which one stands far above the others, and its column."""
    z, y = 2 * torch.randn(n, v), torch.randint(v, (n,))
    rows = torch.arange(n)
    z[rows, y] = z.amax(-1) + 60 * torch.rand(n)
    return z, y


@pytest.mark.parametrize("v", WIDTHS)
def test_cross_entropy_of_a_confident_token(backend, v):
    z, y = confident(40, v)
    z[0, 0], z[0, 1:], y[0] = 30.0, 0.0, 0
    truth = F.cross_entropy(z.double(), y, reduction="none")
    eager_error = (F.cross_entropy(z, y, reduction="none").double() - truth).abs()
    for tau in (1.0, 2.0, 3.0):
        for teacher in (None, z.roll(1, 0)):
            for head in (False, True):
                student = LMHead(z, torch.eye(v)) if head and v < 100 else z
                alpha = None if teacher is None else torch.zeros(40)
                options = {"temperature": tau, "alpha": alpha, "reduction": "none", "backend": backend}
                got = distill_loss(student, teacher, y, **options)
                assert (got >= 0).all()
                error = (got.double() - truth).abs()
                assert (error <= eager_error + 1e-6 + 1e-6 * truth).all()


def test_cross_entropy_below_the_rounding_of_1(backend):
    """Nothing of a sum that is 1 to fp32 is made up."""
    z = torch.tensor([[30.0, 0.0], [0.1, -40.0], [17.3, 17.3 - 16.5]])
    got = distill_loss(z, labels=torch.tensor([0, 0, 0]), reduction="none", backend=backend)
    truth = F.cross_entropy(z.double(), torch.tensor([0, 0, 0]), reduction="none")
    assert (got >= 0).all()
    assert ((got.double() - truth).abs() <= 6e-8).all()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothed_cross_entropy(backend, smoothing):
    z, y = confident(20, 21)
    z[:10] *= 1e-4  # all but even: the mean's own minimum
    got = distill_loss(z, labels=y, label_smoothing=smoothing, reduction="none", backend=backend)
    truth = F.cross_entropy(z.double(), y, label_smoothing=smoothing, reduction="none")
    assert (got >= 0).all()
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=4e-7)


def test_vocabulary_beyond_the_teachers(backend):
    z, y = confident(20, 70)
    t = torch.randn(20, 40)
    options = {"temperature": 3.0, "vocab": "truncate", "alpha": torch.zeros(20), "reduction": "none"}
    got = distill_loss(z, t, y, backend=backend, **options)
    assert (got >= 0).all()
    torch.testing.assert_close(got.double(), F.cross_entropy(z.double(), y, reduction="none"), rtol=1e-6, atol=1e-6)


def test_z_loss(backend):
    z = torch.randn(20, 30)
    z = z - torch.logsumexp(z, -1, keepdim=True)
    y = torch.randint(30, (20,))
    with_z, without = (
        distill_loss(z, z, y, z_loss=z_loss, alpha=torch.ones(20), reduction="none", backend=backend)
        for z_loss in (1.0, 0.0)
    )
    assert (with_z >= 0).all()
    assert (without >= 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("v", WIDTHS[1:3])
def test_divergence_of_nearly_equal_distributions(backend, name, v):
    for spread in (1.0, 6.0):
        s = spread * torch.randn(6, v)
        for distance in (0.0, 1e-7, 1e-5, 1e-3, 0.05, 0.3):
            t = s + distance * torch.randn(6, v)
            tau = [1.0, 2.0, 0.5][torch.randint(3, ()).item()]
            options = {"divergence": DIVERGENCES[name], "temperature": tau, "reduction": "none"}
            got = distill_loss(s, t, backend=backend, **options)
            assert (got >= 0).all()
            truth = distill_loss(s.double(), t.double(), backend="reference", **options)
            if name in CASES:
                terms = CASES[name].terms
                theirs = eager(s, t, terms=terms, temperature=tau)
                error = (theirs - truth).abs().nan_to_num(0.0)  # the usual lines may be NaN where a probability is 0
                assert ((got - truth).abs() <= error + 2e-6 * tau**2).all()


@pytest.mark.parametrize(
    ("tail", "name"), [("bucket", "forward_kl"), ("bucket", "jsd"), ("bucket", "reverse_kl"), ("renorm", "jsd")]
)
def test_sparse_targets_of_a_nearly_equal_student(backend, tail, name):
    for distance in (0.0, 1e-6, 1e-4, 1e-2):
        t = 3 * torch.randn(6, 30)
        targets = soft_targets(t, k=8)
        s = t + distance * torch.randn(6, 30)
        got = distill_loss(s, targets, divergence=name, tail=tail, reduction="none", backend=backend)
        assert (got >= 0).all()


# --- Entries that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
def test_ids_of_minus_1_between_others(backend, tail):
    t, n, v, k = 2 * torch.randn(4, 30), 4, 30, 7
    targets = soft_targets(t, k=k)
    hole = torch.tensor([[0, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0], [0] * 7, [0, 0, 1, 1, 1, 0, 0]]).bool()
    ids = torch.where(hole, -1, targets.ids)
    logprobs = torch.where(hole, torch.tensor(3.0), targets.logprobs)  # what stands there is not read
    order = hole.int().argsort(dim=-1, stable=True)
    packed = SparseTargets(
        ids.gather(-1, order), logprobs.gather(-1, order), vocab_size=v, k_eff=(~hole).sum(-1, dtype=torch.int32)
    )
    y = torch.randint(v, (n,))
    for reduction in ("mean", "none"):
        got, want = [], []
        for holes, out, by in ((True, got, backend), (False, want, "reference")):
            s = (t + 1).roll(1, -1).requires_grad_()
            target = SparseTargets(ids, logprobs, vocab_size=v) if holes else packed
            loss = distill_loss(s, target, y, tail=tail, reduction=reduction, backend=by)
            out += [loss.detach(), torch.autograd.grad(loss.sum(), s)[0]]
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(SparseTargets(ids, logprobs, vocab_size=v).dense(), packed.dense())
