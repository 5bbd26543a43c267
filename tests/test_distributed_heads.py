"""LMHeads whose rows, and sparse targets whose columns, lie on several gloo processes, against one rank in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from formulas import CASES, pairs_of
from machine import DEVICE, INTERPRETING, KERNEL, TRACES, VARIANTS
from ranks import cuts_of, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import kdfast
from kdfast import LMHead, SparseTargets, distributed

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(DEVICE != "cpu", reason="several processes and one GPU"),
]

N, V, H, K = 6, 600, 12, 9
CHUNK = 4 * V  # bytes: a few chunks of one or two tokens
#: Of the largest entry of what is compared; a head's logits are themselves rounded to 16 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
Y = torch.tensor([0, V - 1, 299, 300, -100, 151])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.0])
GROUP = dist.group  # its WORLD is there once the processes have met
MIXTURE = {"forward_kl": 0.5, "jsd": 2.0, "reverse_kl": 0.25}


# --- A call, on one rank and over several -----------------------------------------------------------------------------


def draw_head(generator, dtype, *, bias=False, **options):
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return LMHead(draw(N, H), draw(V, H), draw(V) if bias else None, **options)


def of_columns(x, columns):
    """What a rank with these columns has of logits, a head or targets."""
    if isinstance(x, LMHead):
        bias = None if x.bias is None else x.bias[columns]
        return LMHead(x.hidden, x.weight[columns], bias, softcap=x.softcap, scale=x.scale)
    return x if isinstance(x, SparseTargets) else x[:, columns]


def double(x):
    if isinstance(x, LMHead):
        bias = None if x.bias is None else x.bias.double()
        return LMHead(x.hidden.double(), x.weight.double(), bias, softcap=x.softcap, scale=x.scale)
    return x if isinstance(x, SparseTargets) else x.double()


def on_leaves(x):
    """A student whose tensors require grad, and these."""
    parts = [x] if isinstance(x, torch.Tensor) else [p for p in (x.hidden, x.weight, x.bias) if p is not None]
    leaves = [p.detach().clone().requires_grad_() for p in parts]
    if isinstance(x, torch.Tensor):
        return leaves[0], leaves
    return dataclasses.replace(x, hidden=leaves[0], weight=leaves[1], bias=(*leaves, None)[2]), leaves


def loss_and_gradients(function, student, teachers, *, learned=None, upstream=1.0, **options):
    student, leaves = on_leaves(student)
    if learned is not None:
        options["temperature"] = torch.tensor(learned, requires_grad=True)
        leaves.append(options["temperature"])
    teacher = None if not teachers else teachers[0] if len(teachers) == 1 else teachers
    loss = function(student, teacher, options.pop("labels", None), **options)
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    return loss.detach(), *(g / upstream for g in grads)


def compare(name, got, want, dtype, columns=None):
    """``want`` of the whole vocabulary: shards lie along the axis of size V."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        for axis in range(b.dim() if k else 0):
            if b.shape[axis] == V and columns is not None:
                b = b.narrow(axis, columns.start, columns.stop - columns.start)  # noqa: PLW2901
        error, allowed = (a.double() - b).abs().max().item() if a.numel() else 0.0, TOLERANCE[dtype]
        largest = b.abs().max().item() if b.numel() else 0.0
        assert a.shape == b.shape, name
        assert error <= allowed * largest + 4e-7, f"{name}, output {k}: off by {error} where {largest} is the largest"


def agree(rank, world, name, student, teachers, *, upstream=1.0, **options):
    """The loss over ranks against one rank in fp64, with even and uneven shards."""
    dtype = (student if isinstance(student, torch.Tensor) else student.hidden).dtype
    want = loss_and_gradients(
        kdfast.distill_loss,
        double(student),
        [double(t) for t in teachers],
        upstream=upstream,
        **{"backend": "reference"} | options,
    )
    for uneven in (False, True):
        cuts = cuts_of(V, world, uneven=uneven)
        mine = slice(cuts[rank], cuts[rank + 1])
        got = loss_and_gradients(
            distributed.distill_loss,
            of_columns(student, mine),
            [of_columns(t, mine) for t in teachers],
            upstream=upstream,
            vocab_group=GROUP.WORLD,
            vocab_start=cuts[rank] if uneven else None,
            **{"backend": KERNEL} | options,
        )
        compare(f"{name}, {cuts}", got, want, dtype, mine)


# --- Heads ------------------------------------------------------------------------------------------------------------


def check_heads(rank, world):
    generator = torch.Generator().manual_seed(11)
    logits = lambda dtype=torch.float32: (2 * torch.randn(N, V, generator=generator)).to(dtype)  # noqa: E731
    head = lambda dtype=torch.float32, **options: draw_head(generator, dtype, **options)  # noqa: E731
    cases = list(CASES.items())[:1] if INTERPRETING else CASES.items()
    for name, case in cases:
        options = {"divergence": case.argument, "labels": Y, "temperature": 2.0, "memory_budget": CHUNK}
        agree(rank, world, name, head(bias=True), [head(softcap=6.0)], **options)
    everything = {
        "divergence": "reverse_kl",
        "labels": Y,
        "weights": WEIGHTS,
        "alpha": 0.7,
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "temperature": 3.0,
        "memory_budget": CHUNK,
    }
    agree(
        rank, world, "everything", head(bias=True, softcap=5.0, scale=0.7), [head(scale=1.3, bias=True)], **everything
    )
    if INTERPRETING:
        return
    options = {"labels": Y, "temperature": 2.0, "memory_budget": CHUNK}
    agree(rank, world, "a teacher's logits", head(), [logits()], divergence="jsd", upstream=65536.0, **options)
    agree(rank, world, "a student's logits", logits(), [head()], divergence="jsd", **options)
    for ensemble in ("prob", "logit"):
        mixed = [head(), logits(), head(softcap=4.0)]
        several = options | {"ensemble": ensemble, "teacher_weights": [1.0, 2.0, 0.5], "divergence": "reverse_kl"}
        agree(rank, world, f"ensemble, {ensemble}", head(bias=True), mixed, **several)
    agree(rank, world, "no teacher", head(bias=True), [], labels=Y, label_smoothing=0.2, memory_budget=CHUNK)
    agree(rank, world, "no labels", head(), [head()], divergence="tvd", temperature=1.0)
    per_token = {"reduction": "none", "divergence": "jsd", "weights": WEIGHTS, "z_loss": 1e-2, "upstream": 3.0}
    agree(rank, world, "per token", head(bias=True, softcap=5.0), [head()], **options, **per_token)
    learned = {"labels": Y, "learned": 1.7, "divergence": "jsd", "memory_budget": CHUNK}
    agree(rank, world, "learned temperature", head(), [head()], **learned)
    agree(rank, world, "learned, per token", head(), [head()], **learned, reduction="none")
    agree(rank, world, "bf16", head(torch.bfloat16, bias=True), [head(torch.bfloat16)], **options)
    agree(rank, world, "fp16", head(torch.float16), [head(torch.float16)], upstream=1024.0, **options)
    dropped = torch.full((N,), -100)
    agree(rank, world, "all dropped", head(), [head()], **options | {"labels": dropped})


def check_what_a_dropped_token_holds(rank, world):
    generator = torch.Generator().manual_seed(12)
    student, teacher = (draw_head(generator, torch.float32) for _ in range(2))
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    results = []
    for poison in (0.0, float("nan")):
        for x in (student, teacher):
            x.hidden[4] = poison
        parts = of_columns(student, mine), [of_columns(teacher, mine)]
        options = {"labels": Y, "vocab_group": GROUP.WORLD, "backend": KERNEL, "memory_budget": CHUNK}
        results.append(loss_and_gradients(distributed.distill_loss, *parts, **options))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not results[1][1][4].any()


def check_gradients_that_nobody_wants(rank, world):
    generator = torch.Generator().manual_seed(13)
    student, teacher = (draw_head(generator, torch.float32, bias=True) for _ in range(2))
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    student, teacher = of_columns(student, mine), of_columns(teacher, mine)
    options = {"vocab_group": GROUP.WORLD, "temperature": 2.0, "return_terms": True, "backend": KERNEL}
    everything, leaves = on_leaves(student)
    whole = distributed.distill_loss(everything, teacher, Y, **options)
    whole.loss.backward()
    for k, name in enumerate(("hidden", "weight", "bias")):
        leaf = getattr(student, name).detach().clone().requires_grad_()
        terms = distributed.distill_loss(dataclasses.replace(student, **{name: leaf}), teacher, Y, **options)
        terms.loss.backward()
        assert torch.equal(leaf.grad, leaves[k].grad)
        for a, b in pairs_of(terms, whole):
            assert torch.equal(a, b)
    silent = distributed.distill_loss(student, teacher, Y, **options)
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent.loss, whole.loss.detach())


# --- Sparse targets ---------------------------------------------------------------------------------------------------


def top_k(generator, k, tau):
    """The k largest of random logits, in any order; the last entries of the second token are not in use."""
    log_q = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64)).log_softmax(-1)
    values, ids = log_q.topk(k)
    order = torch.rand(ids.shape, generator=generator).argsort(-1)
    values, ids = values.gather(-1, order), ids.gather(-1, order).int()
    if 3 < k < V:
        ids[1, -3:] = -1
    lse = {tau: torch.logsumexp(log_q / tau, -1).float()}
    return SparseTargets(ids, values.float(), vocab_size=V, lse=lse)


def drawn(generator, n, tau):
    log_q = (torch.randn(N, V, generator=generator, dtype=torch.float64) / tau).log_softmax(-1)
    chosen = log_q.exp().multinomial(n, replacement=True, generator=generator)
    counts = torch.zeros_like(log_q).scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    mass, ids = (counts / n).topk(n)
    entropy = (mass * log_q.gather(-1, ids)).sum(-1).float()
    return SparseTargets(
        torch.where(mass > 0, ids, -1).int(), None, vocab_size=V, method="sample", mass=mass.float(),
        neg_entropy=entropy, lse={tau: torch.zeros(N)},
    )  # fmt: skip


RULES = [
    ("bucket", "forward_kl"),
    ("bucket", "reverse_kl"),
    ("bucket", "jsd"),
    ("bucket", MIXTURE),
    ("renorm", "forward_kl"),
    ("renorm", "jsd"),
    ("zero", "forward_kl"),
]


def sparse_scenes(generator):
    """(name, targets, options): every rule with every divergence that it defines."""
    for tail, divergence in RULES:
        for tau in (1.0, 2.0, 3.7):
            options = {"tail": tail, "divergence": divergence, "temperature": tau}
            yield f"{tail} {divergence} {tau}", top_k(generator, K, tau), options
    for tau in (1.0, 2.0):
        yield f"drawn {tau}", drawn(generator, 12, tau), {"temperature": tau}
    for tail in ("bucket", "renorm", "zero"):
        yield f"all kept, {tail}", top_k(generator, V, 2.0), {"tail": tail, "temperature": 2.0}


def check_sparse(rank, world):
    generator = torch.Generator().manual_seed(14)
    logits = lambda: 2 * torch.randn(N, V, generator=generator)  # noqa: E731
    head = lambda dtype=torch.float32, **options: draw_head(generator, dtype, **options)  # noqa: E731
    hard = {"labels": Y, "alpha": 0.6, "z_loss": 1e-2}
    scenes = list(sparse_scenes(generator))
    for k, (name, targets, options) in enumerate(scenes[10:11] if INTERPRETING else scenes):
        y = Y.clone()
        y[0] = targets.ids[0, 0]  # a label among the kept columns
        smoothing = {"label_smoothing": 0.1 * (k % 2)}
        agree(rank, world, name, logits(), [targets], **options, **hard | {"labels": y}, **smoothing)
        agree(rank, world, f"head, {name}", head(bias=True), [targets], **options, **hard, memory_budget=CHUNK)
    if INTERPRETING:
        return
    targets, options = top_k(generator, K, 2.0), {"temperature": 2.0, "divergence": "jsd"}
    student = logits()
    student[:, 20:45] = -torch.inf  # padding, and what the targets keep of it
    agree(rank, world, "padding", student, [targets], **options, **hard, label_smoothing=0.1)
    agree(rank, world, "soft alone", logits(), [targets], **options, upstream=65536.0)
    per_token = options | hard | {"reduction": "none", "weights": WEIGHTS, "label_smoothing": 0.1}
    agree(rank, world, "per token", logits(), [targets], **per_token)
    agree(rank, world, "per token, head", head(softcap=5.0), [targets], **per_token, memory_budget=CHUNK)
    capped = options | {"labels": Y, "memory_budget": CHUNK}
    agree(rank, world, "capped", head(bias=True, softcap=5.0, scale=0.8), [targets], **capped)
    for dtype in (torch.bfloat16, torch.float16):
        agree(rank, world, str(dtype), logits().to(dtype), [targets], **options, **hard)
        agree(rank, world, f"head, {dtype}", head(dtype), [targets], **options, **hard, memory_budget=CHUNK)
    for height in (12.0, 25.0, 60.0):
        sure = logits().scatter_add(-1, targets.ids.clamp(min=0).long(), torch.full((N, K), height))
        for name in ("forward_kl", "reverse_kl", "jsd"):
            agree(rank, world, f"sure by {height}, {name}", sure, [targets], temperature=1.0, divergence=name)
    nothing = SparseTargets(targets.ids[:, :0], targets.logprobs[:, :0], vocab_size=V)
    agree(rank, world, "nothing kept", logits(), [nothing], labels=Y)


def check_sparse_rows(rank, world):
    """A strided student, a token that is NaN and one that is dropped; the student stays as it was."""
    generator = torch.Generator().manual_seed(15)
    targets = top_k(generator, K, 1.0)
    stack = SparseTargets.stack([targets[:3], targets[3:]])
    whole = torch.randn(2, 4, V, generator=generator)
    whole[1, 2, 7] = float("nan")
    whole[0, 1] = float("nan")
    y = Y.reshape(2, 3).clone()
    y[0, 1] = -100
    options = {"reduction": "none", "backend": KERNEL, "vocab_group": GROUP.WORLD}
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    shard = whole[..., mine].contiguous()
    before = shard.clone()
    leaf = shard.requires_grad_()
    loss = distributed.distill_loss(leaf[:, :-1], stack, y, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.equal(leaf.detach().nan_to_num(9.0), before.nan_to_num(9.0))
    truth = whole.double().requires_grad_()
    want = kdfast.distill_loss(truth[:, :-1], stack, y, reduction="none", backend="reference")
    (want_grad,) = torch.autograd.grad(want.sum(), truth)
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-6, equal_nan=True)
    rows = torch.ones(2, 4, dtype=torch.bool)
    rows[1, 2] = False
    torch.testing.assert_close(grad[rows].double(), want_grad[rows][:, mine], rtol=2e-5, atol=4e-7)
    assert grad[1, 2].isnan().all()
    one = distributed.distill_loss(leaf[0, 0].detach(), stack[0, 0], y[0, 0], **options)  # a token without an axis
    assert one == loss[0, 0]


# --- DTensors ---------------------------------------------------------------------------------------------------------


def placed_head(x, mesh, hidden, weight):
    """A head of DTensors on leaves, and the leaves."""
    _, parts = on_leaves(x)
    leaves = [
        distribute_tensor(p.detach(), mesh, w).requires_grad_()
        for p, w in zip(parts, (hidden, weight, weight), strict=False)
    ]
    return dataclasses.replace(x, hidden=leaves[0], weight=leaves[1], bias=(*leaves, None)[2]), leaves


def placed_targets(targets, mesh, placements):
    return targets.map(lambda t: distribute_tensor(t, mesh, placements))


def check_dtensors(rank, world):
    generator = torch.Generator().manual_seed(16)
    student, teacher = (draw_head(generator, torch.float32, bias=True) for _ in range(2))
    targets = top_k(generator, K, 2.0)
    stored = torch.randn(N, V, generator=generator)
    meshes = [(init_device_mesh("cpu", (world,)), [Replicate()], [Shard(0)])]
    if world == 4:  # tokens over one axis, the vocabulary over the other
        meshes.append((init_device_mesh("cpu", (2, 2)), [Shard(0), Replicate()], [Replicate(), Shard(0)]))
    for mesh, tokens, rows in meshes:
        of_logits = [Shard(1) if p == Shard(0) else t for t, p in zip(tokens, rows, strict=True)]
        labels = distribute_tensor(Y, mesh, tokens)
        of_head, of_stored = placed_head(teacher, mesh, tokens, rows)[0], distribute_tensor(stored, mesh, of_logits)
        teachers = {
            "head": (teacher, of_head),
            "logits": (stored, of_stored),
            "targets": (targets, placed_targets(targets, mesh, tokens)),
            "both": ([teacher, stored], [of_head, of_stored]),
        }
        for name, (whole, placed) in teachers.items():
            given = [double(t) for t in whole] if isinstance(whole, list) else [double(whole)]
            want = loss_and_gradients(
                kdfast.distill_loss, double(student), given, labels=Y, temperature=2.0, backend="reference"
            )
            head, leaves = placed_head(student, mesh, tokens, rows)
            loss = kdfast.distill_loss(head, placed, labels, temperature=2.0)
            loss.backward()
            assert leaves[0].grad.placements == tuple(tokens)
            got = loss.detach(), *(x.grad.full_tensor() for x in leaves)
            compare(f"{name} on {mesh}", got, want, torch.float32)
        want = loss_and_gradients(kdfast.distill_loss, stored.double(), [targets], temperature=2.0, backend="reference")
        leaf = distribute_tensor(stored, mesh, of_logits).requires_grad_()
        loss = kdfast.distill_loss(leaf, placed_targets(targets, mesh, tokens), temperature=2.0)
        loss.backward()
        compare(f"stored student on {mesh}", (loss.detach(), leaf.grad.full_tensor()), want, torch.float32)


def check_dtensors_that_do_not_fit(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    head = draw_head(torch.Generator().manual_seed(17), torch.float32)
    plain = LMHead(head.hidden, distribute_tensor(head.weight, mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"LMHead.weight is a DTensor.*make hidden a DTensor"):
        kdfast.distill_loss(plain, labels=Y)
    labels = distribute_tensor(Y, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"LMHead.weight must be a DTensor"):
        kdfast.distill_loss(LMHead(distribute_tensor(head.hidden, mesh, [Replicate()]), head.weight), labels=labels)
    for hidden, weight in (([Shard(0)], [Shard(0)]), ([Replicate()], [Shard(1)]), ([Shard(1)], [Replicate()])):
        bad, _ = placed_head(head, mesh, hidden, weight)
        with pytest.raises(ValueError, match="each mesh axis"):
            kdfast.distill_loss(bad, labels=labels)
    good, _ = placed_head(head, mesh, [Replicate()], [Shard(0)])
    with pytest.raises(ValueError, match=r"teacher must be a DTensor"):
        kdfast.distill_loss(good, torch.zeros(N, V), labels)
    other, _ = placed_head(head, mesh, [Replicate()], [Replicate()])
    with pytest.raises(ValueError, match=r"LMHead.weight is placed as"):
        kdfast.distill_loss(good, other, labels)
    partial = LMHead(good.hidden, good.weight, distribute_tensor(torch.zeros(V), mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"LMHead.bias is placed as"):
        kdfast.distill_loss(partial, labels=labels)
    unsummed = type(good.hidden).from_local(head.hidden, mesh, [Partial()])
    with pytest.raises(ValueError, match="redistribute"):
        kdfast.distill_loss(LMHead(unsummed, other.weight), labels=labels)
    few = LMHead(good.hidden, distribute_tensor(head.weight[: world + 1], mesh, [Shard(0)]))
    if world == 4:  # two columns each, and none for the last
        with pytest.raises(ValueError, match="too few"):
            kdfast.distill_loss(few, labels=labels)


def check_a_low_rank_product(rank, world):
    """Over ranks that share tokens it is as on one; those that share the vocabulary refuse it, whoever has it."""
    generator = torch.Generator().manual_seed(23)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    parts, teacher = [draw(N, H), draw(V, H), draw(N, 2), draw(V, 2)], draw(N, V)

    def head(h, w, a, b):
        return LMHead(h, w, low_rank=(a, b))

    leaves = [x.double().requires_grad_() for x in parts]
    want = kdfast.distill_loss(head(*leaves), teacher.double(), Y, temperature=2.0, backend="reference")
    wanted = torch.autograd.grad(want, leaves)
    mesh = init_device_mesh("cpu", (world,))
    placements = [[Shard(0)], [Replicate()]] * 2
    placed = [distribute_tensor(x, mesh, p).requires_grad_() for x, p in zip(parts, placements, strict=True)]
    t, y = (distribute_tensor(x, mesh, [Shard(0)]) for x in (teacher, Y))
    loss = kdfast.distill_loss(head(*placed), t, y, temperature=2.0, backend=KERNEL)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    for got, truth in zip(torch.autograd.grad(loss, placed), wanted, strict=True):
        torch.testing.assert_close(got.full_tensor().double(), truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    h, w, a, b = parts
    added, plain = LMHead(h, w[mine], low_rank=(a, b[mine])), LMHead(h, w[mine])
    for student, taught in ((added, plain), (plain, added), (plain, [plain, added])):
        with pytest.raises(ValueError, match="low_rank is not served where ranks share the vocabulary"):
            distributed.distill_loss(student, taught, vocab_group=GROUP.WORLD)
    columns = [distribute_tensor(x, mesh, p) for x, p in zip(parts, [[Replicate()], [Shard(0)]] * 2, strict=True)]
    with pytest.raises(ValueError, match="low_rank is not served where ranks share the vocabulary"):
        kdfast.distill_loss(head(*columns), labels=distribute_tensor(Y, mesh, [Replicate()]))


def check_compiled(rank, world):
    """Rows that are sharded are one graph; over shards of the vocabulary the compiler goes around."""
    if world != 2:
        return
    mesh, generator = init_device_mesh("cpu", (world,)), torch.Generator().manual_seed(19)
    student, teacher = (torch.randn(N, V, generator=generator) for _ in range(2))
    for placement in (Shard(0), Shard(1)):
        leaf, t = (distribute_tensor(x, mesh, [placement]) for x in (student, teacher))
        y = distribute_tensor(Y, mesh, [placement if placement == Shard(0) else Replicate()])
        leaf.requires_grad_()
        loss = lambda s, t, y: kdfast.distill_loss(s, t, y, temperature=2.0)  # noqa: E731
        compiled = torch.compile(loss, fullgraph=TRACES and placement != Shard(1), backend="aot_eager")
        out = []
        for function in (loss, compiled):
            value = function(leaf, t, y)
            out.append((value.detach(), torch.autograd.grad(value, leaf)[0].to_local()))
        for a, b in zip(*out, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# --- What is refused --------------------------------------------------------------------------------------------------


def check_errors(rank, world):
    generator = torch.Generator().manual_seed(18)
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    targets, student = top_k(generator, K, 2.0), torch.randn(N, V, generator=generator)[:, mine]
    call = lambda s, t, **options: distributed.distill_loss(s, t, vocab_group=GROUP.WORLD, **options)  # noqa: E731
    with pytest.raises(ValueError, match=f"teacher has {V + 1} columns, all shards of the student {V}"):
        call(student, dataclasses.replace(targets, vocab_size=V + 1))
    ids = targets.ids.clone()
    ids[0, 0] = V
    with pytest.raises(ValueError, match=r"ids must be in \[0, 600\)"):
        call(student, dataclasses.replace(targets, ids=ids))
    ids[0, 0] = ids[0, 1]
    with pytest.raises(ValueError, match="duplicates"):
        call(student, dataclasses.replace(targets, ids=ids))
    with pytest.raises(ValueError, match="was not captured"):
        call(student, targets, temperature=3.0)
    with pytest.raises(ValueError, match="tail='zero' is defined for"):
        call(student, targets, tail="zero", divergence="jsd")
    with pytest.raises(ValueError, match="learned temperature"):
        call(student, targets, tail="renorm", temperature=torch.tensor(1.0, requires_grad=True))
    with pytest.raises((ValueError, RuntimeError), match="float64"):
        call(student.double(), targets)
    head = of_columns(draw_head(generator, torch.float32), mine)
    with pytest.raises((ValueError, RuntimeError), match="float64"):
        call(double(head), double(head))
    with pytest.raises(ValueError, match="on no rank"):
        call(head, None, labels=torch.full((N,), V))
    with pytest.raises(ValueError, match="teacher_grad"):
        call(head, head, teacher_grad=True)
    hidden = head.hidden.clone().requires_grad_()
    loss = call(dataclasses.replace(head, hidden=hidden), head)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


KERNEL_CHECKS = (check_heads, check_sparse, check_sparse_rows)
CHECKS = (
    *KERNEL_CHECKS,
    check_what_a_dropped_token_holds,
    check_gradients_that_nobody_wants,
    check_dtensors,
    check_dtensors_that_do_not_fit,
    check_a_low_rank_product,
    check_compiled,
    check_errors,
)


@pytest.mark.drawn
@pytest.mark.parametrize("world", [2] if INTERPRETING else [2, 4])
def test_ranks_agree_with_one(world, tmp_path):
    run(KERNEL_CHECKS if INTERPRETING else CHECKS, world, tmp_path)
