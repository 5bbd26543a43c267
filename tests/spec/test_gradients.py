"""Gradients of the specification against central differences in fp64, for everything that can require grad."""

from __future__ import annotations

import pytest
import torch
from formulas import CASES
from torch.autograd import gradcheck

from kdfast import LMHead, distill_loss

N, V = 3, 4


def draw(*shape, scale=1.5):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def check(function, *leaves):
    """Gradcheck of a loss, scalar and, along random directions, per token."""
    assert gradcheck(lambda *x: function(*x, reduction="mean"), leaves)
    assert gradcheck(lambda *x: function(*x, reduction="none"), leaves, fast_mode=True)


def loss(*args, **options):
    return distill_loss(*args, backend="reference", **options)


@pytest.mark.parametrize("name", CASES)
def test_student_teacher_and_temperature(name):
    tau = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    check(
        lambda s, t, x, **o: loss(s, t, divergence=CASES[name].argument, temperature=x, teacher_grad=True, **o),
        draw(N, V),
        draw(N, V),
        tau,
    )


@pytest.mark.parametrize("scale_t2", [True, False])
def test_temperature_without_its_square(scale_t2):
    teacher, tau = draw(N, V).detach(), torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    check(lambda s, x, **o: loss(s, teacher, temperature=x, scale_t2=scale_t2, **o), draw(N, V), tau)


@pytest.mark.parametrize("per_token", [False, True])
def test_alpha_z_loss_and_weights(per_token):
    teacher, labels = draw(N, V).detach(), torch.tensor([1, -100, 3])
    alpha = torch.rand(N if per_token else (), dtype=torch.float64).clamp(0.1, 0.9).requires_grad_()
    z_loss = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weights = (0.5 + torch.rand(N, dtype=torch.float64)).requires_grad_()
    check(
        lambda s, a, z, w, **o: loss(s, teacher, labels, alpha=a, z_loss=z, weights=w, label_smoothing=0.1, **o),
        draw(N, V),
        alpha,
        z_loss,
        weights,
    )


def test_num_items():
    teacher, items = draw(N, V).detach(), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s, n: loss(s, teacher, num_items=n), (draw(N, V), items))


@pytest.mark.parametrize("ensemble", ["prob", "logit"])
@pytest.mark.parametrize("shape", [(2,), (2, N)], ids=["per teacher", "per token"])
def test_ensembles(ensemble, shape):
    weights = (0.5 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    check(
        lambda s, a, b, w, **o: loss(
            s, [a, b], teacher_weights=w, ensemble=ensemble, teacher_grad=True, temperature=1.3, **o
        ),
        draw(N, V),
        draw(N, V),
        draw(N, V),
        weights,
    )


@pytest.mark.parametrize("columns", [3, 8])
def test_truncated_vocabulary(columns):
    labels = torch.tensor([0, 2, 1])
    check(
        lambda s, t, **o: loss(s, t, labels, vocab="truncate", teacher_grad=True, z_loss=0.1, **o),
        draw(N, V),
        draw(N, columns),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_lm_head(softcap):
    teacher, labels = draw(N, V).detach(), torch.tensor([0, 2, 1])
    check(
        lambda h, w, b, **o: loss(LMHead(h, w, b, softcap=softcap, scale=0.7), teacher, labels, **o),
        draw(N, 4),
        draw(V, 4),
        draw(V),
    )


@pytest.mark.parametrize("name", CASES)
def test_masked_columns(name):
    """Columns of -inf in both, whose gradient is 0 and must not disturb the others."""
    case = CASES[name]

    def masked(s, t, **options):
        s, t = (torch.nn.functional.pad(x, (0, 2), value=-torch.inf) for x in (s, t))
        return loss(s, t, divergence=case.argument, teacher_grad=True, temperature=2.0, **options)

    check(masked, draw(N, V), draw(N, V))


@pytest.mark.parametrize("name", CASES)
def test_second_derivative(name):
    teacher = draw(2, 3).detach()
    assert torch.autograd.gradgradcheck(
        lambda s: loss(s, teacher, divergence=CASES[name].argument, temperature=2.0),
        (draw(2, 3),),
        fast_mode=True,
    )
