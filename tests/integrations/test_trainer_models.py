"""DistillTrainer with models that are no causal language model, in evaluation, and where it refuses."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from machine import ONCE_ON_THE_CPU
from torch import nn

pytest.importorskip("accelerate", reason="Accelerate is not installed")
pytest.importorskip("datasets", reason="the hf extra is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

import datasets
import tiny_models
import transformers
from tiny_llama import V, model_of
from trainers import CLIP, LR, InOrder, Ordered, arguments, causal, close, collate, options, rows, steps_by_hand, sum_of

from kdfast.integrations.models import is_causal
from kdfast.integrations.trainer import DistillTrainer, DistillTrainerMixin
from kdfast.methods import KD, CrossEntropy, FitNet

pytestmark = [*ONCE_ON_THE_CPU, pytest.mark.filterwarnings("ignore")]  # of transformers


def t5(seed):
    torch.manual_seed(seed)
    model = tiny_models.t5(num_layers=1, pad_token_id=0)
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


def translated(student, teacher, batch, weights=1.0):
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    inputs["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    with torch.no_grad():
        t = teacher(**inputs).logits
    return sum_of(student(**inputs).logits, t, batch["labels"], weights), (batch["labels"] != -100).sum()


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


def test_generation_without_labels(tmp_path):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in texts_and_targets(3)]
    given = transformers.Seq2SeqTrainingArguments(**options(tmp_path, predict_with_generate=True))
    trainer = Seq2Seq(t5(0), given, data_collator=collate, teacher=t5(1))
    assert len(trainer.predict(data, max_length=5).predictions) == 3


def test_weights_of_targets(tmp_path):
    """Of an encoder-decoder model they are its labels', not its source's."""
    data, teacher, student = texts_and_targets(4), t5(1).eval(), t5(0).eval()
    for row in data:
        row["weights"] = torch.rand(len(row["labels"])).tolist()
    found = Seq2Seq(
        student, transformers.Seq2SeqTrainingArguments(**options(tmp_path)), data_collator=two_sided, teacher=teacher
    )
    got = found.evaluate(data)["eval_loss"]
    total = items = 0
    for row in data:
        one, _ = translated(student, teacher, two_sided([row]), torch.tensor([row["weights"]]))
        total, items = total + one.item(), items + sum(row["weights"])
    assert got == pytest.approx(total / items, rel=1e-4)


def bert(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=V, **sizes, num_labels=5, type_vocab_size=2)
    )
    with torch.no_grad():
        model.classifier.weight.mul_(30)
        model.bert.embeddings.token_type_embeddings.weight.mul_(100)
    return model.eval()


def test_what_the_teacher_takes_and_the_student_does_not(tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    student = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=V, **sizes, num_labels=5)
    ).eval()
    ids = torch.randint(3, V, (4, 6))
    types = (torch.arange(6) > 2).long()
    data = [{"input_ids": row, "token_type_ids": types, "labels": i} for i, row in enumerate(ids)]
    teacher = bert(1)
    trainer = DistillTrainer(student, arguments(tmp_path), teacher=teacher, data_collator=stacked)
    with torch.no_grad():
        t = teacher(input_ids=ids, token_type_ids=types.expand(4, 6)).logits
        want = sum_of(student(input_ids=ids).logits, t, torch.arange(4)) / 4
    assert trainer.evaluate(datasets.Dataset.from_list(data).with_format("torch"))["eval_loss"] == pytest.approx(
        want.item(), rel=1e-4
    )


def test_labels_of_another_name(tmp_path):
    data = [{"pixel_values": row["pixel_values"], "kind": row["labels"]} for row in images()]
    student, teacher = vit(0).eval(), vit(1).eval()
    given = arguments(tmp_path, label_names=["kind"], remove_unused_columns=False)
    trainer = Ordered(student, given, train_dataset=data, data_collator=stacked, teacher=teacher)
    found = trainer.evaluate(data)
    with torch.no_grad():
        total, items = classified(student, teacher, stacked(images()))
    assert found["eval_loss"] == pytest.approx((total / items).item(), rel=1e-4)
    trainer.train()


def test_tokens_without_a_hard_label_in_the_log(tmp_path):
    """Each term is a mean over what it is of, whatever the batches."""
    data, teacher, student = rows(5), model_of(1).eval(), model_of(0).eval()
    for row in data:
        row["labels"] = [-100, *(y if i % 3 else -1 for i, y in enumerate(row["labels"][1:]))]
    losses = [KD(temperature=1.0, alpha=0.5, return_metrics=True), CrossEntropy(weight=0.3)]
    found = []
    for size in (1, 4):
        given = arguments(tmp_path, per_device_eval_batch_size=size)
        found.append(
            DistillTrainer(
                student, given, data_collator=collate, teacher=teacher, losses=losses, unlabelled=-1
            ).evaluate(data)
        )
    for name in ("eval_loss", "eval_kd.soft", "eval_kd.hard", "eval_ce", "eval_mean_token_accuracy", "eval_entropy"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)
    batch = collate(data)
    with torch.no_grad():
        z = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    y = batch["labels"][:, 1:]
    kept = y >= 0
    want = torch.nn.functional.cross_entropy(z[kept], y[kept]).item()
    assert found[0]["eval_ce"] == pytest.approx(want, rel=1e-4)
    share = kept.sum() / (y != -100).sum()  # a token without a label has none of KD's hard term
    assert found[0]["eval_kd.hard"] == pytest.approx(want * share.item(), rel=1e-4)


def test_a_loss_of_the_user_sees_logits(tmp_path):
    def size(step):
        return step.student.logits.float().square().mean()

    student = model_of(0)
    losses = [KD(), (size, 0.1)]
    trainer = DistillTrainer(student, arguments(tmp_path), data_collator=collate, teacher=model_of(1), losses=losses)
    assert trainer.evaluate(rows(4))["eval_size"] > 0
    assert DistillTrainer(student, arguments(tmp_path), teacher=model_of(1), losses=losses, head=True).distiller.head


def test_columns_that_are_not_the_losses(tmp_path):
    data = [{**row, "id": f"page {i}"} for i, row in enumerate(rows())]
    given = {"data_collator": collate, "teacher": model_of(1)}
    assert DistillTrainer(model_of(0), arguments(tmp_path), **given).evaluate(data)["eval_loss"] > 0
    data = [{**row, "weights": "heavy"} for row in rows()]
    with pytest.raises(ValueError, match="the column 'weights' is the losses', and must hold numbers"):
        DistillTrainer(model_of(0), arguments(tmp_path), **given).evaluate(data)


@pytest.mark.parametrize(
    "kind", ["Qwen2AudioForConditionalGeneration", "LlamaForCausalLM", "LlavaForConditionalGeneration"]
)
def test_models_that_predict_the_next_token(kind):
    with torch.device("meta"):
        model = getattr(transformers, kind)
        assert is_causal(model(model.config_class()))


def test_models_that_do_not():
    assert not any(is_causal(model) for model in (t5(0), vit(0), bert(0), Plain(3)))


@pytest.mark.parametrize("kind", ["whisper", "llava"])
@pytest.mark.parametrize("head", [None, False])
def test_models_of_sounds_and_images(tmp_path, kind, head):
    batch = tiny_models.batch_of(kind, rows=4)
    data = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    teacher, student, whole = (tiny_models.model_of(kind, seed).eval() for seed in (1, 0, 0))
    want = tiny_models.by_hand(whole, teacher, batch, tiny_models.causal(kind))
    want.backward()
    torch.nn.utils.clip_grad_norm_(whole.parameters(), CLIP)
    with torch.no_grad():
        for p in whole.parameters():
            if p.grad is not None:
                p.sub_(LR * p.grad)
    given = arguments(tmp_path, max_steps=1)
    losses = [KD(temperature=tiny_models.TEMPERATURE, alpha=tiny_models.ALPHA)]
    trainer = Ordered(
        student, given, train_dataset=data, data_collator=stacked, teacher=teacher, losses=losses, head=head
    )
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(want.item(), rel=1e-4)
    trainer.train()
    close(student, whole)


def test_callbacks_see_the_terms(tmp_path):
    """As those of TensorBoard and Weights & Biases, which log what they are given."""
    seen = []

    class Logger(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    given = {"train_dataset": rows(4), "eval_dataset": rows(2), "data_collator": collate, "teacher": model_of(1)}
    trainer = Ordered(model_of(0), arguments(tmp_path, eval_strategy="epoch"), callbacks=[Logger()], **given)
    trainer.train()
    terms = {"kd", "kd.soft", "kd.hard", "entropy", "mean_token_accuracy", "num_tokens"}
    assert any(terms <= logs.keys() for logs in seen)
    assert any({f"eval_{name}" for name in terms} <= logs.keys() for logs in seen)


def test_a_layer_that_is_not_there_is_named_at_once(tmp_path):
    losses = [KD(), FitNet("model.layers.7", "model.layers.1")]
    student = model_of(0)
    with pytest.raises(ValueError, match=r"model\.layers\.7"):
        DistillTrainer(student, arguments(tmp_path), teacher=model_of(1), losses=losses)
    assert not any(module._forward_hooks for module in student.modules())


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
    for wrong, message in (
        ({"head": "yes"}, "head must be True, False"),
        ({"head": 0}, "head must be True, False"),
        ({"causal": "no"}, "causal must be True, False or None"),
        ({"teacher": lambda student: None}, "teacher must be a function of the student that returns a teacher"),
        ({"teacher": "gpt2"}, "teacher must be a module"),
        ({"teacher": {"a": model_of(1)}}, "teacher must be a module"),
        ({"teacher_head": [None, None]}, "teacher_head must be one for each of the 1 teachers, got 2"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            DistillTrainer(model_of(0), arguments(tmp_path), **{**given, **wrong})
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
