"""A Distiller on two processes, against one."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import ranks
import torch
from machine import ONCE
from small_models import F_IN, C, H, Hint, batch, close, mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdfast
from kdfast.methods import KD, CrossEntropy

pytestmark = ONCE


class Around(nn.Module):
    """A module that holds student and Distiller, inside whose forward pass they run."""

    def __init__(self, student, d):
        super().__init__()
        self.student, self.d = student, [d]

    def forward(self, x, y):
        return self.d[0]((x, y))


#: Wrappers of a student.
WRAPPED = {
    "ddp": DistributedDataParallel,
    "fsdp": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),))),
    "outer ddp": lambda model: model,
    "outer ddp, named": lambda model: model,
}


def wrapped_equals_one(rank, world, wrapper, accumulate):
    """Projector and student get the gradient of the whole batch, and start out equal on all ranks."""
    torch.manual_seed(100)
    data = [(torch.randn(8, F_IN), torch.randint(C, (8,))) for _ in range(4)]
    teacher = mlp(2 * H, seed=1)

    def train(student, d, parts, call):
        optimizer = torch.optim.SGD([*student.parameters(), *d.parameters()], lr=0.1)
        for step in range(2):
            for k in range(2):
                x, y = data[2 * step + k]
                inner = getattr(call, "student", call)
                outermost = call if isinstance(call, DistributedDataParallel) else inner
                waits = k == 0 and accumulate and isinstance(outermost, DistributedDataParallel)
                with outermost.no_sync() if waits else contextlib.nullcontext():
                    loss, _ = call(x[parts], y[parts])
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = mlp()
    with kdfast.Distiller(whole, teacher, [KD(), Hint("0", "0")]) as d:
        d.prepare(data[0])
        torch.manual_seed(7)
        nn.init.normal_(d.losses["hint"].projector.weight)
        begin = copy.deepcopy(d.state_dict())
        train(whole, d, slice(None), Around(whole, d))
        want = [p.detach().clone() for p in (*whole.parameters(), *d.parameters())]
    student = WRAPPED[wrapper](mlp())
    options = {"process_group": torch.distributed.group.WORLD} if wrapper == "outer ddp, named" else {}
    with kdfast.Distiller(student, teacher, [KD(), Hint("0", "0")], **options) as d:
        torch.manual_seed(rank)  # a projector of its own on each rank, but for the broadcast
        d.prepare(data[0])
        call = Around(student, d)
        if wrapper.startswith("outer"):
            call = DistributedDataParallel(call)
        if wrapper == "outer ddp":  # seen in its forward pass
            torch.manual_seed(rank)
            nn.init.normal_(d.losses["hint"].projector.weight)
            with torch.no_grad():
                call(*data[0])
        firsts = [torch.empty_like(d.losses["hint"].projector.weight) for _ in range(world)]
        torch.distributed.all_gather(firsts, d.losses["hint"].projector.weight.detach())
        assert torch.equal(firsts[0], firsts[1]), wrapper
        d.load_state_dict(begin)
        train(student, d, slice(rank, None, world), call)
        got = []
        if wrapper == "fsdp":
            with FullyShardedDataParallel.summon_full_params(student):
                got = [p.detach().clone() for p in student.parameters()]
        else:
            got = [p.full_tensor() if wrapper == "fsdp2" else p for p in student.parameters()]
        close([p.detach() for p in (*got, *d.parameters())], want, msg=lambda m: f"{wrapper}: {m}")


def test_two_processes_equal_one(tmp_path):
    checks = [functools.partial(wrapped_equals_one, wrapper=name, accumulate=False) for name in WRAPPED]
    for name in ("ddp", "outer ddp"):
        checks.append(functools.partial(wrapped_equals_one, wrapper=name, accumulate=True))
    ranks.run(checks, 2, tmp_path)


def unused_is_named(rank, world):
    student, teacher = DistributedDataParallel(mlp()), mlp(2 * H, seed=1)
    data = batch()
    with kdfast.Distiller(student, teacher, [Hint("0", "0")]) as d:
        d.prepare(data)
        d(data)[0].backward()
        with pytest.raises(RuntimeError, match=r"no loss reaches some .* CrossEntropy\(weight=0.0\)"):
            d(data)
    student = DistributedDataParallel(mlp())
    with kdfast.Distiller(student, teacher, [Hint("0", "0"), CrossEntropy(weight=0.0)]) as d:
        d.prepare(data)
        for _ in range(2):
            d(data)[0].backward()


def test_parameters_that_no_loss_reaches(tmp_path):
    ranks.run([unused_is_named], 2, tmp_path)
