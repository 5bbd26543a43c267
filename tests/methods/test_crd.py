"""CRD: its two sides against equations 17 and 18, its memory, what a checkpoint carries."""

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from relation_formulas import crd_side
from torch import nn

from kdfast import Distiller
from kdfast.methods.relation import CRD, contrast
from kdfast.methods.step import Outputs, Step

N, K, D = 40, 24, 8


def step(n=5, wide=6, narrow=4, dtype=torch.float64, index=None):
    student = torch.randn(n, narrow, dtype=dtype, requires_grad=True)
    index = torch.randperm(N)[:n] if index is None else index
    return Step(Outputs(student), (Outputs(torch.randn(n, wide, dtype=dtype)),), index=index)


def made(batch, dtype=torch.float64, **options):
    loss = CRD(samples=N, **{"negatives": K, "dim": D, **options}).to(dtype)
    loss.prepare(batch)
    return loss


def embedded(head, x):
    y = x.detach().numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    return y / np.linalg.norm(y, axis=1, keepdims=True)


@pytest.fixture(params=["whole", "gathered"])
def way(request, monkeypatch):
    """Scores by a product with the whole memory, and by rows of it, a few samples at a time."""
    monkeypatch.setattr(contrast, "DENSE", 8 if request.param == "whole" else 0)
    monkeypatch.setattr(contrast, "GATHERED", 2 * K * D)


@pytest.mark.usefixtures("way")
def test_formula_memory_and_normalizers():
    loss = made(step(), temperature=0.3, momentum=0.7)
    z = (None, None)
    for _ in range(3):
        batch = step()
        memories = [loss.memory_student.numpy().copy(), loss.memory_teacher.numpy().copy()]
        positions = loss._draw(batch.index).numpy()
        assert (positions[:, 0] == batch.index.numpy()).all()
        assert positions.shape == (5, 1 + K)
        found, parts = loss(batch)
        s = embedded(loss.student_head, batch.student.logits)
        t = embedded(loss.teacher_head, batch.teacher.logits)
        of_s, z_s = crd_side(s, memories[1], positions, 0.3, z[0])
        of_t, z_t = crd_side(t, memories[0], positions, 0.3, z[1])
        z = (z_s, z_t)  # of the first batch, and kept
        assert parts["student"].item() == pytest.approx(of_s, rel=1e-10)
        assert parts["teacher"].item() == pytest.approx(of_t, rel=1e-10)
        assert found.item() == pytest.approx(of_s + of_t, rel=1e-10)
        np.testing.assert_allclose(loss.log_normalizers.exp(), z, rtol=1e-10)
        for memory, before, new in zip((loss.memory_student, loss.memory_teacher), memories, (s, t), strict=True):
            for row, position in zip(new, batch.index, strict=True):
                moved = 0.7 * before[position] + 0.3 * row
                before[position] = moved / np.linalg.norm(moved)
            np.testing.assert_allclose(memory, before, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("way")
def test_gradient_of_features_and_heads():
    batch = step(n=4)
    loss = made(batch, temperature=0.5)
    loss(batch)
    loss.log_normalizers.copy_(torch.tensor([3.0, 4.0]))
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    weights = [p.detach().clone().requires_grad_() for p in loss.parameters()]
    names = [name for name, _ in loss.named_parameters()]

    def function(student, *weights):
        loss.load_state_dict(state)  # the call before has moved the memory
        given = dict(zip(names, weights, strict=True))
        moved = Step(Outputs(student), batch.teachers, index=batch.index)
        return torch.func.functional_call(loss, given, (moved,))[0]

    assert torch.autograd.gradcheck(function, (batch.student.logits, *weights), fast_mode=True)


def test_upstream_gradient_and_detached_teacher():
    batch = step()
    batch.teacher.logits.requires_grad_()
    loss = made(batch)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    (once,) = torch.autograd.grad(loss(batch)[0], batch.student.logits)
    loss.load_state_dict(state)
    (loss(batch)[0] * 65536.0).backward()
    torch.testing.assert_close(batch.student.logits.grad, once * 65536.0)
    assert batch.teacher.logits.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_and_autocast(dtype):
    batch = step(dtype=dtype)
    student, teacher = batch.student.logits.detach().float(), batch.teacher.logits.float()
    wide = Step(Outputs(student), (Outputs(teacher),), index=batch.index)
    truth = made(wide, torch.float32)(wide)[0]
    loss = made(batch, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(batch)[0]
    found.backward()
    assert found.dtype == torch.float32
    assert found == truth
    assert batch.student.logits.grad.dtype == dtype
    assert loss.memory_student.dtype == torch.float32


def test_draws_are_uniform_and_follow_the_seed():
    batch = step()
    loss, same, other = made(batch, negatives=N), made(batch, negatives=N), made(batch, negatives=N, seed=1)
    assert torch.equal(loss._draw(batch.index), same._draw(batch.index))
    assert not torch.equal(loss._draw(batch.index), other._draw(batch.index))
    assert not torch.equal(loss.memory_student, other.memory_student)
    assert not torch.equal(loss.student_head.weight, other.student_head.weight)
    index = torch.zeros(500, dtype=torch.int64)
    first = loss._draw(index)[:, 1:]
    counts = torch.bincount(first.flatten(), minlength=N).double()
    assert ((counts - 500).square() / 500).sum() < 130  # chi-squared of 39 degrees, its seed fixed
    loss(batch)
    assert not torch.equal(loss._draw(index)[:, 1:], first)


def test_negatives_of_other_classes():
    """Each sample of another class as often as the next, none of the same; the formula is that of any negatives."""
    labels = torch.tensor([5, 5, 5, -1, -1, 9] * 6 + [5, 9, 9, 9])
    loss = made(step(), labels=labels, negatives=N)
    counts = torch.zeros(N)
    index = torch.arange(8)
    for draw in range(400):
        loss.draws = draw
        positions = loss._draw(index)
        assert (positions[:, 0] == index).all()
        assert (labels[positions[:, 1:]] != labels[index, None]).all()
        counts += torch.bincount(positions[0, 1:], minlength=N)
    others = labels != labels[0]
    assert counts[~others].sum() == 0
    expected = 400 * N / int(others.sum())
    assert scipy.stats.chisquare(counts[others], [expected] * int(others.sum())).pvalue > 1e-6
    batch = step(index=index[:5])
    torch.testing.assert_close(loss._draw(batch.index), loss._draw(batch.index))
    positions = loss._draw(batch.index).numpy()
    memory = loss.memory_teacher.numpy().copy()
    found = loss(batch)[1]["student"]
    value, _ = crd_side(embedded(loss.student_head, batch.student.logits), memory, positions, 0.07, None)
    assert found.item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(N), TypeError, "labels must be int64"),
        (torch.zeros(N - 1, dtype=torch.int64), ValueError, r"labels must be \(40,\)"),
        (torch.zeros(N, dtype=torch.int64), ValueError, "two classes or more"),
    ],
)
def test_wrong_labels(labels, error, message):
    with pytest.raises(error, match=message):
        made(step(), labels=labels)


def test_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    batch = step()
    after = torch.get_rng_state()
    made(batch)(batch)
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(state, after)


def test_without_gradient_nothing_is_kept():
    batch = step()
    loss = made(batch)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with torch.no_grad():
        validated = loss(batch)[0]
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert loss(batch)[0] == validated
    assert not torch.equal(loss.memory_student, before["memory_student"])


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(n):
    batch = step(n=n)
    loss = made(batch)
    found = loss(batch)
    found = found[0] if n else found
    found.backward()
    assert found.isfinite()
    assert batch.student.logits.grad.isfinite().all()
    assert (found == 0) == (n == 0)


def test_sharp_temperature_stays_finite():
    batch = step(dtype=torch.float32)
    loss = made(batch, torch.float32, temperature=1e-3)
    for _ in range(3):
        found = loss(batch)[0]
        assert found.isfinite()


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Linear(12, width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        return self.fc(self.body(x).relu())


def run(steps, data, teacher, batches, checkpoint=None):
    """Trains for some steps and returns the checkpoint's bytes and the losses."""
    torch.manual_seed(7)
    student = Net(5)
    x, labels = data
    losses = []
    with Distiller(student, teacher, [CRD("fc:input", "fc:input", samples=N, negatives=K, dim=D)]) as d:
        d.prepare((x[:4], labels[:4], torch.arange(4)))
        optimizer = torch.optim.SGD([*student.parameters(), *d.parameters()], 0.05, momentum=0.9)
        if checkpoint is not None:
            saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
            for part, state in zip((student, d, optimizer), saved, strict=True):
                part.load_state_dict(state)
        for index in batches[d.number : d.number + steps]:
            loss, _ = d((x[index], labels[index], index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        kept = io.BytesIO()
        torch.save([student.state_dict(), d.state_dict(), optimizer.state_dict()], kept)
    return kept.getvalue(), losses


def test_a_checkpoint_resumes_bit_for_bit():
    data = torch.randn(N, 12), torch.randint(0, 3, (N,))
    teacher = Net(9)
    batches = [index for _ in range(3) for index in torch.randperm(N).split(8)]
    whole, losses = run(12, data, teacher, batches)
    part, first = run(5, data, teacher, batches)
    resumed, rest = run(7, data, teacher, batches, part)
    assert first + rest == losses
    one, two = (torch.load(io.BytesIO(kept), weights_only=True) for kept in (whole, resumed))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    assert {"crd.memory_student", "crd.memory_teacher", "crd.log_normalizers"} <= one[1]["losses"].keys()
    assert run(12, data, teacher, batches)[0] == whole  # the same from the seed


def test_it_learns_to_tell_pairs():
    torch.manual_seed(3)
    x = torch.randn(N, 12)
    teacher, student = Net(9), Net(5)
    with Distiller(student, teacher, [CRD("fc:input", "fc:input", samples=N, negatives=K, dim=D)]) as d:
        d.prepare((x, None, torch.arange(N)))
        optimizer = torch.optim.Adam([*student.parameters(), *d.parameters()], 0.01)
        losses = []
        for _ in range(60):
            loss, terms = d((x, None, torch.arange(N)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert terms.keys() == {"crd", "crd.student", "crd.teacher", "loss"}
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "negatives must be from 1 to the 40 samples of the data set, got 16384"),
        ({"negatives": 0}, "got 0"),
        ({"negatives": 4, "temperature": 0.0}, "temperature must be positive"),
        ({"negatives": 4, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"negatives": 4, "dim": 0}, "dim must be at least 1"),
        ({"negatives": 4, "student": "fc"}, "teacher is None"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CRD(samples=N, **options)


def test_wrong_index():
    batch = step()
    loss = made(batch)
    for index, error, message in (
        (None, ValueError, r"d\.loss\(\.\.\., index=index\)"),
        (torch.arange(4), ValueError, r"must be \(5,\).*got \(4,\)"),
        (torch.arange(5.0), TypeError, "must be int64, got torch.float32"),
        (torch.arange(5) + N - 2, ValueError, rf"in \[0, {N}\), got 38 to 42"),
        (torch.arange(5) - 1, ValueError, "got -1 to 3"),
    ):
        with pytest.raises(error, match=message):
            loss(Step(batch.student, batch.teachers, index=index))
    assert loss.draws == 0


def test_before_prepare():
    with pytest.raises(RuntimeError, match="prepare"):
        CRD(samples=N, negatives=K)(step())


def test_first_memory_is_bounded_as_in_the_paper():
    memory = CRD(samples=4096, negatives=K, dim=12).memory_teacher
    assert memory.abs().max() <= 0.5
    assert memory.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.02)


def test_the_page_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "methods-relation.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, scope := {"path": tmp_path / "checkpoint.pt"})
    assert scope["d"].number == scope["d"].losses["crd"].draws == 8
