"""The loss over gloo processes against one rank with everything: vocabulary shards, token shards, both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from formulas import CASES, balanced, pairs_of
from machine import DEVICE, KERNEL, VARIANTS
from ranks import compare, cuts_of, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kdfast
from kdfast import distributed

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(DEVICE != "cpu", reason="several processes and one GPU"),
]

N, V = 6, 600


def scenes():
    """Options by name; labels of every rank, padding columns and dropped tokens among them."""
    y = torch.tensor([0, V - 1, 299, 300, -100, 151])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0])
    out = {name: {"divergence": case.argument, "labels": y, "temperature": 2.0} for name, case in CASES.items()}
    out["per token"] = {"divergence": "jsd", "labels": y, "reduction": "none", "temperature": 1.5}
    out["everything"] = {
        "divergence": CASES["mixture"].argument,
        "labels": y,
        "weights": weights,
        "alpha": 0.7,
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "temperature": 3.0,
    }
    out["no teacher"] = {"labels": y, "teachers": 0, "label_smoothing": 0.2}
    out["no labels"] = {"divergence": "reverse_kl"}
    out["learned temperature"] = {"divergence": "jsd", "labels": y, "learned": 1.7}
    out["ensemble"] = {"divergence": "reverse_kl", "labels": y, "teachers": 3, "teacher_weights": [1.0, 2.0, 0.5]}
    out["ensemble of logits"] = {"divergence": "forward_kl", "labels": y, "teachers": 2, "ensemble": "logit"}
    out["bf16"] = {"divergence": "forward_kl", "labels": y, "dtype": torch.bfloat16, "temperature": 2.0}
    out["fp16"] = {"divergence": "jsd", "labels": y, "dtype": torch.float16}
    out["dropped"] = {"divergence": "jsd", "labels": torch.full((N,), -100)}
    return out


def loss_and_gradients(function, student, teachers, *, learned=None, upstream=1.0, **options):
    """Loss, gradient of the student and of the temperature where it is learned."""
    leaf = student.detach().clone().requires_grad_()
    leaves = [leaf]
    if learned is not None:
        options["temperature"] = torch.tensor(learned, requires_grad=True)
        leaves.append(options["temperature"])
    teacher = None if not teachers else teachers[0] if len(teachers) == 1 else teachers
    loss = function(leaf, teacher, options.pop("labels", None), **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))


def check_vocabulary(rank, world):
    generator = torch.Generator().manual_seed(5)
    for name, scene in scenes().items():
        options = dict(scene)
        dtype = options.pop("dtype", torch.float32)
        draw = lambda d=dtype: (2 * torch.randn(N, V, generator=generator)).to(d)  # noqa: E731
        student, teachers = draw(), [draw() for _ in range(options.pop("teachers", 1))]
        for x in (student, *teachers):
            x[:, 20:45] = -torch.inf
        upstream = 65536.0 if name == "forward_kl" else 1.0
        want = loss_and_gradients(
            kdfast.distill_loss,
            student.double(),
            [t.double() for t in teachers],
            upstream=upstream,
            backend="reference",
            **options,
        )
        for start_given in (False, True):
            cuts = cuts_of(V, world, uneven=start_given)  # uneven ones have shards of padding alone
            mine = slice(cuts[rank], cuts[rank + 1])
            got = loss_and_gradients(
                distributed.distill_loss,
                student[:, mine],
                [t[:, mine] for t in teachers],
                upstream=upstream,
                vocab_group=dist.group.WORLD,
                vocab_start=cuts[rank] if start_given else None,
                backend=KERNEL,
                **options,
            )
            got, truth = (got[0], got[1] / upstream, *got[2:]), (want[0], want[1][:, mine] / upstream, *want[2:])
            compare(f"{name}, {cuts}", got, truth, dtype)


def check_values(rank, world):
    """Levels, weights of 0 and what is not below 0, over shards."""
    generator = torch.Generator().manual_seed(8)
    cuts = cuts_of(V, world, uneven=False)
    mine = slice(cuts[rank], cuts[rank + 1])

    def over_ranks(student, teacher, **options):
        teachers = [teacher[:, mine]] if isinstance(teacher, torch.Tensor) else [teacher]
        given = {"vocab_group": dist.group.WORLD, "backend": KERNEL, **options}
        return loss_and_gradients(distributed.distill_loss, student[:, mine], teachers, **given)

    def whole(student, teacher, **options):
        got = loss_and_gradients(kdfast.distill_loss, student, [teacher], backend="reference", **options)
        return got[0], got[1][:, mine]

    y = torch.randint(V, (N,), generator=generator)
    s, t = ((torch.randn(N, V, generator=generator) * 256).round() / 256 for _ in range(2))
    kept = kdfast.soft_targets(t, k=9, temperatures=(0.25, 4.0))
    for tau in (0.25, 4.0):
        for labels in (None, y):
            options = {"temperature": tau, "labels": labels}
            for name in ("forward_kl", "reverse_kl", "jsd"):
                want = whole(s.double(), t.double(), divergence=name, **options)
                got = over_ranks(s + 8192, t - 4096, divergence=name, **options)
                compare(f"{name}, tau {tau}", got, want, torch.float32)
            want, got = whole(s.double(), kept, **options), over_ranks(s - 8192, kept, **options)
            compare(f"kept, tau {tau}", got, want, torch.float32)
    options = {"temperature": 3.0, "z_loss": 0.1}
    compare("z loss alone", over_ranks(s, t, **options), whole(s.double(), t.double(), **options), torch.float32)
    hole = t.clone()
    hole[:, 5] = -torch.inf
    for alpha in (0.0, torch.tensor(0.0), torch.zeros(N)):
        options = {"divergence": "reverse_kl", "alpha": alpha, "labels": y}
        got = over_ranks(s, hole, **options)
        compare("alpha of 0", got, whole(s.double(), t.double(), **options), torch.float32)
    sure = s.clone()
    sure[torch.arange(N), y] += 40.0
    ce = over_ranks(sure, t, labels=y, alpha=torch.zeros(N), reduction="none")[0]
    assert (ce >= 0).all()
    # The side on which p lies, ln p - ln q down to 1e-8, in a few columns of every rank; fp32 has it in small logits.
    few = torch.zeros(V, dtype=torch.bool)
    few[7::50] = True
    z, near = (torch.where(few, x / 20, -torch.inf) for x in (s, t))
    apart = torch.randn(N, V, generator=generator).sign() * 10 ** (-8 + torch.rand(N, V, generator=generator))
    chosen = few & (torch.arange(V) % 150 != 7)
    near = balanced(z.double(), near.double(), 0.5, chosen, apart).float()
    options = {"divergence": "tvd", "temperature": 0.5}
    want = whole(z.double(), near.double(), **options)
    compare("near equality", over_ranks(z, near, **options), want, torch.float32)


def check_tokens(rank, world):
    generator = torch.Generator().manual_seed(6)
    n = 4 * world
    student, teacher = (torch.randn(n, 90, generator=generator) for _ in range(2))
    y = torch.randint(90, (n,), generator=generator)
    y[1] = -100
    mine = slice(4 * rank, 4 * rank + 4)
    group = dist.group.WORLD
    for reduction in ("mean", "sum", "none"):
        options = {"temperature": 2.0, "reduction": reduction, "divergence": "jsd"}
        want = loss_and_gradients(
            kdfast.distill_loss, student.double(), [teacher.double()], labels=y, backend="reference", **options
        )
        got = loss_and_gradients(
            distributed.distill_loss, student[mine], [teacher[mine]], labels=y[mine], token_group=group, **options
        )
        value = want[0][mine] if reduction == "none" else want[0]
        compare(reduction, got, (value, want[1][mine]), torch.float32)
    leaf = student[mine].clone().requires_grad_()
    none = distributed.distill_loss(leaf, teacher[mine], torch.full((4,), -100), token_group=group)
    none.backward()
    assert none == 0
    assert not leaf.grad.any()
    terms = distributed.distill_loss(
        student[mine], teacher[mine], y[mine], token_group=group, temperature=2.0, return_terms=True
    )
    whole = kdfast.distill_loss(student, teacher, y, temperature=2.0, return_terms=True)
    for a, b in pairs_of(terms, whole):
        torch.testing.assert_close(a, b)


def check_both(rank, world):
    """Two shards of the vocabulary times two of the tokens."""
    if world != 4:
        return
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(8, 100, generator=generator) for _ in range(2))
    y = torch.randint(100, (8,), generator=generator)
    row, column = divmod(rank, 2)
    vocab_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    token_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    want = loss_and_gradients(kdfast.distill_loss, student.double(), [teacher.double()], labels=y, backend="reference")
    rows, columns = slice(4 * row, 4 * row + 4), slice(50 * column, 50 * column + 50)
    got = loss_and_gradients(
        distributed.distill_loss,
        student[rows, columns],
        [teacher[rows, columns]],
        labels=y[rows],
        vocab_group=vocab_groups[row],
        token_group=token_groups[column],
    )
    compare("both", got, (want[0], want[1][rows, columns]), torch.float32)


def check_dtensors(rank, world):
    """`kdfast.distill_loss` itself, given DTensors: it finds the groups by their placements."""
    generator = torch.Generator().manual_seed(8)
    student, teacher = (torch.randn(8, 101, generator=generator) for _ in range(2))  # shards of unequal width
    y = torch.randint(101, (8,), generator=generator)
    want = loss_and_gradients(kdfast.distill_loss, student.double(), [teacher.double()], labels=y, backend="reference")
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(1), Shard(0), Replicate()):
        s, t = (distribute_tensor(x.clone(), mesh, [placement]) for x in (student, teacher))
        s.requires_grad_()
        labels = distribute_tensor(y, mesh, [placement if placement == Shard(0) else Replicate()])
        loss = kdfast.distill_loss(s, t, labels)
        loss.backward()
        assert s.grad.placements == (placement,)
        compare(str(placement), (loss.detach(), s.grad.full_tensor()), want, torch.float32)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        s, t = (distribute_tensor(x.clone(), mesh, [Shard(0), Shard(1)]) for x in (student, teacher))
        s.requires_grad_()
        loss = kdfast.distill_loss(s, t, distribute_tensor(y, mesh, [Shard(0), Replicate()]))
        loss.backward()
        compare("two axes", (loss.detach(), s.grad.full_tensor()), want, torch.float32)
    mesh = init_device_mesh("cpu", (world,))
    s, t = (distribute_tensor(x, mesh, [p]) for x, p in ((student, Shard(1)), (teacher, Shard(0))))
    with pytest.raises(ValueError, match="teacher is placed as"):
        kdfast.distill_loss(s, t)
    with pytest.raises(ValueError, match="teacher must be a DTensor"):
        kdfast.distill_loss(s, teacher)
    with pytest.raises(ValueError, match="redistribute"):
        kdfast.distill_loss(
            DTensor.from_local(student, mesh, [Partial()]), DTensor.from_local(teacher, mesh, [Partial()])
        )


def check_errors(rank, world):
    group = dist.group.WORLD
    s, t = torch.randn(3, 10), torch.randn(3, 10)
    with pytest.raises(ValueError, match="1 are on no rank"):
        distributed.distill_loss(s, t, torch.tensor([0, 10 * world, -100]), vocab_group=group)
    for options, match in (
        ({"overwrite_logits": True}, "overwrite_logits"),
        ({"teacher_grad": True}, "teacher_grad"),
        ({"vocab": "truncate"}, "truncate"),
    ):
        with pytest.raises(ValueError, match=match):
            distributed.distill_loss(s, t, vocab_group=group, **options)
    with pytest.raises((ValueError, RuntimeError), match="float64"):  # the latter where a backend is named
        distributed.distill_loss(s.double(), t.double(), vocab_group=group)
    leaf = s.clone().requires_grad_()
    (grad,) = torch.autograd.grad(distributed.distill_loss(leaf, t, vocab_group=group), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


CHECKS = (check_vocabulary, check_values, check_tokens, check_both, check_dtensors, check_errors)


@pytest.mark.drawn
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one(world, tmp_path):
    run(CHECKS, world, tmp_path)
