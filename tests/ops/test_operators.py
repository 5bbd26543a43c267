"""The operators under PyTorch's own machinery: opcheck, torch.compile, torch.func, autocast, double backward."""

import inspect

import pytest
import torch
from machine import KERNEL, TRACES, TRITON
from torch.library import opcheck

import kdfast
from kdfast.ops import eager

ops = torch.ops.kdfast
DIVERGENCES = [
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    kdfast.Divergence("alpha_div", a=0.3),
    "hellinger",
    {"forward_kl": 0.4, "jsd": 0.6},
]


def batch(*leading: int, v: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher and labels, one of them ignored."""
    y = torch.randint(0, v, leading)
    y.view(-1)[-1] = -100
    return torch.randn(*leading, v), torch.randn(*leading, v), y


def arguments(teachers: int = 1, *, labels: bool = True, kept: tuple = ()) -> tuple:
    """A student and the arguments that all operators share; ``kept`` are those of a sparse teacher."""
    student, _, y = batch(2, 3)
    others = [torch.randn(2, 3, 37) for _ in range(teachers)]
    weights = torch.full((teachers,), 1 / teachers) if teachers > 1 else None
    names = ["forward_kl", "tvd"] if teachers else []
    if kept:
        names = ["forward_kl"] if kept[-1] == "drawn" else ["forward_kl", "jsd"]
    return (
        student,
        others,
        weights,
        y if labels else None,
        y != -100,
        torch.tensor(2.0),
        names,
        [0.5] * len(names),
        [0.5] * len(names),
        False,
        37,
        0.1,
        KERNEL,
        *(kept or (None, None, None, 0, "")),
        *(None, 0, 0),  # of packed targets
    )


@pytest.mark.parametrize("teachers", [0, 1, 2])
@pytest.mark.parametrize("labels", [True, False])
def test_opcheck(teachers, labels):
    if not teachers and not labels:
        labels = True
    args = arguments(teachers, labels=labels)
    wants = (True, bool(teachers == 1))
    stats = ops.dense_forward(*args, *wants)[4]
    c = [torch.rand(2, 3) if there else None for there in (teachers, labels, True)]
    for observes in (False, True):
        opcheck(ops.dense_forward.default, (*args, *wants, observes))
        opcheck(ops.dense_fused.default, (*args, *wants, *c, observes))
        opcheck(ops.dense_fused_.default, (args[0].clone(), *args[1:], *wants, *c, observes))
    opcheck(ops.dense_backward.default, (*args, stats, *c))
    opcheck(ops.dense_backward_.default, (args[0].clone(), *args[1:], stats, *c))
    opcheck(ops.scale_.default, (torch.rand(3, 5), torch.tensor(2.0), KERNEL))


@pytest.mark.parametrize("rule", ["bucket", "drawn"])
def test_opcheck_of_a_sparse_teacher(rule):
    ids = torch.rand(2, 3, 37).argsort(-1)[..., :5].int()
    values = torch.randn(2, 3, 5) - 5 if rule == "bucket" else torch.rand(2, 3, 5)
    args = arguments(0, kept=(ids, values, torch.rand(2, 3), 37, rule))
    c = [torch.rand(2, 3) for _ in range(3)]
    stats = ops.dense_forward(*args, True, False)[4]
    opcheck(ops.dense_forward.default, (*args, True, False))
    opcheck(ops.dense_backward.default, (*args, stats, *c))
    opcheck(ops.dense_backward_.default, (args[0].clone(), *args[1:], stats, *c))
    opcheck(ops.dense_fused.default, (*args, True, False, *c))
    opcheck(ops.dense_fused_.default, (args[0].clone(), *args[1:], True, False, *c))


@pytest.mark.skipif(KERNEL != "triton", reason="of the Triton backend, one of whose programs holds a row's entries")
def test_triton_refuses_more_entries_than_it_holds():
    ids, values = torch.arange(4097, dtype=torch.int32).expand(2, 3, -1), torch.zeros(2, 3, 4097)
    args = arguments(0, kept=(ids, values, None, 5000, "bucket"))
    with pytest.raises(ValueError, match="at most 4096 kept columns"):
        ops.dense_forward(*args, True, False)
    targets = kdfast.SparseTargets(ids, values, vocab_size=5000)
    with pytest.raises(RuntimeError, match="4097 entries"):
        kdfast.distill_loss(torch.zeros(2, 3, 5000), targets, backend="triton")


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_fullgraph_agrees_with_eager(divergence):
    student, teacher, y = batch(4)
    student.requires_grad_()
    loss = kdfast.DistillLoss(divergence=divergence, temperature=2.0, label_smoothing=0.1, z_loss=1e-3)
    compiled = torch.compile(loss, fullgraph=TRACES, backend="aot_eager")
    expected, got = loss(student, teacher, y), compiled(student, teacher, y)
    (g0,), (g1,) = (torch.autograd.grad(x, student) for x in (expected, got))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(g1, g0, rtol=1e-5, atol=1e-8)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_inductor_end_to_end():
    hidden, weight = torch.randn(6, 8), torch.randn(37, 8, requires_grad=True)
    _, teacher, y = batch(6)

    def step(w):
        return kdfast.distill_loss(hidden @ w.T, teacher, y, temperature=2.0)

    expected = torch.autograd.grad(step(weight), weight)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=TRACES)(weight), weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


def test_tensor_options_do_not_recompile():
    graphs = 0

    def counting(gm, _example):
        nonlocal graphs
        graphs += 1
        return gm.forward

    student, teacher, y = batch(5)
    torch._dynamo.reset()
    compiled = torch.compile(kdfast.distill_loss, fullgraph=TRACES, backend=counting)
    for tau, alpha in ((2.0, 0.5), (3.0, 0.25), (5.0, 0.9)):
        options = {"temperature": torch.tensor(tau), "alpha": torch.tensor(alpha)}
        got = compiled(student, teacher, y, **options)
        torch.testing.assert_close(got, kdfast.distill_loss(student, teacher, y, **options))
    assert graphs == (1 if TRACES else 0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, where a graph ends
def test_a_compiler_that_is_too_old_goes_around_the_loss(monkeypatch):
    """Its gradient is right between two graphs, and one graph is refused by the function's name."""
    monkeypatch.setattr(eager, "TRACING", (99, 0))
    around = eager.in_graphs(kdfast.distill_loss)
    assert inspect.signature(around) == inspect.signature(kdfast.distill_loss)
    student, teacher, y = batch(5)
    student.requires_grad_()

    def step(s):
        return 3 * around(2 * s, teacher, y, temperature=2.0)

    want = torch.autograd.grad(step(student), student)[0]
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager")(student), student)[0]
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="distill_loss"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(student)
    torch._dynamo.reset()


@pytest.mark.parametrize("teachers", [0, 1, 3])
def test_a_compiled_loss_without_gradient(teachers):
    student, _, y = batch(5)
    others = [torch.randn(5, 37) for _ in range(teachers)] or None
    torch._dynamo.reset()
    compiled = torch.compile(kdfast.distill_loss, fullgraph=TRACES, backend="aot_eager")
    torch.testing.assert_close(compiled(student, others, y), kdfast.distill_loss(student, others, y))
    torch._dynamo.reset()


def test_backward_of_a_compiled_loss_runs_twice():
    student, teacher, y = batch(5)
    student.requires_grad_()
    loss = torch.compile(kdfast.distill_loss, fullgraph=TRACES, backend="aot_eager")(student, teacher, y)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, student)
    torch.testing.assert_close(second, 3 * first)
    torch._dynamo.reset()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_func_grad_and_vmap(divergence):
    student, teacher, y = batch(4, 3)

    def loss(s, t, labels):
        return kdfast.distill_loss(s, t, labels, divergence=divergence, temperature=3.0, z_loss=1e-3)

    one = torch.func.grad(loss)
    expected = torch.stack([one(*row) for row in zip(student, teacher, y, strict=True)])
    leaf = student.clone().requires_grad_()
    for k in range(4):
        loss(leaf[k], teacher[k], y[k]).backward()
    torch.testing.assert_close(expected, leaf.grad)
    torch.testing.assert_close(torch.func.vmap(one)(student, teacher, y), expected)
    values = torch.stack([loss(*row) for row in zip(student, teacher, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(student, teacher, y), values)


def test_vmap_with_unmapped_and_moved_axes():
    student, teacher, y = batch(4, 3)
    expected = torch.stack([kdfast.distill_loss(student[k], teacher[0], y[0]) for k in range(4)])
    got = torch.func.vmap(kdfast.distill_loss, in_dims=(0, None, None))(student, teacher[0], y[0])
    torch.testing.assert_close(got, expected)
    expected = torch.stack([kdfast.distill_loss(student[k], teacher[k], y[k]) for k in range(4)])
    got = torch.func.vmap(kdfast.distill_loss, in_dims=(1, 0, 0))(student.movedim(0, 1), teacher, y)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("weights", [(0.3, 0.7), "tokens", "mapped"])
def test_vmap_of_an_ensemble(weights):
    student, _, y = batch(4, 3)
    teachers = [torch.randn(4, 3, 37) for _ in range(2)]
    w = {"tokens": torch.rand(2, 3), "mapped": torch.rand(4, 2, 3)}.get(weights, weights)
    dim = 0 if weights == "mapped" else None

    def loss(s, a, b, labels, tw):
        return kdfast.distill_loss(s, [a, b], labels, teacher_weights=tw)

    got = torch.func.vmap(loss, in_dims=(0, 0, 0, 0, dim))(student, *teachers, y, w)
    expected = [loss(student[k], teachers[0][k], teachers[1][k], y[k], w[k] if dim == 0 else w) for k in range(4)]
    torch.testing.assert_close(got, torch.stack(expected))


def test_vmap_over_temperature_names_the_remedy():
    student, teacher, _ = batch(3)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.vmap(lambda t: kdfast.distill_loss(student, teacher, temperature=t))(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_names_the_remedy(reduction):
    student, teacher, y = batch(3)
    student.requires_grad_()
    loss = kdfast.distill_loss(student, teacher, y, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        grad.sum().backward()
    exact = kdfast.distill_loss(student, teacher, y, reduction=reduction, backend="reference").sum()
    (grad,) = torch.autograd.grad(exact, student, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), student)[0].isfinite().all()


def test_autocast_leaves_the_arithmetic_alone():
    weight, x = torch.randn(37, 8, requires_grad=True), torch.randn(6, 8)
    _, teacher, y = batch(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = x @ weight.T
        loss = kdfast.distill_loss(logits, teacher, y, temperature=2.0)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, kdfast.distill_loss(logits, teacher, y, temperature=2.0))
    loss.backward()
    assert weight.grad.isfinite().all()


def test_learned_temperature_with_gradient_reversal():
    """Curriculum temperature: tau = 1 + 20 sigmoid(theta) moves against the loss."""

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return -g

    student, teacher, y = (x.double() if x.is_floating_point() else x for x in batch(8))
    theta = torch.zeros((), requires_grad=True)
    student.requires_grad_()

    def loss(s, t, leaf):
        tau = 1 + 20 * torch.sigmoid(Reverse.apply(leaf))
        return kdfast.distill_loss(s, t, y, temperature=tau, backend="reference" if s.dtype == torch.float64 else None)

    (got,) = torch.autograd.grad(loss(student.float(), teacher.float(), theta), theta)
    (expected,) = torch.autograd.grad(loss(student, teacher, theta), theta)
    # tau^2 D hardly depends on a tau of 11: two terms of some 1 cancel, and their rounding is what remains
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=3e-5)
    (direct,) = torch.autograd.grad(
        kdfast.distill_loss(student, teacher, y, temperature=1 + 20 * torch.sigmoid(theta), backend="reference"), theta
    )
    torch.testing.assert_close(expected, -direct)


def test_inference_mode_and_no_grad():
    student, teacher, y = batch(3)
    student.requires_grad_()
    expected = kdfast.distill_loss(student, teacher, y)
    with torch.no_grad():
        quiet = kdfast.distill_loss(student, teacher, y)
    with torch.inference_mode():
        inferred = kdfast.distill_loss(student.detach(), teacher, y)
    assert expected.requires_grad
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(inferred.clone(), expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.skipif(TRITON, reason="of a machine without a GPU or an interpreter")
def test_backends_say_what_runs_and_why():
    table = kdfast.backends()
    assert table.chosen == "cpu"
    assert "->" in str(table)
    assert kdfast.backends(dtype=torch.float64).chosen == "reference"
    why = {row.name: row.reason for row in kdfast.backends(dtype=torch.float64).rows}
    assert "float64" in why["cpu"]


@pytest.mark.skipif(TRITON, reason="the interpreted backend is asked for by name")
def test_fallback_on_a_large_vocabulary_is_said_once():
    student = torch.zeros(1, 20000, dtype=torch.float64)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        kdfast.distill_loss(student, student)
    kdfast.distill_loss(student, student)  # a second warning would be an error here
