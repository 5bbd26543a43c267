"""``class_dim``: classes on another axis than the last, as images (B, C, H, W) have them."""

from __future__ import annotations

import pytest
import torch
from machine import KERNEL, TRACES, TRITON, VARIANTS, choose
from torch.library import opcheck

from kdfast import DistillLoss, LMHead, distill_loss, soft_targets

V, H, K = 23, 6, 4


def images():
    return torch.randn(2, V, 3, 4), torch.randn(2, V, 3, 4), torch.randint(V, (2, 3, 4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("class_dim", [1, -3, 2])
def test_class_dim(backend, class_dim, reduction, layout):
    """Values and gradients are those of the classes moved last, in fp64; what is per token is (B, H, W)."""
    student, teacher, y = images()
    y[0, 1, 2] = -100
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    s, t = (x.movedim(1, class_dim).contiguous(memory_format=memory) for x in (student, teacher))
    tokens = {"weights": torch.rand(2, 3, 4), "alpha": torch.rand(2, 3, 4)}
    options = {"temperature": 2.0, "z_loss": 0.01, "reduction": reduction, **tokens}
    s.requires_grad_()
    exact = s.detach().double().requires_grad_()
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = distill_loss(
        exact.movedim(class_dim, -1), t.double().movedim(class_dim, -1), y, backend="reference", **double
    )
    loss = distill_loss(s, t, y, class_dim=class_dim, backend=backend, **options)
    assert loss.shape == ((2, 3, 4) if reduction == "none" else ())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    upstream = torch.rand(loss.shape)
    (grad,) = torch.autograd.grad(loss, s, upstream)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(want, exact, upstream.double())[0], rtol=1e-4, atol=1e-7
    )
    assert torch.equal(DistillLoss(class_dim=class_dim, backend=backend, **options)(s, t, y), loss)


def test_class_dim_as_cross_entropy_has_it(backend):
    student, _, y = images()
    got = distill_loss(student, labels=y, class_dim=1, label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(student, y, label_smoothing=0.1))


def test_class_dim_of_an_ensemble_and_of_one_axis(backend):
    student, teacher, y = images()
    several = distill_loss(student, [teacher, student], y, class_dim=1, backend=backend)
    last = [x.movedim(1, -1) for x in (student, teacher)]
    torch.testing.assert_close(several, distill_loss(last[0], last[::-1], y, backend=backend))
    one = distill_loss(student[0, :, 0, 0], teacher[0, :, 0, 0], class_dim=0, backend=backend)
    torch.testing.assert_close(one, distill_loss(student[0, :, 0, 0], teacher[0, :, 0, 0], backend=backend))


def test_overwriting_images_takes_channels_last():
    student, teacher, y = images()
    options = {"class_dim": 1, "overwrite_logits": True, "backend": KERNEL}
    with pytest.raises(ValueError, match="overwrite_logits needs rows that are contiguous"):
        distill_loss(student, teacher, y, **options)
    last = student.contiguous(memory_format=torch.channels_last).requires_grad_()
    (want,) = torch.autograd.grad(distill_loss(last, teacher, y, class_dim=1), last)
    got = torch.autograd.grad(distill_loss(last, teacher, y, **options), last)[0]
    assert torch.equal(got, want)
    assert got.data_ptr() == last.data_ptr()


def test_wrong_class_dims():
    student, teacher, y = images()
    for wrong, error in ((4, ValueError), (-5, ValueError), (1.0, TypeError), (True, TypeError), ("C", TypeError)):
        with pytest.raises(error, match="class_dim must be an"):
            distill_loss(student, teacher, y, class_dim=wrong)
    with pytest.raises(TypeError, match="class_dim must be an int"):
        DistillLoss(class_dim="C")
    head, targets = LMHead(torch.randn(2, 3, 4, H), torch.randn(V, H)), soft_targets(torch.randn(2, 3, 4, V), k=K)
    for call in ((head, teacher), (student, head), (student, [teacher, head]), (student, targets)):
        with pytest.raises(
            ValueError, match=r"class_dim: (student|teacher.*) is (LMHead|SparseTargets), whose classes"
        ):
            distill_loss(*call, class_dim=1)
    assert distill_loss(head, targets, y, class_dim=3).isfinite()  # the last
    with pytest.raises(ValueError, match="student has 1 column"):
        distill_loss(student[:, :1], None, y, class_dim=1)


def test_shapes_that_show_the_axis_name_it():
    student, teacher, y = images()
    for call in ({"labels": y}, {"weights": torch.ones(2, 3, 4)}, {"labels": y, "alpha": torch.ones(2, 3, 4)}):
        with pytest.raises(ValueError, match=r"pass class_dim=1 where the classes are that axis of .*\(2, 23, 3, 4\)"):
            distill_loss(student, teacher, **call)
    with pytest.raises(ValueError, match=r"leading axes \(2, 23, 3\), got \(2, 4\)$"):
        distill_loss(student, teacher, y[:, 0])


# --- Memory -----------------------------------------------------------------------------------------------------------

#: Images by how they lie in memory: the shape of what is stored, and the view of it.
IMAGES = {
    "several groups an image": ((1, 150, 70, 50), lambda x: x),
    "several images a group": ((7, 23, 3, 4), lambda x: x),
    "odd images": ((3, 40, 7, 7), lambda x: x),
    "two classes": ((2, 2, 33, 9), lambda x: x),
    "many classes": ((2, 1030, 11), lambda x: x),
    "one column": ((4, 19, 9, 1), lambda x: x),
    "one row": ((4, 19, 1, 9), lambda x: x),
    "one pixel": ((4, 19, 1, 1), lambda x: x),
    "channels last": ((2, 8, 8, 19), lambda x: x.movedim(-1, 1)),
    "some of the classes": ((2, 21, 8, 8), lambda x: x[:, 1:20]),
    "a crop": ((2, 19, 12, 12), lambda x: x[:, :, 2:9, 3:11]),
    "every other pixel": ((2, 19, 6, 12), lambda x: x[..., ::2]),
    "turned": ((2, 19, 6, 12), lambda x: x.mT),
    "one image for all": ((1, 19, 6, 5), lambda x: x.expand(3, -1, -1, -1)),
}


of_any_memory = pytest.mark.skipif(
    TRITON or not VARIANTS, reason="the kernels of the CPU read and write any memory, those of Triton are given rows"
)


def stored(name, dtype=torch.float32):
    shape, view = IMAGES[name]
    return view(torch.randn(shape).to(dtype))


def labels_of(student):
    y = torch.randint(student.shape[1], (student.shape[0], *student.shape[2:]))
    y.view(-1)[0] = -100
    return y


def loss_and_gradient(student, teacher, y, **options):
    leaf = student.detach().requires_grad_()
    loss = distill_loss(leaf, teacher, y, temperature=2.0, backend=KERNEL, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IMAGES)
@of_any_memory
def test_any_memory_gives_the_same_bits(monkeypatch, name, dtype, reduction):
    student, teacher = stored(name, dtype), stored(name, dtype)
    y = labels_of(student)
    rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
    for variant in VARIANTS:
        choose(variant, monkeypatch)
        for options in ({}, {"divergence": "jsd", "z_loss": 0.01}, {"divergence": "tvd", "label_smoothing": 0.1}):
            want, grad = loss_and_gradient(*rows, y, reduction=reduction, **options)
            for s, t in ((student, teacher), (student, teacher.contiguous()), (student.contiguous(), teacher)):
                got = loss_and_gradient(s, t, y, class_dim=1, reduction=reduction, **options)
                assert torch.equal(got[0], want)
                assert torch.equal(got[1].movedim(1, -1), grad)


@of_any_memory
@pytest.mark.parametrize("name", ["several groups an image", "odd images", "channels last"])
def test_the_gradient_lies_as_the_logits_do(name):
    student = stored(name)
    for reduction in ("sum", "none"):
        grad = loss_and_gradient(student, stored(name), labels_of(student), class_dim=1, reduction=reduction)[1]
        assert grad.stride() == student.stride()


@of_any_memory
@pytest.mark.parametrize("name", ["odd images", "some of the classes", "channels last", "one image for all"])
def test_everything_else_of_a_call(name):
    """Ensembles, a learned temperature, metrics, several backwards and a factor upstream, against rows."""
    student, teachers = stored(name), [stored(name), stored(name)]
    y = labels_of(student)
    of = {}
    for form in ("images", "rows"):
        move = (lambda x: x) if form == "images" else (lambda x: x.movedim(1, -1).contiguous())
        leaf, tau = move(student).detach().requires_grad_(), torch.tensor(1.5, requires_grad=True)
        options = {"temperature": tau, "divergence": "reverse_kl", "return_metrics": True, "backend": KERNEL}
        options["class_dim"] = 1 if form == "images" else -1
        several = distill_loss(leaf, [move(t) for t in teachers], y, **{**options, "temperature": 1.5})
        terms = distill_loss(leaf, move(teachers[0]), y, **options)
        total = 3 * terms.loss + several.loss
        first = torch.autograd.grad(total, [leaf, tau], retain_graph=True)
        again = torch.autograd.grad(2 * total, leaf)[0]
        last = [x if form == "rows" else x.movedim(1, -1) for x in (first[0], again)]
        of[form] = [total, first[1], *last, *terms.metrics, *several.metrics]
    torch.testing.assert_close(of["images"], of["rows"], rtol=1e-6, atol=1e-9)


@of_any_memory
@pytest.mark.parametrize("name", ["odd images", "one image for all"])
def test_opcheck_of_images(name):
    student, teacher = (stored(name).movedim(1, -1) for _ in range(2))
    y = labels_of(student.movedim(-1, 1))
    args = (
        student,
        [teacher],
        None,
        y,
        y != -100,
        torch.tensor(2.0),
        ["jsd"],
        [1.0],
        [0.5],
        False,
        student.shape[-1],
        0.1,
    )
    args = (*args, KERNEL, *(None, None, None, 0, ""), *(None, 0, 0))
    stats = torch.ops.kdfast.dense_forward(*args, True, True)[4]
    c = [torch.rand(y.shape) for _ in range(3)]
    opcheck(torch.ops.kdfast.dense_forward.default, (*args, True, True))
    opcheck(torch.ops.kdfast.dense_fused.default, (*args, True, True, *c))
    opcheck(torch.ops.kdfast.dense_backward.default, (*args, stats, *c))


@of_any_memory
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.drawn
@pytest.mark.parametrize("name", ["odd images", "some of the classes"])
def test_a_compiled_model_of_images(name):
    """The strides that the compiler was told are those that the operators give."""
    student, teacher = stored(name), stored(name)
    y, scale = labels_of(student), torch.rand(student.shape[1], 1, 1)

    def loss(x):
        return distill_loss(x * scale, teacher, y, class_dim=1, temperature=2.0, backend=KERNEL)

    want, got = (student.detach().requires_grad_() for _ in range(2))
    loss(want).backward()
    torch.compile(loss, fullgraph=TRACES)(got).backward()
    torch.testing.assert_close(got.grad, want.grad)
    torch._dynamo.reset()
