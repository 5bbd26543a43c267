"""A student whose logits are never made, on two processes, in every wrapper, against one process."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
import torch._dynamo.testing
from machine import ONCE
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="the hf extra is not installed")

from tiny_models import batch_of, by_hand, model_of

from kdfast import Distiller
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers


def fsdp2(model, **options):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return model, mesh


def in_groups(model):
    """As Accelerate prepares one: the last group is that of the norm and the head."""
    model, mesh = fsdp2(model)
    fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def head_apart(model):
    model, mesh = fsdp2(model)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def at_the_root(model):
    model, mesh = fsdp2(model)
    fully_shard(model, mesh=mesh)
    return model


def compiled_ddp(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


def fsdp1(model):
    layer = type(model.model.layers[0])
    policy = functools.partial(torch.distributed.fsdp.wrap.transformer_auto_wrap_policy, transformer_layer_cls={layer})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp, compiled": compiled_ddp,
    "ddp, unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fsdp": fsdp1,
    "fsdp2": at_the_root,
    "fsdp2, head apart": head_apart,
    "fsdp2, accelerate": in_groups,
}


def wrapped_equals_one(rank, world, wrapper, name, sharded_teacher):
    """Two steps of the whole batch on one process; and evaluation between them."""
    batches = [batch_of(name, rows=2 * world, seed=k) for k in range(2)]
    parts = [{k: v[rank::world] for k, v in one.items()} for one in batches]
    whole, teacher = model_of(name), model_of(name, seed=1).eval()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    want = []
    for one in batches:
        optimizer.zero_grad()
        loss = by_hand(whole, teacher, one, True)
        loss.backward()
        optimizer.step()
        want.append(loss.detach())
    model = model_of(name)
    head = head_of(model)
    wrapped = WRAPPERS[wrapper](model)
    if sharded_teacher:
        theirs = model_of(name, seed=1)
        teacher_head = head_of(theirs)
        teacher = WRAPPERS[wrapper](theirs)
    else:
        teacher_head = None
    losses = [KD(temperature=2.0, alpha=0.6)]
    with Distiller(wrapped, teacher, losses, causal=True, head=head, teacher_head=teacher_head) as d:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for one, all_of_it, value in zip(parts, batches, want, strict=True):
            y, mask = all_of_it["labels"][:, 1:], all_of_it["attention_mask"][:, :-1]
            items = ((y != -100) & mask.bool()).sum() / world
            loss, _ = d(one, num_items=items)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(
                total.double() / world, value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{wrapper}: {m}"
            )
            with torch.no_grad():
                d(one)
    if wrapper == "fsdp":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            got = {n: p.detach().clone() for n, p in model.named_parameters()}
    else:
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        got = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    for (n, p), (_, q) in zip(got.items(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{wrapper} {n}: {m}"
        )


def refused_on_all_ranks(rank, world):
    """One rank's logits are others: every rank says so, and none waits."""
    model, teacher = model_of("llama"), model_of("llama", seed=1)
    head = head_of(model)
    if rank == 1:
        head.scale = 2.0
    wrapped = DistributedDataParallel(model)
    said = "times as large" if rank == 1 else "on another rank"
    with (
        Distiller(wrapped, teacher, [KD()], causal=True, head=head) as d,
        pytest.raises(ValueError, match=said),
    ):
        d(batch_of("llama"))


def test_wrappers(tmp_path):
    checks = [
        functools.partial(wrapped_equals_one, wrapper=wrapper, name="llama", sharded_teacher=False)
        for wrapper in WRAPPERS
    ]
    checks += [
        functools.partial(wrapped_equals_one, wrapper=wrapper, name=name, sharded_teacher=True)
        for wrapper, name in (("fsdp2", "gemma2"), ("fsdp2, accelerate", "llama"), ("ddp", "gemma2"))
    ]
    ranks.run([*checks, refused_on_all_ranks], 2, tmp_path)
