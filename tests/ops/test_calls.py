"""Call forms: scores for logits, values in tensors, tensors that change, were freed, or come from inference mode."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machine import DEVICE, KERNEL, TRACES, TRITON

import kdfast
from kdfast import DistillLoss, LMHead, SparseTargets, distill_loss, soft_targets, uld_loss
from kdfast.methods import response
from kdfast.spec.problem import build_problem

N, V, H, K = 5, 23, 6, 4
METHODS = ["adaptive_kl", "dist", "dkd", "nkd", "standardised", "ttm"]


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    """Values are looked at on a GPU, too."""
    if DEVICE != "cpu":
        monkeypatch.setenv("KDFAST_CHECK", "1")


def method(name):
    return getattr(getattr(response, name), f"{name}_loss")


def batch():
    return torch.randn(N, V), torch.randn(N, V), torch.randint(V, (N,))


def sparse():
    return soft_targets(torch.randn(N, V), k=K)


# --- Scores: one column -----------------------------------------------------------------------------------------------


def test_one_column_is_a_score(backend):
    one, y = torch.randn(N, 1, requires_grad=True), torch.zeros(N, dtype=torch.int64)
    teachers = (torch.randn(N, 1), None, [torch.randn(N, 1)] * 2, SparseTargets(y[:, None].int(), one, vocab_size=1))
    for teacher in teachers:
        with pytest.raises(ValueError, match=r"student has 1 column.*scores.*torch\.nn\.functional\.mse_loss"):
            distill_loss(one, teacher, y, backend=backend)
    head = LMHead(torch.randn(N, H), torch.randn(1, H))
    with pytest.raises(ValueError, match=r"student has 1 column.*mse_loss"):
        DistillLoss(backend=backend)(head, None, y)


def test_a_teacher_of_one_column_is_a_score():
    student = torch.randn(N, V)
    for teacher in (torch.randn(N, 1), LMHead(torch.randn(N, H), torch.randn(1, H))):
        with pytest.raises(ValueError, match=r"teacher has 1 column.*mse_loss"):
            distill_loss(student, teacher, vocab="truncate")
    targets = SparseTargets(torch.zeros(N, 1, dtype=torch.int32), torch.zeros(N, 1), vocab_size=1)
    with pytest.raises(ValueError, match="teacher has 1 column"):
        distill_loss(student, targets, vocab="truncate")


def test_one_column_everywhere_else():
    one, many = torch.randn(N, 1), torch.randn(N, V)
    for student, teacher in ((one, one), (one, many), (many, one)):
        with pytest.raises(ValueError, match=r"has 1 column.*mse_loss"):
            uld_loss(student, teacher)
    with pytest.raises(ValueError, match=r"logits_or_head has 1 column.*mse_loss"):
        soft_targets(one, k=1)


@pytest.mark.parametrize("name", METHODS)
def test_one_column_in_a_method(name):
    with pytest.raises(ValueError, match=r"student has 1 column.*mse_loss"):
        method(name)(torch.zeros(N, 1), torch.zeros(N, 1), torch.zeros(N, dtype=torch.int64))


# --- Values in tensors ------------------------------------------------------------------------------------------------

WRONG = {
    "alpha above 1": ({"alpha": 2.0}, "alpha must be >= 0 and <= 1, got 2"),
    "alpha below 0": ({"alpha": -0.5}, "alpha must be >= 0 and <= 1, got -0.5"),
    "alpha nan": ({"alpha": math.nan}, "alpha must be .* got nan"),
    "token alpha above 1": ({"alpha": [0.5, 1.0, 0.0, 1.5, 0.5]}, "alpha must be >= 0 and <= 1, got 1.5"),
    "token alpha nan": ({"alpha": [0.5, 1.0, 0.0, math.nan, 0.5]}, "alpha must be .* got nan"),
    "negative weight": ({"weights": [1.0, 0.0, -1.0, 1.0, 1.0]}, "weights must be >= 0 and finite, got -1"),
    "infinite weight": ({"weights": [1.0, 0.0, math.inf, 1.0, 1.0]}, "weights must be >= 0 and finite, got inf"),
    "z_loss below 0": ({"z_loss": -1.0}, "z_loss must be >= 0 and finite, got -1"),
    "z_loss infinite": ({"z_loss": math.inf}, "z_loss must be >= 0 and finite, got inf"),
    "num_items 0": ({"num_items": 0}, "num_items must be > 0 and finite, got 0"),
    "num_items below 0": ({"num_items": -3.0}, "num_items must be > 0 and finite, got -3"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be > 0 and finite, got 0"),
    "temperature infinite": ({"temperature": math.inf}, "temperature must be > 0 and finite, got inf"),
    "negative teacher weights": ({"teacher_weights": [1.0, -0.5]}, "teacher_weights must be >= 0"),
    "teacher weights of nothing": ({"teacher_weights": [0.0, 0.0]}, "teacher_weights must be >= 0 with a positive sum"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_in_a_tensor(backend, name):
    changes, words = WRONG[name]
    changes = {k: torch.tensor(v) for k, v in changes.items()}
    student, teacher, y = batch()
    teacher = [teacher, -teacher] if "teacher_weights" in changes else teacher
    for leaf in (student, student.clone().requires_grad_()):
        with pytest.raises(ValueError, match=words):
            distill_loss(leaf, teacher, y, backend=backend, **changes)


def test_a_wrong_value_that_is_learned(backend):
    student, teacher, y = batch()
    for name, value in (("temperature", -1.0), ("alpha", 1.1), ("z_loss", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            distill_loss(student, teacher, y, backend=backend, **{name: torch.tensor(value, requires_grad=True)})
        with pytest.raises(ValueError, match=f"{name} must be"):
            DistillLoss(**{name: torch.nn.Parameter(torch.tensor(value))})


def test_wrong_values_of_other_losses():
    student, teacher, y = batch()
    wrong = {"temperature": torch.tensor(0.0), "num_items": torch.tensor(0), "weights": -torch.ones(N)}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            uld_loss(student, teacher, **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be"):
            method("dkd")(student, teacher, y, **{name: value})
    with pytest.raises(ValueError, match="gamma must be > 0"):
        method("ttm")(student, teacher, gamma=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="alpha must be"):
        method("ttm")(student, teacher, y, alpha=torch.tensor(2.0))


def test_num_items_of_a_distiller():
    student, teacher, y = torch.nn.Linear(3, V), torch.nn.Linear(3, V), torch.randint(V, (N,))
    with kdfast.Distiller(student, teacher, [kdfast.methods.KD()]) as d:
        for wrong in (0, torch.tensor(0), -1.0):
            with pytest.raises(ValueError, match="num_items must be > 0"):
                d((torch.randn(N, 3), y), num_items=wrong)


def test_right_values_in_tensors_pass(backend):
    """The bounds themselves, a weight of NaN, which is that token's loss, and teachers' weights of a dropped token."""
    student, teacher, y = batch()
    for alpha in (0.0, 1.0):
        assert distill_loss(student, teacher, y, alpha=torch.tensor(alpha), backend=backend).isfinite()
    weights = torch.tensor([1.0, 0.0, math.nan, 2.0, 0.5])
    loss = distill_loss(student, teacher, y, weights=weights, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False, False]
    of_tokens = torch.rand(2, N) + 0.1
    of_tokens[:, 1] = 0.0
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    assert distill_loss(
        student, [teacher, student], y, teacher_weights=of_tokens, weights=kept, backend=backend
    ).isfinite()


@pytest.mark.skipif(TRITON, reason="the kernels under a tracer are the CPU's here")
def test_tracers_do_not_look_at_values():
    student, teacher, y = batch()
    compiled = torch.compile(distill_loss, fullgraph=TRACES, backend="aot_eager")
    options = {"alpha": torch.tensor(0.5), "weights": torch.ones(N), "z_loss": torch.tensor(0.1)}
    want = distill_loss(student, teacher, y, **options)
    torch.testing.assert_close(compiled(student, teacher, y, **options), want)
    torch.testing.assert_close(torch.func.functional_call(DistillLoss(**options), {}, (student, teacher, y)), want)
    got = torch.func.vmap(lambda s, w: distill_loss(s, teacher, y, weights=w))(
        torch.stack([student] * 2), torch.ones(2, N)
    )
    torch.testing.assert_close(got, torch.stack([distill_loss(student, teacher, y)] * 2))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = distill_loss(torch.empty(N, V), torch.empty(N, V), alpha=None, weights=torch.empty(N))
    assert fake.shape == ()
    torch._dynamo.reset()


# --- Tensors that change in place -------------------------------------------------------------------------------------

OPTIONS = {
    "labels": lambda: {"labels": torch.randint(V, (N,))},
    "temperature": lambda: {"temperature": torch.tensor(2.0)},
    "ids": lambda: {"teacher": sparse()},
    "logprobs": lambda: {"teacher": sparse()},
    "lse": lambda: {"teacher": soft_targets(torch.randn(N, V), k=K, temperatures=(2.0,)), "temperature": 2.0},
    "weights": lambda: {"weights": torch.rand(N) + 0.1},
    "alpha": lambda: {"alpha": torch.rand(N)},
    "scalar alpha": lambda: {"alpha": torch.tensor(0.3)},
    "z_loss": lambda: {"z_loss": torch.tensor(0.3)},
    "num_items": lambda: {"num_items": torch.tensor(7.0)},
    "teacher_weights": lambda: {"teacher_weights": torch.tensor([1.0, 2.0])},
}
SNAPSHOTS = ("weights", "alpha", "scalar alpha", "z_loss", "num_items", "teacher_weights")


def changing(name):
    """A call and the tensor of it that is going to change."""
    student, teacher, y = batch()
    call = {"teacher": teacher, "labels": y} | OPTIONS[name]()
    if name == "teacher_weights":
        call["teacher"] = [teacher, torch.randn(N, V)]
    held = call["teacher"]
    if name == "lse":
        return student, call, held.lse[2.0]
    if name in ("ids", "logprobs"):
        return student, call, getattr(held, name)
    return student, call, call[name.removeprefix("scalar ")]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("head", [False, True])
def test_a_tensor_changed_between_two_backwards(backend, name, reduction, head):
    """The second gradient is that of the call as it was, or torch's own error: never another one."""
    if name == "num_items" and reduction != "mean":
        pytest.skip("num_items is of the mean")
    student, call, changed = changing(name)
    leaf = student.requires_grad_()
    if head:
        leaf = torch.randn(N, H, requires_grad=True)
        student = LMHead(leaf, torch.randn(V, H))
    loss = distill_loss(student, **call, reduction=reduction, backend=backend).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    with torch.no_grad():
        changed.copy_(changed.flip(-1)) if name == "ids" else changed.zero_()
    try:
        (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017 - one of two right answers
    else:
        torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-8)
        assert name in SNAPSHOTS or head or backend == "reference"


@pytest.mark.parametrize("name", ["labels", "temperature", "ids", "logprobs"])
def test_the_kernels_raise_for_what_they_read_again(name):
    student, call, changed = changing(name)
    leaf = student.requires_grad_()
    mean = distill_loss(leaf, **call, backend=KERNEL)
    tokens = distill_loss(leaf, **call, reduction="none", backend=KERNEL).sum()
    with torch.no_grad():
        changed.add_(0)
    mean.backward(retain_graph=True)  # its gradient was made before the change
    for loss in (mean, tokens):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)


@pytest.mark.parametrize("who", ["student", "temperature"])
def test_uld_raises_for_what_it_reads_again(who):
    student, teacher, _ = batch()
    leaf, tau = student.requires_grad_(), torch.tensor(2.0)
    z = leaf * 1.0
    loss = uld_loss(z, teacher, temperature=tau)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        (z if who == "student" else tau).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Tensors whose memory was freed -----------------------------------------------------------------------------------


def freed(x):
    x.untyped_storage().resize_(0)
    return x


FREED = r"memory was freed.*FSDP2"


@pytest.mark.parametrize("who", ["student", "teacher", "labels", "weights", "alpha"])
def test_freed_memory(backend, who):
    student, teacher, y = batch()
    call = {"student": student, "teacher": teacher, "labels": y, "weights": torch.rand(N), "alpha": torch.rand(N)}
    freed(call[who])
    with pytest.raises(ValueError, match=rf"^{who}.*{FREED}"):
        distill_loss(**call, backend=backend)


@pytest.mark.parametrize("part", ["ids", "logprobs"])
def test_freed_targets(backend, part):
    targets = sparse()
    freed(getattr(targets, part))
    with pytest.raises(ValueError, match=rf"teacher: {part}.*{FREED}"):
        distill_loss(torch.randn(N, V), targets, backend=backend)


@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_freed_heads(backend, part):
    head = LMHead(torch.randn(N, H), torch.randn(V, H), torch.randn(V))
    freed(getattr(head, part))
    with pytest.raises(ValueError, match=rf"student: LMHead.{part}.*{FREED}"):
        distill_loss(head, None, torch.zeros(N, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_logits_freed_before_backward(who):
    student, teacher, y = batch()
    z = student.requires_grad_() * 1.0
    loss = distill_loss(z, teacher, y, reduction="none", backend=KERNEL).sum()
    freed(z if who == "student" else teacher)
    with pytest.raises((ValueError, RuntimeError), match=rf"{FREED}|out of bounds"):
        loss.backward()


def test_a_head_freed_before_backward():
    weight = torch.randn(V, H)
    head = LMHead(torch.randn(N, H, requires_grad=True), weight)
    loss = distill_loss(head, None, torch.zeros(N, dtype=torch.int64), reduction="none", backend=KERNEL).sum()
    freed(weight)
    with pytest.raises((ValueError, RuntimeError), match=rf"{FREED}|out of bounds"):
        loss.backward()


def test_freed_memory_of_other_losses(tmp_path):
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match=rf"student.*{FREED}"):
        uld_loss(freed(student.clone()), teacher)
    with pytest.raises(ValueError, match=rf"logits_or_head.*{FREED}"):
        soft_targets(freed(student.clone()), k=K)
    targets = sparse()
    freed(targets.logprobs)
    writer = kdfast.cache.Writer(tmp_path / "cache", vocab_size=V)
    with pytest.raises(ValueError, match=FREED):
        writer.write("a", targets)


@pytest.mark.skipif(TRITON, reason="of the compiled extension")
def test_the_bindings_check_what_is_there():
    """A view knows how much memory lies behind it, offsets and strides included."""
    from kdfast.views import _core, view

    def sort_rows(x, out):
        _core.sort_rows(view(x), view(out), None, 1)

    x, out = torch.randn(4, 8), torch.empty(4, 8)
    sort_rows(x, out)
    assert torch.equal(out, x.sort(descending=True).values)
    freed(x)
    with pytest.raises(ValueError, match=rf"x takes 128 bytes, but its storage holds 0.*{FREED}"):
        sort_rows(x, out)
    part = torch.randn(6, 8)[2:]
    part.untyped_storage().resize_(160)  # of 192
    with pytest.raises(ValueError, match="values takes 128 bytes, but its storage holds 96"):
        sort_rows(torch.randn(4, 8), part)
    view(torch.randn(3, 0))  # nothing is there, and nothing is read


# --- Tensors of inference mode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tensors_of_inference_mode(backend, reduction):
    student, teacher, y = batch()
    call = {
        "teacher": teacher,
        "labels": y,
        "weights": torch.rand(N) + 0.1,
        "alpha": torch.rand(N),
        "temperature": torch.tensor(2.0),
        "z_loss": torch.tensor(0.1),
    }
    with torch.inference_mode():
        inferred = {k: x.clone() for k, x in call.items()}
        both = [teacher.clone(), student.clone()]
        of_both = torch.tensor([0.3, 0.7])
    assert all(x.is_inference() for x in inferred.values())
    leaf = student.requires_grad_()
    options = {"reduction": reduction, "backend": backend}

    def gradient(**arguments):
        loss = distill_loss(leaf, **arguments, **options).sum()
        return torch.autograd.grad(loss, leaf, retain_graph=True)[0], torch.autograd.grad(loss, leaf)[0]

    want, again = gradient(**call)
    assert torch.equal(want, again)
    for got in gradient(**inferred):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    ensemble = {"teacher_weights": torch.tensor([0.3, 0.7]), "teacher": [x.clone() for x in both]}
    want, _ = gradient(**ensemble)
    for got in gradient(teacher=both, teacher_weights=of_both):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_inference_tensors_are_not_copied():
    with torch.inference_mode():
        teacher = torch.randn(N, V + 1)[:, 1:]
    problem = build_problem(torch.randn(N, V), teacher)
    assert problem.teachers[0].data_ptr() == teacher.data_ptr()
    assert problem.teachers[0].stride() == teacher.stride()
    assert not problem.teachers[0].is_inference()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_targets_and_heads_of_inference_mode(backend, reduction):
    with torch.inference_mode():
        targets, hidden, weight = sparse(), torch.randn(N, H), torch.randn(V, H)
    assert targets.ids.is_inference()
    leaf = torch.randn(N, V, requires_grad=True)
    for teacher, plain in (
        (targets, targets.map(torch.clone)),
        (LMHead(hidden, weight), LMHead(hidden.clone(), weight.clone())),
    ):
        got, want = (
            torch.autograd.grad(distill_loss(leaf, t, reduction=reduction, backend=backend).sum(), leaf)[0]
            for t in (teacher, plain)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*METHODS, "uld"])
def test_methods_take_tensors_of_inference_mode(name):
    student, teacher, y = batch()
    with torch.inference_mode():
        inferred, labels, weights = teacher.clone(), y.clone(), torch.ones(N)
    leaf = student.requires_grad_()
    loss = uld_loss if name == "uld" else method(name)
    arguments = [(teacher,), (inferred,)] if name == "uld" else [(teacher, y), (inferred, labels)]
    weighted = {} if name == "dist" else {"weights": weights}
    want = torch.autograd.grad(loss(leaf, *arguments[0]), leaf)[0]
    got = torch.autograd.grad(loss(leaf, *arguments[1], **weighted), leaf)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_inference_tensors_under_transforms():
    student, teacher, y = batch()
    with torch.inference_mode():
        inferred = teacher.clone()
    want = torch.func.grad(lambda s: distill_loss(s, teacher, y, backend=KERNEL))(student)
    got = torch.func.grad(lambda s: distill_loss(s, inferred, y, backend=KERNEL))(student)
    assert torch.equal(got, want)


# --- The source tree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [True, False])
def test_a_package_without_its_extension_says_so(tmp_path, source):
    """Not the reference in silence: from the source tree, or where the wheel was built for another Python."""
    here = Path(kdfast.__file__).parent
    shutil.copytree(here, tmp_path / "kdfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if source:
        (tmp_path / "CMakeLists.txt").touch()
    command = [sys.executable, "-c", "import kdfast"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "ImportError: kdfast has no compiled extension" in done.stderr
    assert str(tmp_path / "kdfast") in done.stderr
    assert ("source tree" in done.stderr and "python -P" in done.stderr) is source


# --- Outputs of models, and sparse targets of other forms -------------------------------------------------------------


class Output(OrderedDict):
    """As ``transformers.utils.ModelOutput`` has it: a mapping whose entries are attributes, too."""

    def __getattr__(self, name):
        return self[name] if name in self else super().__getattribute__(name)


@pytest.mark.parametrize("form", [lambda x: SimpleNamespace(logits=x), lambda x: Output(logits=x)])
def test_a_models_output_is_told_of_its_logits(form):
    student, teacher, y = batch()
    with pytest.raises(TypeError, match=r"student must be .*: it is a model's output, pass student\.logits"):
        distill_loss(form(student), teacher, y)
    with pytest.raises(TypeError, match=r"teacher must be .*: it is a model's output, pass teacher\.logits"):
        distill_loss(student, form(teacher), y)
    with pytest.raises(TypeError, match=r"teacher\[1\] must be .*: it is a model's output, pass teacher\[1\]\.logits"):
        distill_loss(student, [teacher, form(teacher)], y)
    for loss in (uld_loss, method("ttm")):
        with pytest.raises(TypeError, match=r"teacher\.logits"):
            loss(student, form(teacher))
    with pytest.raises(TypeError, match=r"logits_or_head\.logits"):
        soft_targets(form(teacher))


def test_a_tuple_and_a_dict_are_told_of_their_logits():
    student, teacher, y = batch()
    with pytest.raises(TypeError, match=r'pass student\["logits"\]'):
        distill_loss({"logits": student}, teacher, y)
    with pytest.raises(TypeError, match=r"student must be .*got tuple: .*student\.logits or the element"):
        distill_loss((student, None), teacher, y)
    with pytest.raises(TypeError, match=r"teacher\[1\] must be .*got dict: .*teacher\.logits or the element"):
        distill_loss(student, (teacher, {}), y)
    with pytest.raises(TypeError, match=r"student\.logits\(\) of a kdfast\.LMHead"):
        uld_loss(LMHead(torch.randn(N, H), torch.randn(V, H)), teacher)


def test_ids_of_64_bits(backend):
    student, targets = torch.randn(N, V), sparse()
    wide = SparseTargets(targets.ids.long(), targets.logprobs, vocab_size=V)
    assert wide.ids.dtype == torch.int32
    assert torch.equal(wide.ids, targets.ids)
    losses = [distill_loss(student, t, backend=backend) for t in (wide, targets)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)  # the one has a log-normaliser of about 0
    for wrong in (V, -2, 2**32, -(2**32)):  # the last two would be 0 in 32 bits
        ids = targets.ids.long()
        ids[1, 1] = wrong
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {V}\), or -1 beyond k_eff, got {wrong}"):
            SparseTargets(ids, targets.logprobs, vocab_size=V)


def test_cat(backend):
    """Targets of different K in one: each token's loss is what it was."""
    logits, student = torch.randn(7, 3, V), torch.randn(7, 3, V)
    for options in ({"method": "topk"}, {"method": "topp", "p": 0.5}, {"method": "pps"}, {"method": "sample"}):
        tau = {"temperatures": (2.0,)}
        parts = [
            soft_targets(x, **options, **tau, k=k) for k, x in ((9, logits[:2]), (4, logits[2:3]), (1, logits[3:]))
        ]
        together = SparseTargets.cat(parts)
        assert together.shape == (7, 3, 9)
        assert together.temperatures == (1.0, 2.0)
        assert torch.equal(together.k_eff, together.valid.sum(-1))
        got = distill_loss(student, together, temperature=2.0, reduction="none", backend=backend)
        each = zip(student.split([2, 1, 4]), parts, strict=True)
        want = [distill_loss(s, t, temperature=2.0, reduction="none", backend=backend) for s, t in each]
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-6)


def test_cat_without_a_number_of_entries():
    """Where all K are in use k_eff may be left out; it is made where others have it or K differs."""
    made = [sparse(), soft_targets(torch.randn(2, V), k=K + 2)]
    a, b = (SparseTargets(t.ids, t.logprobs, lse=t.lse, vocab_size=V) for t in made)
    assert SparseTargets.cat([a, a]).k_eff is None
    assert SparseTargets.cat([a, b]).k_eff.tolist() == [K] * N + [K + 2] * 2
    assert SparseTargets.cat([a, made[0]]).k_eff.tolist() == [K] * 2 * N
    assert torch.equal(SparseTargets.cat([a, b])[N:].ids, b.ids)


def test_what_cannot_be_joined():
    a = sparse()
    one = SparseTargets(a.ids, a.logprobs, vocab_size=V + 1)
    two = soft_targets(torch.randn(N, V), k=K, temperatures=(1.0, 2.0))
    drawn = soft_targets(torch.randn(N, V), k=K, method="pps")
    for other in (one, two, drawn):
        for join in (SparseTargets.cat, SparseTargets.stack):
            with pytest.raises(ValueError, match=r"\(method, vocab_size, temperatures\) must agree"):
                join([a, other])
    for join in (SparseTargets.cat, SparseTargets.stack):
        with pytest.raises(ValueError, match="needs at least one"):
            join([])
    gold = SparseTargets(a.ids, a.logprobs, vocab_size=V, lse=a.lse, gold_logprob=torch.zeros(N))
    with pytest.raises(ValueError, match="gold_logprob is there in some targets and missing in others"):
        SparseTargets.cat([gold, a])
    for shapes in ([a, a.map(lambda t: t[None])], [a[0], a[0]]):
        with pytest.raises(ValueError, match=r"cat: shapes \(n, \.\.\., K\) must agree but in n and K"):
            SparseTargets.cat(shapes)
