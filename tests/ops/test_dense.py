"""The compiled dense loss against fp64 truth: every divergence, dtype, option, vocabulary and instruction set.

A kernel's error may be twice that of eager PyTorch in fp32 on the same inputs (luck evens out over the tokens of a
test), plus a slack that is written down here, in units of fp32's rounding. A gradient in bf16 or fp16 may add half its
ulp.
"""

from __future__ import annotations

import pytest
import torch
from formulas import CASES, eager, half_ulp, pairs_of, untie
from machine import INTERPRETING, KERNEL, TRITON, VARIANTS, choose

from kdfast import distill_loss

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.usefixtures("poisoned"),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = torch.finfo(torch.float32).eps
# Slack, in fp32 roundings. Of a value: of its own size, and of the terms of order 1 that it is a sum of. Of a gradient:
# of the largest of its row, and of the probabilities whose difference it is.
VALUE_SLACK, GRADIENT_SLACK = 8, 16


def results(function, student, upstream):
    """Per-token loss and the gradient under ``upstream``, in fp64."""
    leaf = student.detach().requires_grad_()
    loss = function(leaf)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach().double(), grad


def convert(options, dtype):
    is_float = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return {k: v.to(dtype) if is_float(v) else v for k, v in options.items()}


class Judge:
    """Truth and yardstick of one set of inputs, to hold the kernel against."""

    def __init__(self, case, student, teacher=None, labels=None, **options):
        if teacher is not None:
            shared = {k: v for k, v in options.items() if k in ("temperature", "teacher_weights", "ensemble")}
            student = untie(student, teacher, **shared)
        self.case, self.inputs, self.options = case, (student, teacher, labels), options
        self.upstream = torch.randn(()).sign() * (torch.rand(student.shape[:-1]) + 0.1)

        tau = options.get("temperature", 1.0)
        weight = max(1.0, sum(weight for _, weight, _ in case.terms))
        top = student.double().softmax(-1).amax(-1, keepdim=True)
        self.probability = weight * max(1.0, tau) * self.upstream.abs()[..., None] * top

        def cast(x, dtype):
            return x.to(dtype) if isinstance(x, torch.Tensor) else None if x is None else [t.to(dtype) for t in x]

        doubles, floats = ((cast(student, d), cast(teacher, d)) for d in (torch.float64, torch.float32))
        per_token = {"reduction": "none", "backend": "reference", "divergence": case.argument}
        self.truth = results(
            lambda z: distill_loss(z, doubles[1], labels, **per_token, **convert(options, torch.float64)),
            doubles[0],
            self.upstream,
        )
        self.eager = results(
            lambda z: eager(z, floats[1], labels, terms=case.terms, **convert(options, torch.float32)),
            floats[0],
            self.upstream,
        )

    def check(self, isa, reduction="none"):
        """Hold the compiled kernel's loss and gradient against the truth."""
        student, teacher, labels = self.inputs
        say = f"{isa}, {reduction}, {self.options}"
        options = {"divergence": self.case.argument, "backend": KERNEL, "reduction": reduction, **self.options}
        if reduction == "none":
            loss, grad = results(lambda z: distill_loss(z, teacher, labels, **options), student, self.upstream)
            truth, yard, upstream = self.truth[0], self.eager[0], self.upstream
        else:  # weights, which are not negative, stand in for the size of the upstream gradient, whose sign is one
            weights = self.upstream.abs() * options.pop("weights", torch.ones_like(self.upstream))
            loss, grad = results(
                lambda z: distill_loss(z, teacher, labels, weights=weights, **options),
                student,
                self.upstream.flatten()[0].sign(),
            )
            upstream = self.upstream.double().abs()
            truth, yard = ((upstream * x[0]).sum() for x in (self.truth, self.eager))
        assert not loss.isnan().any(), say
        # values: the largest error over the tokens, on the scale of the largest token and of tau^2 D's terms
        size = max(1.0, self.options.get("temperature", 1.0) ** 2)
        scale = (1.0 if reduction == "none" else upstream.abs().sum()) * (self.truth[0].abs().max() + size)
        allowed = 2 * (yard - truth).abs().max() + VALUE_SLACK * EPS * scale
        assert (loss - truth).abs().max() <= allowed, f"value: {say}"
        # gradients
        truth, yard = self.truth[1], self.eager[1].double()
        assert grad.dtype == student.dtype
        assert not grad.isnan().any(), f"gradient: {say}"
        row = torch.maximum(truth.abs().amax(-1, keepdim=True), self.probability)
        allowed = 2 * (yard - truth).abs().amax(-1, keepdim=True) + GRADIENT_SLACK * EPS * row + 1e-30
        if student.dtype != torch.float32:
            allowed = allowed + half_ulp(truth, student.dtype)
        worst = ((grad.double() - truth).abs() / allowed).max().item()
        assert worst <= 1, f"gradient: {worst} of the allowed error; {say}"


def scenes(n, v):
    """Options to run under, by name; "teacher" says whether there is one, "labels" whether there are."""
    weights = torch.rand(n)
    weights[::4] = 0
    alpha = torch.rand(n)
    alpha[::3] = 1.0
    labels = torch.randint(v, (n,))
    ignored, unlabelled = labels.clone(), labels.clone()
    ignored[1::4] = -100
    unlabelled[::3] = 10**9  # alpha is 1 there
    return {
        "soft": {},
        "soft, z-loss": {"z_loss": 1e-2},
        "hard": {"labels": ignored, "teacher": False, "label_smoothing": 0.1},
        "both": {"labels": labels, "alpha": 0.3},
        "everything": {
            "labels": ignored,
            "alpha": 0.7,
            "label_smoothing": 0.2,
            "z_loss": 1e-3,
            "weights": weights,
            "ignore_index": -100,
        },
        "partly labelled": {"labels": unlabelled, "alpha": alpha, "z_loss": 1e-3},
    }


def force(monkeypatch):
    """Runs through the instruction sets of this machine."""
    for variant in VARIANTS:
        choose(variant, monkeypatch)
        yield variant


def logits(n, v, dtype, scale=2.0):
    return (scale * torch.randn(n, v)).to(dtype)


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matrix(monkeypatch, name, student_dtype, teacher_dtype):
    n, v = (5 if INTERPRETING else 12), int(torch.randint(90, 140, ()))
    first = int(torch.randint(3, ()))
    chosen = list(scenes(n, v).values())
    if INTERPRETING:  # a second a scene
        chosen = [chosen[k] for k in torch.randperm(len(chosen))[:2].tolist()]
    for k, options in enumerate(chosen):
        s, t = logits(n, v, DTYPES[student_dtype]), logits(n, v, DTYPES[teacher_dtype])
        teacher = t if options.pop("teacher", True) else None
        judge = Judge(CASES[name], s, teacher, **options, temperature=[1.0, 2.0, 3.7][(first + k) % 3])
        for isa in force(monkeypatch):
            for reduction in ("none", "sum"):
                judge.check(isa, reduction)


SHAPES = [
    (9, 2),
    (5, 7),
    (3, 16),
    (300, 100),
    (4, 1000),
    (4, 1024),
    (4, 1025),
    (3, 8195),
    (2, 20000),
    (1, 50257),
    (2, 151643),
]
if INTERPRETING:  # which takes a second for 10,000 columns, and whose tile has 512
    SHAPES = [(n, v) for n, v in SHAPES if n * v < 30000]


@pytest.mark.parametrize(("n", "v"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_shapes(monkeypatch, name, n, v):
    dtypes = list(DTYPES.values())
    s, t = (logits(n, v, dtypes[k], scale=3.0) for k in torch.randint(3, (2,)).tolist())
    tau = [1.0, 2.0, 3.7][int(torch.randint(3, ()))]
    judge = Judge(CASES[name], s, t, torch.randint(v, (n,)), temperature=tau, z_loss=1e-4, label_smoothing=0.1)
    for isa in force(monkeypatch):
        judge.check(isa, "none")
        if isa == VARIANTS[0]:
            judge.check(isa, "sum")


@pytest.mark.parametrize("per_token", [False, True], ids=["per teacher", "per token"])
@pytest.mark.parametrize("ensemble", ["prob", "logit"])
@pytest.mark.parametrize("name", CASES)
def test_ensembles(monkeypatch, name, ensemble, per_token):
    n, v = (3, 700) if INTERPRETING else (8, 1100)
    teachers = [logits(n, v, dtype) for dtype in DTYPES.values()]
    weights = torch.rand(3, n) if per_token else torch.tensor([0.2, 1.0, 0.5])
    for dtype in DTYPES.values():
        options = {"ensemble": ensemble, "teacher_weights": weights, "temperature": 2.0}
        judge = Judge(CASES[name], logits(n, v, dtype), teachers, torch.randint(v, (n,)), **options)
        for isa in force(monkeypatch):
            judge.check(isa, "none")
            judge.check(isa, "sum")


def compare(student, teacher, labels=None, *, rtol=1e-4, atol=1e-6, leaves=(), **options):
    """The kernel's loss and gradients against the fp64 reference's; ``leaves`` names options that require grad."""
    out = []
    student = untie(student, teacher, temperature=options.get("temperature", 1.0))
    for backend, dtype in (("reference", torch.float64), (KERNEL, None)):
        cast = (lambda x: x) if dtype is None else lambda x: x.to(torch.float64)
        z, t = (cast(x.detach()).requires_grad_() for x in (student, teacher))
        given = {k: cast(v.detach()).requires_grad_() if k in leaves else v for k, v in options.items()}
        loss = distill_loss(z, t, labels, backend=backend, **given)
        wanted = [z, *([t] if options.get("teacher_grad") else []), *(given[k] for k in leaves)]
        grads = torch.autograd.grad(loss, wanted, torch.ones_like(loss))
        out.append([loss.detach(), *grads])
    for want, got in zip(*out, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("v", "vt"), [(1500, 1100), (1100, 1500), (9000, 8200), (40, 39)])
@pytest.mark.parametrize("teacher_grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_truncated_vocabulary(monkeypatch, name, teacher_grad, v, vt):
    s, t, y = logits(3, v, torch.float32), logits(3, vt, torch.float32), torch.tensor([0, v - 1, 5])
    options = {"vocab": "truncate", "teacher_grad": teacher_grad, "temperature": 2.0, "z_loss": 1e-3}
    for _ in force(monkeypatch):
        compare(s, t, y, divergence=CASES[name].argument, label_smoothing=0.1, **options)
        compare(s, t, divergence=CASES[name].argument, reduction="none", **options)


@pytest.mark.parametrize("name", CASES)
def test_gradient_to_the_teacher(monkeypatch, name):
    s, t = logits(6, 1100, torch.float32), logits(6, 1100, torch.float32)
    y, w = torch.tensor([3, -100, 5, 1099, 0, 1]), torch.tensor([1.0, 1, 0, 2, 0.5, 1])
    for _ in force(monkeypatch):
        for reduction in ("mean", "none"):
            options = {"teacher_grad": True, "temperature": 2.0, "reduction": reduction, "weights": w}
            compare(s, t, y, divergence=CASES[name].argument, alpha=0.8, **options)


@pytest.mark.parametrize("name", CASES)
def test_gradient_to_the_temperature(monkeypatch, name):
    s, t, y = logits(6, 1100, torch.float32), logits(6, 1100, torch.float32), torch.tensor([3, -100, 5, 1099, 0, 1])
    s[:, 70:95] = t[:, 70:95] = -torch.inf
    for _ in force(monkeypatch):
        ways = {1.0: {"reduction": "mean"}, 0.7: {"reduction": "none", "scale_t2": False}, 2.0: {"labels": y}}
        for value, options in ways.items():
            tau = torch.tensor(value)
            # terms of order 1 cancel in the temperature's gradient
            compare(
                s, t, divergence=CASES[name].argument, temperature=tau, leaves=["temperature"], atol=5e-6, **options
            )


@pytest.mark.parametrize("num_items", [None, 7.5, torch.tensor(7.5)], ids=["local", "number", "tensor"])
def test_mean_and_its_denominator(monkeypatch, num_items):
    s, t = logits(6, 1100, torch.float32), logits(6, 1100, torch.float32)
    y, w = torch.tensor([3, -7, 5, 1099, 0, 1]), torch.tensor([1.0, 1, 0, 2, 0.5, 1])
    for _ in force(monkeypatch):
        compare(s, t, y, weights=w, ignore_index=-7, num_items=num_items, alpha=0.8, z_loss=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reported_terms(monkeypatch, reduction):
    s, t = logits(6, 1100, torch.float32), logits(6, 1100, torch.float32)
    y, w = torch.tensor([3, -100, 5, 1099, 0, 1]), torch.tensor([1.0, 1, 0, 2, 0.5, 1])
    options = {
        "weights": w,
        "reduction": reduction,
        "temperature": 2.0,
        "alpha": 0.3,
        "z_loss": 1e-3,
        "return_terms": True,
    }
    want = distill_loss(s.double(), t.double(), y, backend="reference", **options)
    for _ in force(monkeypatch):
        for leaf in (s, s.clone().requires_grad_()):
            got = distill_loss(leaf, t, y, backend=KERNEL, **options)
            for a, b in pairs_of(got, want):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
            assert not got.soft.requires_grad
            assert not got.hard.requires_grad
        assert distill_loss(s, t, backend=KERNEL, return_terms=True).hard is None
        assert distill_loss(s, labels=y, backend=KERNEL, return_terms=True).soft is None


@pytest.mark.parametrize("ensemble", ["prob", "logit"])
def test_ensemble_of_different_vocabularies(monkeypatch, ensemble):
    s, y = logits(3, 1200, torch.float32), torch.tensor([0, 1199, -100])
    teachers = [logits(3, v, dtype) for v, dtype in zip((1100, 1300, 1250), DTYPES.values(), strict=True)]
    options = {"vocab": "truncate", "ensemble": ensemble, "reduction": "none", "teacher_weights": [1.0, 2.0, 0.5]}
    doubles = [t.double() for t in teachers]
    for _ in force(monkeypatch):
        for case in CASES.values():
            got, grad = results(
                lambda z, d=case.argument: distill_loss(z, teachers, y, divergence=d, backend=KERNEL, **options),
                s,
                torch.ones(3),
            )
            want, want_grad = results(
                lambda z, d=case.argument: distill_loss(z, doubles, y, divergence=d, backend="reference", **options),
                s.double(),
                torch.ones(3),
            )
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("leaf", ["alpha", "z_loss", "weights", "per-token alpha"])
def test_gradient_to_the_coefficients(leaf):
    s, t, y = logits(4, 300, torch.float32), logits(4, 300, torch.float32), torch.tensor([3, -100, 5, 299])
    values = {
        "alpha": torch.tensor(0.3),
        "z_loss": torch.tensor(0.1),
        "weights": torch.rand(4),
        "per-token alpha": torch.rand(4),
    }
    for reduction in ("mean", "none"):
        name = leaf.split()[-1]
        compare(s, t, y, reduction=reduction, temperature=2.0, **{name: values[leaf]}, leaves=[name])


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "hellinger", "alpha_div", "skew_reverse_kl"])
def test_small_divergences_keep_their_digits(monkeypatch, name, size):
    """The difference of logarithms has lost them all: the terms are 1e-6, their sum of squares 1e-7."""
    teacher = logits(32, 1000, torch.float32)
    student = teacher + size * torch.randn(32, 1000)
    case = CASES[name]
    truth = distill_loss(
        student.double(), teacher.double(), divergence=case.argument, backend="reference", reduction="none"
    )
    naive = eager(student, teacher, terms=case.terms)
    for _ in force(monkeypatch):
        got = distill_loss(student, teacher, divergence=case.argument, backend=KERNEL, reduction="none")
        error = ((got - truth).abs() / truth).max().item()
        # the logits themselves are rounded at 2e-7, which a difference of 1e-4 feels
        assert error <= (1e-2 if size > 1e-4 else 2e-2)
        assert got.min() >= 0
        summed = distill_loss(student, teacher, divergence=case.argument, backend=KERNEL)
        torch.testing.assert_close(summed.double(), truth.mean(), rtol=1e-2, atol=0)
    if size <= 1e-3:
        assert ((naive - truth).abs() / truth).max() > 1e-2


@pytest.mark.skipif(TRITON, reason="of the threads of a CPU")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n", "v"), [(300, 100), (3, 20000), (1, 50257), (7, 9000)])
def test_same_bits_for_any_number_of_threads(threads, name, n, v):
    s, t, y = logits(n, v, torch.float32), logits(n, v, torch.bfloat16), torch.randint(v, (n,))
    options = {"divergence": CASES[name].argument, "temperature": 2.0, "z_loss": 1e-3, "backend": KERNEL}
    for reduction in ("mean", "none"):
        first = None
        for count in (1, 2, 3, 7):
            threads(count)
            got = results(
                lambda z, r=reduction: distill_loss(z, t, y, reduction=r, **options),
                s,
                torch.ones(n)[() if reduction == "none" else 0],
            )
            first = first or got
            for a, b in zip(got, first, strict=True):
                assert torch.equal(a, b), (count, reduction)


def test_both_modes_agree():
    s, t, y = logits(5, 3000, torch.float32), logits(5, 3000, torch.float32), torch.randint(3000, (5,))
    for case in CASES.values():
        options = {"divergence": case.argument, "temperature": 2.0, "backend": KERNEL}
        fused = results(lambda z, o=options: distill_loss(z, t, y, **o), s, torch.tensor(1.0))
        tokens = results(lambda z, o=options: distill_loss(z, t, y, reduction="none", **o), s, torch.ones(5) / 5)
        torch.testing.assert_close(fused[0], tokens[0].mean(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(fused[1], tokens[1], rtol=1e-5, atol=1e-8)
