"""LMHead where FSDP2 shards its weight, over gloo processes: the two places in which the parameters are whole."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from machine import ONCE_ON_THE_CPU
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from kdfast import LMHead, distill_loss

pytestmark = ONCE_ON_THE_CPU

N, H, V = 8, 12, 90


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V)

    def forward(self, x, teacher, labels):
        return self.distill(x, teacher, labels)

    def distill(self, x, teacher, labels):
        head = LMHead(torch.tanh(self.body(x)), self.head.weight, self.head.bias)
        return distill_loss(head, teacher, labels, temperature=2.0, memory_budget=3 * V * 4)


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    x, teacher = torch.randn(N, H, generator=generator), torch.randn(N, V, generator=generator)
    return x, teacher, torch.randint(V, (N,), generator=generator)


def student():
    torch.manual_seed(7)
    return Student()


def check(rank, world, method):
    whole, sharded = student(), student()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    register_fsdp_forward_method(sharded, "distill")
    loss = getattr(sharded, method)(*batch(rank))
    loss.backward()
    mean = sum(whole(*batch(r)) for r in range(world)) / world  # FSDP averages gradients, as DDP does
    mean.backward()
    torch.testing.assert_close(loss.detach(), whole(*batch(rank)).detach(), rtol=1e-6, atol=1e-6)
    for (name, a), b in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad.full_tensor(), b.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    with pytest.raises(TypeError, match=r"LMHead.weight is a DTensor.*forward"):
        distill_loss(LMHead(torch.zeros(N, H), sharded.head.weight), labels=torch.zeros(N, dtype=torch.int64))


@pytest.mark.parametrize("method", ["__call__", "distill"])
def test_a_sharded_weight(tmp_path, method):
    ranks.run([functools.partial(check, method=method)], 2, tmp_path)
