"""A student that Accelerate prepared, in a bare loop."""

from __future__ import annotations

import functools
import types

import pytest
import ranks
import torch
from machine import ONCE_ON_THE_CPU

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")


from tiny_llama import V, by_hand, model_of

from kdfast import Distiller
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD

pytestmark = ONCE_ON_THE_CPU


def accelerated_equals_one(rank, world, kind, precision):
    import accelerate

    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(V, (2 * world, 8), generator=generator) for _ in range(2)]
    whole, teacher = model_of(0), model_of(1).eval()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    want = []
    for ids in batches:
        optimizer.zero_grad()
        loss = by_hand(whole, teacher, ids)
        loss.backward()
        optimizer.step()
        want.append(loss.detach())
    plugin = None
    if kind == "fsdp2":
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    if plugin is not None:  # which Accelerate leaves out on a CPU, though its preparation is the same
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if precision != "no":
            plugin.set_mixed_precision(precision)
    student = model_of(0)
    prepared, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1))
    assert any(hasattr(p, "device_mesh") for p in prepared.parameters()) == (kind == "fsdp2")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "no" else {"rtol": 2e-2, "atol": 1e-2}
    with Distiller(prepared, teacher, [KD(temperature=2.0, alpha=0.6)], causal=True, head=head_of(prepared)) as d:
        for ids, value in zip(batches, want, strict=True):
            part = ids[rank::world]
            loss, _ = d({"input_ids": part, "labels": part})
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(total / world, value, **tolerance)


def test_prepared_models(tmp_path):
    cases = [("ddp", "no"), ("ddp", "bf16"), ("fsdp2", "no"), ("fsdp2", "bf16")]
    ranks.run([functools.partial(accelerated_equals_one, kind=k, precision=p) for k, p in cases], 2, tmp_path)


def test_teachers_that_are_dispatched_or_offloaded():
    """Accelerate's hooks stand in the place of forward passes; offloaded weights are there during a pass alone."""
    import accelerate

    ids = torch.randint(V, (3, 8))
    batch = {"input_ids": ids, "labels": ids}
    want = by_hand(model_of(0), model_of(1), ids)
    heads = {"head": head_of(student := model_of(0))}
    cpu = torch.device("cpu")
    dispatched = accelerate.dispatch_model(model_of(1), {"": "cpu"}, main_device="cpu", force_hooks=True)
    offloaded = accelerate.cpu_offload(model_of(1), cpu)
    for teacher, more in ((dispatched, {"teacher_head": head_of(dispatched)}), (dispatched, {}), (offloaded, {})):
        with Distiller(student, teacher, [KD(temperature=2.0, alpha=0.6)], causal=True, **heads, **more) as d:
            torch.testing.assert_close(d(batch)[0], want, rtol=1e-5, atol=1e-6)
    teacher_head = head_of(offloaded)
    with (
        Distiller(student, offloaded, [KD()], causal=True, **heads, teacher_head=teacher_head) as d,
        pytest.raises(ValueError, match="output projection's weight is offloaded between passes: give no teacher_head"),
    ):
        d(batch)
    student = accelerate.dispatch_model(model_of(0), {"": "cpu"}, main_device="cpu", force_hooks=True)
    with Distiller(student, model_of(1), [KD(temperature=2.0, alpha=0.6)], causal=True, head=head_of(student)) as d:
        loss, _ = d(batch)
        loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cp", "sp"])
def test_sequences_that_are_cut_over_ranks(monkeypatch, kind):
    import accelerate

    config = types.SimpleNamespace(**{f"{kind}_enabled": True})
    monkeypatch.setitem(accelerate.state.AcceleratorState._shared_state, "parallelism_config", config)
    with pytest.raises(
        ValueError, match=rf"causal=True under .* parallelism \({kind}_size > 1\): .* shift labels before"
    ):
        Distiller(model_of(0), model_of(1), [KD()], causal=True).__enter__()
    with Distiller(model_of(0), model_of(1), [KD()]):
        pass
