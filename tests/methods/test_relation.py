"""The relation losses: formulas, gradients, invariances, and the edges where a distance or a norm is 0."""

import doctest
import importlib
import math
from functools import partial
from itertools import pairwise

import pytest
import relation_formulas as formulas
import torch
from torch import nn

from kdfast import Distiller
from kdfast.methods.relation import CC, PKT, RKD, SP, rkd
from kdfast.methods.step import Outputs, Step

LOSSES = {
    "rkd": (RKD, formulas.rkd),
    "rkd-distance": (partial(RKD, angle=0.0), formulas.rkd_distance),
    "rkd-angle": (partial(RKD, distance=0.0, angle=1.0), formulas.rkd_angle),
    "sp": (SP, formulas.sp),
    "pkt": (PKT, formulas.pkt),
    "cc": (CC, formulas.cc),
    "cc-5": (partial(CC, gamma=0.9, order=5), partial(formulas.cc, gamma=0.9, order=5)),
}
EACH = pytest.mark.parametrize("name", LOSSES)


def value(name, student, teacher):
    found = LOSSES[name][0]()(Step(Outputs(student), (Outputs(teacher),)))
    return found[0] if isinstance(found, tuple) else found


def pair(n=6, wide=5, narrow=3, dtype=torch.float64):
    return torch.randn(n, narrow, dtype=dtype, requires_grad=True), torch.randn(n, wide, dtype=dtype)


def rotation(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


@EACH
def test_formula(name):
    student, teacher = pair(n=int(torch.randint(2, 9, ())))
    found = value(name, student, teacher)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(
        LOSSES[name][1](student.detach().numpy(), teacher.numpy()), rel=1e-9, abs=1e-13
    )


@EACH
def test_gradient(name):
    student, teacher = pair()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: value(name, s, teacher.detach()), student)
    value(name, student, teacher).backward()
    assert teacher.grad is None


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_fp32(name, dtype):
    student, teacher = (torch.randn(12, 7).to(dtype).requires_grad_(), torch.randn(12, 9).to(dtype))
    found = value(name, student, teacher)
    found.backward()
    exact = student.detach().double().requires_grad_()
    truth = value(name, exact, teacher.double())
    truth.backward()
    assert found.dtype == torch.float32
    assert student.grad.dtype == dtype
    torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=1e-7)
    slack = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (student.grad.double() - exact.grad).norm() <= slack * exact.grad.norm()


@EACH
def test_autocast_does_not_cast_down(name):
    student, teacher = pair(n=12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value(name, student, teacher)
    assert cast.item() == value(name, student, teacher).item()


@EACH
def test_zero_at_equality(name):
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    found = value(name, x, x.detach())
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-14)
    assert x.grad.abs().max() < (1e-6 if name == "pkt" else 1e-12)  # its 1e-7 under the logarithm


SPACES = {
    "rotated": lambda x: x @ rotation(x.shape[1]),
    "scaled": lambda x: x * 37.0,
    "moved": lambda x: x + torch.randn(x.shape[1], dtype=x.dtype),
    "row by row": lambda x: x * (torch.rand(len(x), 1, dtype=x.dtype) + 0.1),
}


@pytest.mark.parametrize("change", SPACES)
@EACH
def test_invariances(name, change):
    kept = {"rkd": {"rotated", "scaled", "moved"}, "sp": {"rotated", "scaled"}}
    invariant = change in kept.get(name.partition("-")[0], {"rotated", "scaled", "row by row"})
    student, teacher = pair()
    student = student.detach()
    before = value(name, student, teacher).item()
    for after in (value(name, SPACES[change](student), teacher), value(name, student, SPACES[change](teacher))):
        assert math.isclose(before, after.item(), rel_tol=1e-9, abs_tol=1e-14) == invariant


@EACH
def test_order_of_the_batch_does_not_matter(name):
    student, teacher = pair(n=9)
    order = torch.randperm(9)
    assert value(name, student[order], teacher[order]).item() == pytest.approx(value(name, student, teacher).item())


@EACH
def test_a_batch_is_not_the_mean_of_its_halves(name):
    student, teacher = pair(n=8)
    halves = [value(name, s, t).item() for s, t in zip(student.split(4), teacher.split(4), strict=True)]
    assert value(name, student, teacher).item() != pytest.approx(sum(halves) / 2, rel=1e-6)


@EACH
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_are_no_relation(name, n):
    student, teacher = pair(n=n)
    found = value(name, student, teacher)
    found.backward()
    assert found == 0
    assert (student.grad == 0).all()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_and_zero_samples(name, dtype):
    student, teacher = (torch.randn(6, 4, dtype=dtype), torch.randn(6, 5, dtype=dtype))
    student[1] = student[4] = student[0]
    student[3] = 0
    teacher[2] = teacher[5]
    student.requires_grad_()
    found = value(name, student, teacher)
    found.backward()
    truth = LOSSES[name][1](student.detach().double().numpy(), teacher.double().numpy())
    assert found.item() == pytest.approx(truth, rel=1e-4 if dtype is torch.float32 else 1e-9)
    assert student.grad.isfinite().all()


@EACH
@pytest.mark.parametrize("same", [torch.zeros, torch.ones])
def test_one_point_for_all(name, same):
    x = same(5, 4, requires_grad=True)
    for teacher in (torch.randn(5, 3), same(5, 4)):
        found = value(name, x, teacher)
        found.backward()
        assert found.isfinite()
    assert found.item() == pytest.approx(0, abs=1e-12)
    assert x.grad.isfinite().all()


@EACH
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_magnitude_is_no_matter(name, scale):
    student, teacher = pair(dtype=torch.float32)
    found = value(name, student, teacher)
    (there,) = torch.autograd.grad(found, student)
    moved = (student.detach() * scale).requires_grad_()
    scaled = value(name, moved, teacher * scale)
    scaled.backward()
    torch.testing.assert_close(scaled, found, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved.grad * scale, there, rtol=1e-3, atol=1e-5)


@EACH
def test_nan_shows(name):
    student, teacher = pair()
    teacher[2, 1] = math.nan
    assert value(name, student, teacher).isnan()


def test_near_samples_far_from_the_origin_keep_their_digits():
    x = torch.randn(8, 16)
    x[1::2] = x[::2] + 1e-3 * torch.randn(4, 16)
    student, teacher = x + 100.0, torch.randn(8, 16)
    truth = formulas.rkd(student.double().numpy(), teacher.double().numpy())
    assert value("rkd", student, teacher).item() == pytest.approx(truth, rel=1e-6)


def test_angles_do_not_depend_on_the_chunk(monkeypatch):
    student, teacher = pair(n=7)
    found = []
    for chunk in (1, 3 * 49, 1 << 20):
        monkeypatch.setattr(rkd, "CHUNK", chunk)
        loss = value("rkd-angle", student, teacher)
        found.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_taylor_series_tends_to_the_gaussian_kernel():
    student, teacher = pair()
    unit_s, unit_t = (nn.functional.normalize(x) for x in (student, teacher))
    gauss = (
        torch.exp(-0.7 * torch.cdist(unit_s, unit_s) ** 2) - torch.exp(-0.7 * torch.cdist(unit_t, unit_t) ** 2)
    ) ** 2
    found = CC(gamma=0.7, order=30).compare(student, teacher)
    assert found.item() == pytest.approx(gauss.mean().item(), rel=1e-9)


def test_differences_is_the_mean_of_neighbours():
    student, teacher = pair(n=5)
    step = Step(Outputs(student), (Outputs(teacher),))
    loss = CC(mode="differences", dim=4)
    with pytest.raises(RuntimeError, match="prepare"):
        loss(step)
    loss.prepare(step)
    s, t = loss.student_head(student).tolist(), loss.teacher_head(teacher).tolist()
    d = [[abs(a - b) for a, b in zip(p, q, strict=True)] for p, q in zip(s, t, strict=True)]
    truth = sum(x * y for p, q in pairwise(d) for x, y in zip(p, q, strict=True)) / 4
    assert loss(step).item() == pytest.approx(truth)
    assert torch.autograd.gradcheck(lambda s: loss.compare(s, teacher), student)


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.fc = nn.Linear(width * 36, 10)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


@pytest.mark.parametrize("make", [RKD, SP, PKT, CC, partial(CC, mode="differences")])
@pytest.mark.parametrize("layers", [("conv", "conv"), ("fc:input", "fc:input"), (None, None)])
def test_in_a_distiller(make, layers):
    student, teacher = Model(2), Model(3)
    x, labels = torch.randn(5, 1, 8, 8), torch.tensor([1, 2, -100, 4, 5])
    with Distiller(student, teacher, [make(*layers, weight=2.0)]) as d:
        d.prepare((x, labels))
        loss, terms = d((x, labels))
        loss.backward()
        dropped = d((x, None))[0]
    (name,) = d.losses
    assert loss == 2 * terms[name] == dropped  # whatever the labels say
    assert all(p.grad is None for p in teacher.parameters())
    assert student.conv.weight.grad.abs().sum() > 0
    if name == "rkd":
        torch.testing.assert_close(terms["rkd"], terms["rkd.distance"] + 2 * terms["rkd.angle"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SP(student="fc"), r"SP: teacher is None, the other is 'fc'"),
        (lambda: PKT(teacher="fc"), r"PKT: student is None"),
        (lambda: RKD(distance=-1.0), "distance and angle"),
        (lambda: RKD(distance=0.0, angle=0.0), "not both 0"),
        (lambda: RKD(angle=math.nan), "distance and angle"),
        (lambda: CC(mode="rbf"), "'rbf'"),
        (lambda: CC(gamma=0.0), "gamma must be positive"),
        (lambda: CC(order=0), "order must be at least 1"),
        (lambda: CC(mode="differences", dim=0), "dim must be at least 1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_that_differ():
    with pytest.raises(ValueError, match=r"student \(3, 4\) and teacher \(2, 4\)"):
        value("sp", torch.randn(3, 4), torch.randn(2, 4))


@pytest.mark.parametrize("name", ["cc", "pkt", "rkd", "sp"])
def test_docstring_examples(name):
    module = importlib.import_module(f"kdfast.methods.relation.{name}")
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
