"""Distillation inside transformers' trainers, against the same steps by hand."""

from __future__ import annotations

import functools
import os

import pytest
import ranks
import torch
import torch.nn.functional as F
from machine import DEVICE, INTERPRETING, VARIANTS
from torch import nn

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers
from tiny_llama import V, model_of

import kdfast
from kdfast import cache
from kdfast.integrations.trainer import DistillTrainer
from kdfast.methods import KD, CrossEntropy, FitNet

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(DEVICE != "cpu", reason="several processes and one GPU"),
    pytest.mark.skipif(INTERPRETING, reason="the kernels' backend makes no difference to a trainer"),
    pytest.mark.filterwarnings("ignore"),  # of transformers
]

LR, CLIP = 0.05, 1.0


def rows(n=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    ids = [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": one, "labels": [-100, *one[1:]], "attention_mask": [1] * len(one)} for one in ids]


def collate(features):
    longest = max(len(f["input_ids"]) for f in features)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: torch.tensor([f[k] + [v] * (longest - len(f[k])) for f in features]) for k, v in fill.items()}


def arguments(folder, **options):
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LR,
        "max_grad_norm": CLIP,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "data_seed": 1,
        "seed": 1,
        **options,
    }
    return transformers.TrainingArguments(**given)


class InOrder:
    """The trainer's data in the order of the list."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ordered(InOrder, DistillTrainer):
    pass


def objective(student, teacher, batch, items, extra=None):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    z, t = student(**inputs).logits[:, :-1], teacher(**inputs).logits[:, :-1].detach()
    y = batch["labels"][:, 1:]
    kept = y != -100
    p, q = F.log_softmax(z, -1), F.log_softmax(t, -1)
    each = 0.5 * (q.exp() * (q - p)).sum(-1) + 0.5 * F.cross_entropy(z.transpose(1, 2), y, reduction="none", ignore_index=-100)
    return (each * kept).sum() / items


def steps_by_hand(student, teacher, data, per_step):
    """Each step over so many rows, however they are cut into micro-batches and ranks."""
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR)
    losses = []
    for first in range(0, len(data), per_step):
        part = data[first : first + per_step]
        items = sum((torch.tensor(r["labels"][1:]) != -100).sum() for r in part)
        optimizer.zero_grad()
        loss = objective(student, teacher, collate(part), items)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def close(student, other):
    for (name, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("head", [None, False])
def test_steps_are_those_by_hand(tmp_path, head):
    data, teacher = rows(), model_of(1)
    whole, student = model_of(0), model_of(0)
    want = steps_by_hand(whole, teacher, data, 4)
    trainer = Ordered(
        student, arguments(tmp_path), train_dataset=data, data_collator=collate, teacher=teacher.train(), head=head
    )
    trainer.train()
    close(student, whole)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, value in zip(logged, want, strict=True):
        assert entry["loss"] == pytest.approx(value, rel=1e-3)
        assert {"kd", "kd.soft", "kd.hard", "entropy", "mean_token_accuracy", "num_tokens"} <= entry.keys()
    found = trainer.evaluate(data)
    assert {"eval_loss", "eval_kd.soft", "eval_entropy", "eval_mean_token_accuracy"} <= found.keys()


def test_parameters_of_the_losses(tmp_path):
    """A projector is zeroed, clipped and stepped as the student is; FitNet's gradients do not grow."""
    data, teacher = rows(), model_of(1).eval()
    student, whole = model_of(0), model_of(0)
    losses = [KD(temperature=1.0, alpha=0.5), FitNet("model.layers.*", "model.layers.*", weight=0.3)]
    trainer = Ordered(student, arguments(tmp_path), train_dataset=data, data_collator=collate, teacher=teacher, losses=losses)
    trainer.train()
    again = [KD(temperature=1.0, alpha=0.5), FitNet("model.layers.*", "model.layers.*", weight=0.3)]
    with kdfast.Distiller(whole, teacher, again, causal=True) as d:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            d.prepare(collate(data[:2]))
        optimizers = [torch.optim.SGD(p, lr=LR) for p in (list(whole.parameters()), list(d.parameters()))]
        for first in range(0, len(data), 4):
            items = sum((torch.tensor(r["labels"][1:]) != -100).sum() for r in data[first : first + 4])
            for micro in (first, first + 2):
                d(collate(data[micro : micro + 2]), num_items=items)[0].backward()
            for optimizer in optimizers:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
                optimizer.step()
                optimizer.zero_grad()
        close(student, whole)
        for a, b in zip(trainer.distiller.parameters(), d.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6)


def test_a_run_that_is_resumed_is_the_uninterrupted_one(tmp_path):
    data, teacher = rows(16), model_of(1).eval()

    def trainer(student, folder, **options):
        losses = [KD(temperature=1.0, alpha=0.5), FitNet("model.layers.*", "model.layers.*", weight=0.3)]
        given = arguments(folder, optim="adamw_torch", save_strategy="steps", save_steps=2, **options)
        return DistillTrainer(student, given, train_dataset=data, data_collator=collate, teacher=teacher, losses=losses)

    whole = model_of(0, attention_dropout=0.1)
    uninterrupted = trainer(whole, tmp_path / "whole")
    uninterrupted.train()
    first = trainer(model_of(0, attention_dropout=0.1), tmp_path / "parts", max_steps=2)
    first.train()
    student = model_of(5, attention_dropout=0.1)
    second = trainer(student, tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for a, b in zip(student.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(second.distiller.parameters(), uninterrupted.distiller.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.distiller.number == uninterrupted.distiller.number == 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_cache_s_columns(tmp_path, side):
    data, teacher = rows(), model_of(1).eval()
    with torch.no_grad(), cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        for i, row in enumerate(data):
            ids = torch.tensor(row["input_ids"])
            writer.write(i, kdfast.soft_targets(teacher(input_ids=ids[None]).logits[0], k=V), ids)
    stored = cache.Dataset(cache.Reader(tmp_path / "c"), data, key=None)

    def on_a_side(features):
        found = collate(features)
        if side == "left":
            for i, f in enumerate(features):
                shift = found["input_ids"].shape[1] - len(f["input_ids"])
                found = {k: v.clone() for k, v in found.items()}
                for k in found:
                    found[k][i] = found[k][i].roll(shift)
        return found

    whole, student = model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 4)
    Ordered(student, arguments(tmp_path), train_dataset=stored, data_collator=on_a_side).train()
    for (name, a), b in zip(student.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=2e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def ranks_equal_one(rank, world, folder, average):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    data, teacher = rows(), model_of(1).eval()
    whole, student = model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 8)
    given = arguments(folder, average_tokens_across_devices=average)
    Ordered(student, given, train_dataset=data, data_collator=collate, teacher=teacher).train()
    close(student, whole)


def test_two_processes_equal_one(tmp_path):
    checks = [functools.partial(ranks_equal_one, folder=str(tmp_path), average=average) for average in (True, False)]
    ranks.run(checks, 2, tmp_path)
