"""Heads and the losses' own parameters under DeepSpeed's engine, where it is installed."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from machine import ONCE_ON_THE_CPU

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")


from tiny_llama import V, by_hand, model_of
from trainers import Ordered, arguments, close, collate, rows, steps_by_hand

from kdfast import Distiller
from kdfast.integrations.huggingface import head_of
from kdfast.methods import KD, FitNet

pytestmark = ONCE_ON_THE_CPU


def engine_of(model, stage):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def zero_equals_one(rank, world, stage, tied):
    """Two steps of the whole batch on one process."""
    import deepspeed

    generator = torch.Generator().manual_seed(5)
    batches = [torch.randint(V, (2 * world, 8), generator=generator) for _ in range(2)]
    whole, teacher = model_of(0, tie_word_embeddings=tied), model_of(1, tie_word_embeddings=tied).eval()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    want = []
    for ids in batches:
        optimizer.zero_grad()
        loss = by_hand(whole, teacher, ids)
        loss.backward()
        optimizer.step()
        want.append(loss.detach())
    model, theirs = model_of(0, tie_word_embeddings=tied), model_of(1, tie_word_embeddings=tied)
    head, teacher_head = head_of(model), head_of(theirs)
    engine, teacher = engine_of(model, stage), engine_of(theirs, stage)
    losses = [KD(temperature=2.0, alpha=0.6), FitNet("model.layers.*", "model.layers.*", weight=0.0)]
    with Distiller(engine, teacher, losses, causal=True, head=head, teacher_head=teacher_head) as d:
        torch.manual_seed(rank)
        d.prepare({"input_ids": batches[0][rank::world]})
        mine = torch.cat([p.detach().flatten() for p in d.parameters()])
        others = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(others, mine)
        assert torch.equal(others[0], others[1])
        for ids, value in zip(batches, want, strict=True):
            part = ids[rank::world]
            loss, _ = d({"input_ids": part, "labels": part})
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(total / world, value, rtol=1e-4, atol=1e-5)
    with deepspeed.zero.GatheredParameters(list(model.parameters())) if stage == 3 else torch.no_grad():
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(tmp_path, monkeypatch, stage, tied):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    ranks.run([functools.partial(zero_equals_one, stage=stage, tied=tied)], 2, tmp_path)


def trainer_equals_one(rank, world, folder, stage):
    import deepspeed

    data, teacher = rows(), model_of(1).eval()
    whole, student = model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 8)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    given = arguments(folder, deepspeed=config)
    trainer = Ordered(student, given, train_dataset=data, data_collator=collate, teacher=teacher)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    with deepspeed.zero.GatheredParameters(list(student.parameters())) if stage == 3 else torch.no_grad():
        close(student, whole)


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer(tmp_path, monkeypatch, stage):
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    ranks.run([functools.partial(trainer_equals_one, folder=str(tmp_path), stage=stage)], 2, tmp_path)
