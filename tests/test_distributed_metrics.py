"""Metrics where the vocabulary, the tokens or both lie on several ranks, against one rank with everything."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from formulas import pairs_of
from machine import DEVICE, INTERPRETING, KERNEL, VARIANTS
from ranks import cuts_of, run

import kdfast
from kdfast import LMHead, SparseTargets, distributed

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(DEVICE != "cpu", reason="several processes and one GPU"),
]

N, V, H = 8, 300, 6


def close(name, got, want):
    for a, b in pairs_of(got, want):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-5, atol=2e-6, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )


def drawn(seed, dtype=torch.float32):
    """Logits that agree on some tokens, with ties over the ranks, levels, padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    z, t = ((2 * torch.randn(N, V, generator=generator)).to(dtype) for _ in range(2))
    z[:, 20:45] = -torch.inf
    t[:, 20:45] = -torch.inf
    z[0, [V - 1, 12]] = t[0, [V - 1, 12]] = 16.0  # equal on the first and the last rank
    z[1, V - 2] = t[1, [V - 2, 0]] = 12.0
    t[2:4] = z[2:4]
    z[4] -= 400
    y = torch.randint(V, (N,), generator=generator)
    y[0], y[1], y[3], y[6] = 12, V - 2, z[3].float().argmax(), -100
    return z, t, y


def scenes():
    """Teachers made of the drawn one, and options."""
    generator = torch.Generator().manual_seed(9)
    third, weights = torch.randn(N, V, generator=generator), torch.rand(2, N, generator=generator) + 0.1
    kept = {"k": 9, "temperatures": (1.0, 2.0)}
    yield "dense", lambda t: t, {"temperature": 2.0}
    yield "per token", lambda t: t, {"divergence": "jsd", "reduction": "none", "weights": weights[0]}
    yield "none", lambda _: None, {}
    yield "ensemble", lambda t: [t, third], {"teacher_weights": weights, "temperature": 2.0}
    yield "one of two", lambda t: [t, third], {"teacher_weights": [0.0, 1.0]}
    yield "mixed logits", lambda t: [t, third], {"ensemble": "logit", "teacher_weights": [1.0, 3.0]}
    for tail in ("bucket", "renorm", "zero"):
        yield tail, lambda t: kdfast.soft_targets(t, **kept), {"tail": tail, "temperature": 2.0}
    yield "drawn", lambda t: kdfast.soft_targets(t, k=9, method="pps", seed=1), {}
    nothing = SparseTargets(torch.full((N, 2), -1, dtype=torch.int32), torch.zeros(N, 2), vocab_size=V)
    yield "nothing kept", lambda _: nothing, {}


def of_columns(x, mine):
    if isinstance(x, list):
        return [of_columns(t, mine) for t in x]
    return x[:, mine] if isinstance(x, torch.Tensor) else x


def exact(x):
    if isinstance(x, list):
        return [exact(t) for t in x]
    return x.double() if isinstance(x, torch.Tensor) else x


def check_vocabulary(rank, world):
    for name, teacher_of, of_scene in scenes():
        options = of_scene | {"return_metrics": True}
        for dtype in (torch.float32, torch.bfloat16):
            z, t, y = drawn(3, dtype)
            teacher = teacher_of(t)
            want = kdfast.distill_loss(z.double(), exact(teacher), y, backend="reference", **options)
            for uneven in (False, True):
                cuts = cuts_of(V, world, uneven=uneven)
                mine = slice(cuts[rank], cuts[rank + 1])
                got = distributed.distill_loss(
                    z[:, mine].clone().requires_grad_(),
                    of_columns(teacher, mine),
                    y,
                    vocab_group=dist.group.WORLD,
                    vocab_start=cuts[rank] if uneven else None,
                    backend=KERNEL,
                    **options,
                )
                close(f"{name}, {dtype}, {cuts}", got, want)


def check_rows_without_a_largest_logit(rank, world):
    z, t, y = drawn(4)
    z[0, V - 3], z[1, 3], z[2] = torch.nan, torch.inf, -torch.inf
    t[:3] = z[:3]
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    want = kdfast.distill_loss(z.double(), t.double(), y, return_metrics=True, backend="reference").metrics
    options = {"vocab_group": dist.group.WORLD, "return_metrics": True, "backend": KERNEL}
    got = distributed.distill_loss(z[:, mine], t[:, mine], y, **options).metrics
    assert torch.equal(got.accuracy, want.accuracy)
    assert torch.equal(got.agreement, want.agreement)
    assert got.student_entropy.isnan()
    counts = (torch.arange(N) > 2).float()
    want = kdfast.distill_loss(z.double(), t.double(), y, weights=counts, return_metrics=True, backend="reference")
    close("dropped", distributed.distill_loss(z[:, mine], t[:, mine], y, weights=counts, **options), want)


def check_heads(rank, world):
    generator = torch.Generator().manual_seed(11)
    _, t, y = drawn(5)
    mine = slice(*cuts_of(V, world, uneven=False)[rank : rank + 2])
    hidden, weight = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    for teacher_of in (
        lambda t: t,
        lambda t: kdfast.soft_targets(t, k=9, temperatures=(2.0,)),
        lambda t: [t, t.flip(1)],
    ):
        teacher = teacher_of(t)
        for reduction in ("mean", "none"):
            options = {"temperature": 2.0, "return_metrics": True, "reduction": reduction, "z_loss": 1e-3}
            head = LMHead(hidden.double(), weight.double(), softcap=6.0)
            want = kdfast.distill_loss(head, exact(teacher), y, backend="reference", **options)
            for budget in (None, 4 * V * 3):
                got = distributed.distill_loss(
                    LMHead(hidden.clone().requires_grad_(), weight[mine], softcap=6.0),
                    of_columns(teacher, mine),
                    y,
                    vocab_group=dist.group.WORLD,
                    memory_budget=budget,
                    backend=KERNEL,
                    **options,
                )
                close(f"head, {reduction}, {budget}", got, want)


def check_tokens(rank, world):
    """Means over the tokens of all ranks, of which one may have none that counts."""
    z, t, y = drawn(6)
    y[: N // world] = -100
    alpha = torch.full((N,), 0.5)
    alpha[-1] = 1.0
    mine = slice(N // world * rank, N // world * (rank + 1))
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}):
        want = kdfast.distill_loss(z, t, y, alpha=alpha, return_metrics=True, **options).metrics
        got = distributed.distill_loss(
            z[mine],
            t[mine],
            y[mine],
            alpha=alpha[mine],
            token_group=dist.group.WORLD,
            return_metrics=True,
            **options,
        ).metrics
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


CHECKS = (check_vocabulary, check_rows_without_a_largest_logit, check_heads, check_tokens)


@pytest.mark.drawn
@pytest.mark.parametrize("world", [2] if INTERPRETING else [2, 4])
def test_ranks_agree_with_one(world, tmp_path):
    run(CHECKS, world, tmp_path)
