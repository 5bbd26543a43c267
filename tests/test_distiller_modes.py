"""What a Distiller does to its models: modes and gradients of teachers, hooks, and that all is as before."""

from __future__ import annotations

import pytest
import torch
from machine import ONCE
from small_models import F_IN, B, C, H, batch, mlp, pair
from torch import nn

import kdfast
from kdfast.methods import KD

pytestmark = ONCE


class Both(nn.Module):
    """What holds a student and a teacher, as a LightningModule does."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher


def noisy(width):
    return nn.Sequential(nn.Linear(F_IN, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, C))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_is_in_eval_mode_whatever_an_outer_train_did(compiled):
    student, teacher = mlp(), noisy(2 * H)
    both, (x, y) = Both(student, teacher), batch()
    if compiled:
        torch._dynamo.reset()
        teacher.compile(backend="eager")
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    with kdfast.Distiller(student, teacher, [KD()]) as d:
        want = d((x, y))[0].detach()
        for _ in range(2):  # epochs
            both.train()
            assert torch.equal(d((x, y))[0], want)
            both.train()
            if not compiled:
                with torch.no_grad():
                    assert torch.equal(d.loss(student(x), teacher(x), y)[0], want)
        both.train()
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert all(m.training for m in both.modules())


def test_what_student_and_teacher_share_is_quiet_for_the_teacher_alone():
    body = nn.Sequential(nn.Linear(F_IN, H), nn.BatchNorm1d(H), nn.Dropout(0.5))
    student, teacher = nn.Sequential(body, nn.Linear(H, C)), nn.Sequential(body, nn.Dropout(0.5), nn.Linear(H, C))
    second = nn.Sequential(body, nn.Linear(H, C))
    seen = []
    body.register_forward_hook(lambda m, args, out: seen.append(m[2].training))
    (x, y) = batch()
    with kdfast.Distiller(student, [teacher, second], [KD()]) as d:
        before = body[1].num_batches_tracked.item()
        d((x, y))
        assert seen == [False, False, True]
        assert body[1].num_batches_tracked.item() == before + 1
        body[2].eval()  # the caller's own wish
        d((x, y))
        assert seen == [False, False, True, False, False, False]
        assert not body[2].training
        body[2].train()
        assert not any(m.training for m in (teacher, teacher[1], second))
    assert all(m.training for one in (student, teacher, second) for m in one.modules())


def test_a_teacher_that_the_caller_runs_has_no_gradient():
    student, teacher = pair()
    (x, y) = batch()
    made = torch.randn(B, F_IN, requires_grad=True)
    with kdfast.Distiller(student, teacher, [KD()]) as d:
        t = teacher(x)
        assert t.grad_fn is None
        assert torch.is_grad_enabled()
        loss, _ = d.loss(student(x), t, y)
        want, _ = d((x, y))
        assert torch.equal(loss, want)
        assert teacher(made).requires_grad  # which a generator has made, and learns by
        assert teacher(input=made).requires_grad
        with pytest.raises(RuntimeError, match="shapes cannot be"):
            teacher(x[:, 1:])
        assert torch.is_grad_enabled()
        with torch.no_grad():
            teacher(x)
            assert not torch.is_grad_enabled()
    assert teacher(x).requires_grad


def test_a_teacher_that_is_trained_too_has_gradients():
    """Mutual learning, by two Distillers; and a student that holds its teacher."""
    one, other = mlp(), mlp(2 * H)
    with kdfast.Distiller(one, other, [KD()]) as d, kdfast.Distiller(other, one, [KD()]) as e:
        for call, student in ((d, one), (e, other)):
            call(batch())[0].backward()
            assert all(p.grad is not None for p in student.parameters())
    teacher = nn.Linear(F_IN, C)
    student = nn.Sequential(teacher, nn.Linear(C, C))
    with kdfast.Distiller(student, teacher, [KD()]) as d:
        d(batch())[0].backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_teacher_that_knows_fewer_tokens_is_named():
    student, teacher = (nn.Sequential(nn.Embedding(n, 4), nn.Linear(4, C)) for n in (9, 7))
    with (
        kdfast.Distiller(student, teacher, [KD()]) as d,
        pytest.raises(IndexError, match=r"Sequential, the teacher: .* it must know every token that the student does"),
    ):
        d((torch.tensor([0, 8]), torch.tensor([0, 1])))


@pytest.mark.parametrize("first", [0, 1])
def test_two_distillers_of_one_teacher(first):
    """Whichever is left first, the teacher stays in eval mode until both are."""
    teacher = mlp(8)
    teacher.train()
    both = [kdfast.Distiller(mlp(4), teacher, [KD()]) for _ in range(2)]
    for d in both:
        d.__enter__()
    both[first].__exit__(None, None, None)
    assert not any(module.training for module in teacher.modules())
    both[1 - first].__exit__(None, None, None)
    assert all(module.training for module in teacher.modules())


def test_a_teacher_that_fails_leaves_modes_as_they_were():
    body = nn.Sequential(nn.Linear(F_IN, H), nn.Dropout(0.5))
    student, teacher = nn.Sequential(body, nn.Linear(H, C)), nn.Sequential(body, nn.Linear(H + 1, C))
    with kdfast.Distiller(student, teacher, [KD()]) as d, pytest.raises(RuntimeError, match="shapes cannot be"):
        d(batch())
    assert all(m.training for m in student.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_teacher():
    student, teacher = mlp(), mlp(seed=1).eval()
    (x, y) = batch()
    with kdfast.Distiller(student, teacher, [KD()]) as d:
        want, _ = d((x, y))
    with kdfast.Distiller(student, torch.jit.trace(teacher, x), [KD()]) as d:
        torch.testing.assert_close(d((x, y))[0], want)


def test_another_hook_that_fails_is_heard():
    student, teacher = pair()
    with kdfast.Distiller(student, teacher, [KD()]) as d:

        def fails(module, args):
            raise ZeroDivisionError

        handle = teacher.register_forward_pre_hook(fails, prepend=True)
        with pytest.raises(ZeroDivisionError):
            d(batch())
        handle.remove()
        d(batch())
