"""Distillation inside transformers' trainers, against the same steps by hand."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from machine import ONCE_ON_THE_CPU

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

import accelerate
import tokenizers
import transformers
from tiny_llama import model_of
from trainers import CLIP, LR, Ordered, arguments, causal, close, collate, filled, rows, steps_by_hand

import kdfast
from kdfast import cache
from kdfast.integrations.trainer import DistillTrainer
from kdfast.methods import KD, FitNet, LearnedTemperature, Linear

pytestmark = [*ONCE_ON_THE_CPU, pytest.mark.filterwarnings("ignore")]  # of transformers


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
    trainer = Ordered(
        student, arguments(tmp_path), train_dataset=data, data_collator=collate, teacher=teacher, losses=losses
    )
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
    logs = [[e["num_tokens"] for e in t.state.log_history if "num_tokens" in e] for t in (second, uninterrupted)]
    assert logs[0] == logs[1]


def test_a_schedule_goes_by_the_trainer_s_steps(tmp_path):
    """The short last step of an epoch counts, and a second run begins at 0."""
    seen = []

    def step_of(number):
        seen.append(number)
        return 0.5

    args = {"train_dataset": rows(10), "data_collator": collate, "teacher": model_of(1)}
    given = arguments(tmp_path, num_train_epochs=2)
    trainer = Ordered(model_of(0), given, losses=[KD(alpha=step_of)], **args)
    for _ in range(2):
        seen.clear()
        trainer.train()
        assert [*dict.fromkeys(seen)] == list(range(trainer.state.global_step)) == list(range(6))


class Stop(transformers.TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_run_after_one_that_was_broken_off(tmp_path):
    def run(*, broken):
        student = model_of(0)
        losses = [KD(temperature=1.0, alpha=0.5), FitNet("model.layers.*", "model.layers.*", weight=0.3)]
        args = {"train_dataset": rows(), "data_collator": collate, "teacher": model_of(1), "losses": losses}
        trainer = Ordered(student, arguments(tmp_path), **args)
        if broken:
            stop = Stop()
            trainer.add_callback(stop)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert not trainer.distiller.entered
            trainer.remove_callback(stop)
            student.zero_grad()  # the model's own are the caller's
        trainer.train()
        return trainer

    broken, whole = run(broken=True), run(broken=False)
    close(broken.model, whole.model)
    for a, b in zip(broken.distiller.parameters(), whole.distiller.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    first, want = (next(e for e in t.state.log_history if "kd.soft" in e) for t in (broken, whole))
    assert first["kd.soft"] == pytest.approx(want["kd.soft"], rel=1e-5)


def test_the_best_model_s_own_parameters(tmp_path):
    losses = [KD(temperature=1.0, alpha=0.5), FitNet("model.layers.*", "model.layers.*")]
    ways = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_fitnet", "greater_is_better": True}
    trainer = Ordered(
        model_of(0),
        arguments(tmp_path, **ways, **best),
        train_dataset=rows(16),
        eval_dataset=rows(4),
        data_collator=collate,
        teacher=model_of(1),
        losses=losses,
    )
    trainer.train()
    assert trainer.evaluate()["eval_fitnet"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def ids_of(data):
    return [row["input_ids"] for row in data]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_cache_s_columns(tmp_path, side):
    data, teacher = rows(), model_of(1).eval()
    stored = cache.Dataset(filled(tmp_path / "c", teacher, enumerate(ids_of(data))), data, key=None)

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
    close(student, whole, rtol=2e-3, atol=1e-4)  # stored in 16 bits


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"bf16": True},
        {"gradient_accumulation_steps": 3},  # the epoch's last step has fewer
        {"average_tokens_across_devices": False},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("head", [None, False])
def test_ways_of_the_trainer(tmp_path, monkeypatch, options, head):
    # Which some versions of TrainingArguments set, for all that comes after.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if "bf16" in options else "no")
    data, teacher, student, whole = rows(), model_of(1), model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 2 * options.get("gradient_accumulation_steps", 2))
    given = arguments(tmp_path, **options)
    Ordered(student, given, train_dataset=data, data_collator=collate, teacher=teacher, head=head).train()
    close(student, whole, **({"rtol": 2e-2, "atol": 2e-2} if "bf16" in options else {}))


def test_gradients_that_a_scaler_has_scaled(tmp_path):
    """As those of fp16: the losses' own are unscaled before they are clipped, by the scale of the student's."""

    def run(scaler):
        data, student, projector = rows(), model_of(0), FitNet("model.layers.*", "model.layers.*", weight=0.3)
        losses = [KD(temperature=1.0, alpha=0.5), projector]
        given = arguments(tmp_path, gradient_accumulation_steps=1)
        trainer = Ordered(student, given, train_dataset=data, data_collator=collate, teacher=model_of(1), losses=losses)
        trainer.accelerator.scaler = scaler
        if scaler is not None:  # what Accelerate does before it clips in fp16, which it refuses on a CPU
            trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
        trainer.train()
        return [*student.parameters(), *projector.parameters()]

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for a, b in zip(run(scaler), run(None), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6)
    assert scaler.get_scale() == 256.0


def test_a_schedule_s_step_and_a_temperature_are_resumed(tmp_path):
    """Of losses whose parameters need no batch; a rank that has no state of its own says so."""

    def trainer(folder, **options):
        losses = [KD(temperature=LearnedTemperature(2.0), alpha=Linear(0.9, 0.1, steps=4))]
        given = arguments(folder, optim="adamw_torch", save_strategy="steps", save_steps=2, **options)
        return Ordered(
            model_of(0), given, train_dataset=rows(16), data_collator=collate, teacher=model_of(1), losses=losses
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "parts", max_steps=2).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    (a,), (b,) = resumed.distiller.parameters(), whole.distiller.parameters()
    assert torch.equal(a, b)
    assert a.item() != pytest.approx(2.0)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    (checkpoint / "distiller-0.pt").unlink()
    with pytest.warns(UserWarning, match=r"distiller-0.pt is not there.*they begin anew"):
        trainer(tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))


def test_a_reader_and_weights_of_tokens(tmp_path):
    """Columns of the data set that neither model nor collator know."""
    data, teacher = rows(), model_of(1).eval()
    reader = filled(tmp_path / "c", teacher, [(f"s{i}", ids) for i, ids in enumerate(ids_of(data))])
    generator = torch.Generator().manual_seed(2)
    for i, row in enumerate(data):  # so small that a step's sum is below 1
        row |= {"id": f"s{i}", "weights": (0.01 * torch.rand(len(row["input_ids"]), generator=generator)).tolist()}

    def weighted(student, teacher, batch):
        total = items = 0
        for ids, w in batch:
            x = torch.tensor([ids])
            part = {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x}
            one, _ = causal(student, teacher, part, torch.tensor([w[1:]]))
            total, items = total + one, items + sum(w[1:])
        return total, items

    whole, student = model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 4, weighted, lambda part: [(r["input_ids"], r["weights"]) for r in part])
    args = {"train_dataset": data, "data_collator": collate, "teacher": reader}
    Ordered(student, arguments(tmp_path), **args).train()
    close(student, whole, rtol=2e-3, atol=1e-4)
    data[3]["weights"].append(1.0)
    with pytest.raises(ValueError, match=r"weights has \d+ values of a sample with \d+ tokens"):
        Ordered(student, arguments(tmp_path), **args).train()


@pytest.mark.parametrize("collator", ["transformers", "cache"])
def test_a_cache_s_columns_under_collators_that_people_have(tmp_path, collator):
    """One that returns a BatchEncoding, which moves what is in it; and the cache's own."""
    data, teacher = rows(), model_of(1).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
    )
    made = {"transformers": transformers.DataCollatorForSeq2Seq(tokenizer), "cache": cache.collate}
    stored = cache.Dataset(filled(tmp_path / "c", teacher, enumerate(ids_of(data))), data, key=None)
    whole, student = model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 4)
    given = arguments(tmp_path)
    Ordered(student, given, train_dataset=stored, data_collator=made[collator]).train()
    close(student, whole, rtol=2e-3, atol=1e-4)


def test_no_labels_says_so(tmp_path):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows(4)]
    args = {"train_dataset": data, "data_collator": collate, "teacher": model_of(1)}
    with pytest.warns(UserWarning, match="batches have no labels: of kd the teacher's term is left"):
        DistillTrainer(model_of(0), arguments(tmp_path), **args).train()


def ranks_equal_one(rank, world, folder, average, sharded=False):
    data, teacher = rows(), model_of(1).eval()
    whole, student = model_of(0), model_of(0)
    steps_by_hand(whole, teacher, data, 8)
    given = arguments(folder, average_tokens_across_devices=average)
    trainer = Ordered(student, given, train_dataset=data, data_collator=collate, teacher=teacher)
    if sharded:  # which Accelerate leaves out on a CPU, though its preparation is the same
        trainer.accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        trainer.accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        trainer.is_fsdp_enabled = True
    trainer.train()
    if sharded:
        assert all(hasattr(p, "device_mesh") for p in student.parameters())
        for (name, a), b in zip(student.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    else:
        close(student, whole)


def test_two_processes_equal_one(tmp_path):
    cases = [{"average": True}, {"average": False}, {"average": True, "sharded": True}]
    ranks.run([functools.partial(ranks_equal_one, folder=str(tmp_path), **case) for case in cases], 2, tmp_path)
