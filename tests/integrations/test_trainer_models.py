"""DistillTrainer with models that are no causal language model, in evaluation, and where it refuses."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from machine import DEVICE, INTERPRETING, VARIANTS
from torch import nn

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers
from tiny_llama import V, model_of
from trainers import InOrder, Ordered, arguments, causal, close, collate, options, rows, steps_by_hand, sum_of

from kdfast.integrations.trainer import DistillTrainer, DistillTrainerMixin
from kdfast.methods import KD, CrossEntropy, FitNet

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(DEVICE != "cpu", reason="several processes and one GPU"),
    pytest.mark.skipif(INTERPRETING, reason="the kernels' backend makes no difference to a trainer"),
    pytest.mark.filterwarnings("ignore"),  # of transformers
]


def t5(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    return model


def texts_and_targets(n=8):
    generator = torch.Generator().manual_seed(5)

    def some():
        return torch.randint(3, V, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator).tolist()

    sources, targets = [some() for _ in range(n)], [some() for _ in range(n)]
    return [
        {"input_ids": x, "attention_mask": [1] * len(x), "labels": y} for x, y in zip(sources, targets, strict=True)
    ]


def two_sided(features):
    batch = collate([{k: f[k] for k in ("input_ids", "attention_mask")} for f in features])
    longest = max(len(f["labels"]) for f in features)
    return {**batch, "labels": torch.tensor([f["labels"] + [-100] * (longest - len(f["labels"])) for f in features])}


def translated(student, teacher, batch):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    with torch.no_grad():
        t = teacher(**inputs).logits
    return sum_of(student(**inputs).logits, t, batch["labels"]), (batch["labels"] != -100).sum()


class Seq2Seq(InOrder, DistillTrainerMixin, transformers.Seq2SeqTrainer):
    pass


@pytest.mark.parametrize("head", [None, False])
def test_encoder_decoder(tmp_path, head):
    data, teacher, student, whole = texts_and_targets(), t5(1), t5(0), t5(0)
    want = steps_by_hand(whole, teacher, data, 4, translated, two_sided)
    given = transformers.Seq2SeqTrainingArguments(**options(tmp_path, predict_with_generate=True))
    trainer = Seq2Seq(student, given, train_dataset=data, data_collator=two_sided, teacher=teacher, head=head)
    trainer.train()
    close(student, whole)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(want, rel=1e-3)
    found = trainer.predict(data, max_length=5)
    assert found.predictions.shape[0] == len(data)
    with torch.no_grad():
        total, items = translated(student.eval(), teacher, two_sided(data))
    assert found.metrics["test_loss"] == pytest.approx((total / items).item(), rel=1e-4)


def vit(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5, num_channels=1)
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    return model


def images(n=8):
    torch.manual_seed(7)
    return [{"pixel_values": torch.randn(1, 8, 8), "labels": int(torch.randint(5, ()))} for _ in range(n)]


def stacked(features):
    return {k: torch.stack([torch.as_tensor(f[k]) for f in features]) for k in features[0]}


def classified(student, teacher, batch):
    with torch.no_grad():
        t = teacher(batch["pixel_values"]).logits
    return sum_of(student(batch["pixel_values"]).logits, t, batch["labels"]), len(batch["labels"])


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def test_images(tmp_path):
    data, teacher, student, whole = images(7), vit(1), vit(0), vit(0)
    steps_by_hand(whole, teacher, data, 4, classified, stacked)
    given = arguments(tmp_path, per_device_eval_batch_size=3)
    trainer = Ordered(
        student, given, train_dataset=data, data_collator=stacked, teacher=teacher, compute_metrics=accuracy
    )
    trainer.train()
    close(student, whole)
    found = trainer.evaluate(data)
    batch = stacked(data)
    with torch.no_grad():
        total, items = classified(student.eval(), teacher, batch)
        right = (student(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean()
    assert found["eval_accuracy"] == pytest.approx(right.item())
    assert found["eval_loss"] == pytest.approx((total / items).item(), rel=1e-4)
    assert "eval_kd.soft" in found


def test_metrics_of_a_head_see_the_logits(tmp_path):
    data, teacher, student = rows(5), model_of(1).eval(), model_of(0)
    seen = []

    def right(found):
        seen.append(torch.as_tensor(found.predictions))
        kept = found.label_ids[:, 1:] != -100
        return {"right": float((found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:])[kept].mean())}

    trainer = DistillTrainer(
        student, arguments(tmp_path), data_collator=collate, teacher=teacher, compute_metrics=right
    )
    assert trainer.distiller.head is not None
    found = trainer.evaluate(data)
    batch = collate(data)
    with torch.no_grad():
        logits = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total, items = causal(student, teacher, batch)
    torch.testing.assert_close(seen[0][batch["attention_mask"].bool()], logits[batch["attention_mask"].bool()])
    kept = batch["labels"][:, 1:] != -100
    want = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[kept].float().mean().item()
    assert found["eval_right"] == found["eval_mean_token_accuracy"] == pytest.approx(want)
    assert found["eval_loss"] == pytest.approx((total / items).item(), rel=1e-4)
    assert not trainer.distiller.entered


def test_evaluation_without_labels(tmp_path):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in rows(5)]
    teacher, student = model_of(1).eval(), model_of(0).eval()
    soft = [KD(temperature=1.0, alpha=1.0)]
    trainer = DistillTrainer(student, arguments(tmp_path), data_collator=collate, teacher=teacher, losses=soft)
    found = trainer.evaluate({"a": data, "b": data[:2]})
    for name, part in (("a", data), ("b", data[:2])):
        batch = collate(part)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            p, q = (model(**batch).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
        kept = labels[:, 1:] != -100
        want = ((q.exp() * (q - p)).sum(-1)[kept]).mean().item()
        assert found[f"eval_{name}_loss"] == pytest.approx(want, rel=1e-4)
        assert found[f"eval_{name}_kd.soft"] == pytest.approx(want, rel=1e-4)


def evaluates_each_sample_once(rank, world, folder):
    data, teacher, student = rows(5), model_of(1).eval(), model_of(0).eval()
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in data]
    given = arguments(folder, per_device_eval_batch_size=2)
    with torch.no_grad():
        total, items = causal(student, teacher, collate(data))
    trainer = DistillTrainer(student, given, data_collator=collate, teacher=teacher)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx((total / items).item(), rel=1e-4)
    soft = [KD(temperature=1.0, alpha=1.0)]
    trainer = DistillTrainer(student, given, data_collator=collate, teacher=teacher, losses=soft)
    one = trainer.evaluate(bare)["eval_loss"]
    with torch.no_grad():
        batch = collate(bare)
        p, q = (model(**batch).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
        kept = batch["attention_mask"][:, 1:] == 1
        assert one == pytest.approx(((q.exp() * (q - p)).sum(-1)[kept]).mean().item(), rel=1e-4)


def test_two_processes_evaluate_each_sample_once(tmp_path):
    ranks.run([functools.partial(evaluates_each_sample_once, folder=str(tmp_path))], 2, tmp_path)


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self, width):
        super().__init__()
        self.body, self.out = nn.Linear(16, width), nn.Linear(width, 5)

    def forward(self, pixel_values):
        return self.out(torch.relu(self.body(pixel_values.flatten(1))))


def test_a_module_of_the_user(tmp_path):
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(16), "labels": i % 5} for i in range(8)]
    student = Plain(4)
    before = [p.clone() for p in student.parameters()]
    given = arguments(tmp_path, remove_unused_columns=False)
    losses = [KD(), FitNet("body", "body")]
    trainer = DistillTrainer(student, given, train_dataset=data, data_collator=stacked, teacher=Plain(8), losses=losses)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert trainer.evaluate(data)["eval_loss"] > 0


def test_what_says_what_the_loss_is_is_refused(tmp_path):
    given = {"teacher": model_of(1), "train_dataset": rows(), "data_collator": collate}
    with pytest.raises(ValueError, match="label_smoothing_factor has no say here"):
        DistillTrainer(model_of(0), arguments(tmp_path, label_smoothing_factor=0.1), **given)
    with pytest.raises(ValueError, match="compute_loss_func has no say here"):
        DistillTrainer(model_of(0), arguments(tmp_path), compute_loss_func=lambda *a, **k: 0, **given)
    with pytest.raises(ValueError, match="model_init makes another student"):
        DistillTrainer(args=arguments(tmp_path), model_init=lambda: model_of(0), **given)
    student = model_of(0)
    with pytest.raises(ValueError, match="teacher is the student itself"):
        DistillTrainer(student, arguments(tmp_path), **{**given, "teacher": student})
    quantised = model_of(0)
    nn.utils.parametrize.register_parametrization(quantised.lm_head, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"output projection .*head=False takes the model's own logits"):
        DistillTrainer(quantised, arguments(tmp_path), **given)
    DistillTrainer(quantised, arguments(tmp_path), head=False, **given)


def test_no_teacher_is_plain_training(tmp_path):
    """The head's cross-entropy alone."""
    data, student, whole = rows(), model_of(0), model_of(0)
    args = {"train_dataset": data, "data_collator": collate}
    trainer = Ordered(student, arguments(tmp_path), losses=[CrossEntropy()], **args)
    trainer.train()
    InOrdered = type("InOrdered", (InOrder, transformers.Trainer), {})
    InOrdered(whole, arguments(tmp_path), **args).train()
    close(student, whole)
