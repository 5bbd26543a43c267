"""DistillTrainerMixin around TRL's SFTTrainer: whatever its data look like, against each document by itself."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from machine import ONCE_ON_THE_CPU

pytest.importorskip("datasets", reason="the hf extra is not installed")
pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import datasets
import peft
import tokenizers
import transformers
import trl
from tiny_llama import V, model_of
from trainers import InOrder, causal, close, filled, options

import kdfast
from kdfast import cache
from kdfast.integrations.huggingface import WithoutAdapters
from kdfast.integrations.trainer import DistillTrainerMixin
from kdfast.methods import KD

pytestmark = [*ONCE_ON_THE_CPU, pytest.mark.filterwarnings("ignore")]  # of transformers and TRL

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos> {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


class MyTrainer(InOrder, DistillTrainerMixin, trl.SFTTrainer):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, V)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **special)


def samples(kind, n=8):
    generator = torch.Generator().manual_seed(11)

    def some(low):
        length = int(torch.randint(low, 7, (), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(3, V, (length,), generator=generator).tolist())

    for i in range(n):
        a, b, c, d = some(3), some(2), some(2), some(3)
        if kind == "completion":
            yield {"prompt": a, "completion": " " + b}
        elif kind == "assistant":
            said = zip(("user", "assistant", "user", "assistant"), (a, b, c, d), strict=True)
            yield {"messages": [{"role": role, "content": content} for role, content in said]}
        else:
            yield {"text": a, "id": f"s{i}"}


def trainer_of(folder, tokenizer, kind, **given):
    config = {"max_length": 24, "max_steps": 2, "bf16": False, **given.pop("config", {})}
    if kind == "assistant":
        config["assistant_only_loss"] = True
    if kind == "packed":
        config["packing"] = True
    student = given.pop("student", None)
    return MyTrainer(
        model_of(0) if student is None else student,
        trl.SFTConfig(**options(folder, **config)),
        train_dataset=datasets.Dataset.from_list(list(samples(kind))),
        processing_class=tokenizer,
        **given,
    )


def documents(trainer):
    """Of each row of the trainer's prepared data set: ids and labels of the documents in it."""
    for row in trainer.train_dataset:
        labels = row.get("labels", row["input_ids"])
        ends = [0, *itertools.accumulate(row.get("seq_lengths") or [len(row["input_ids"])])]
        yield [(row["input_ids"][a:b], labels[a:b]) for a, b in itertools.pairwise(ends)]


def steps_alone(student, teacher, rows, per_step, steps=2, lr=0.05):
    """Optimizer steps in which every document is run by itself."""
    losses = []
    for first in range(0, steps * per_step, per_step):
        student.zero_grad()
        total = items = 0
        for ids, labels in itertools.chain.from_iterable(rows[first : first + per_step]):
            x = torch.tensor([ids])
            one, count = causal(
                student,
                teacher,
                {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": torch.tensor([labels])},
            )
            total, items = total + one, items + count
        loss = total / items
        loss.backward()
        parameters = [p for p in student.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        with torch.no_grad():
            for p in parameters:
                p.sub_(lr * p.grad)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["text", "completion", "assistant", "packed"])
def test_data_of_each_kind(tmp_path, tokenizer, kind):
    teacher, whole = model_of(1).eval(), model_of(0)
    trainer = trainer_of(tmp_path, tokenizer, kind, teacher=teacher)
    rows = list(documents(trainer))
    per_step = 4 if kind != "packed" else len(rows)
    steps = 2 if kind != "packed" else 1
    if kind == "packed":
        assert max(len(row) for row in rows) > 1
        trainer.args.gradient_accumulation_steps, trainer.args.max_steps = -(-len(rows) // 2), 1
    elif kind != "text":
        assert any(label == -100 for (_, labels), *_ in rows for label in labels[1:])
    want = steps_alone(whole, teacher, rows, per_step, steps)
    trainer.train()
    close(trainer.model, whole)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(want, rel=1e-3)
    assert {"kd.soft", "kd.hard", "entropy", "mean_token_accuracy"} <= logged[0].keys()
    used = rows[: steps * per_step]
    assert logged[-1]["num_tokens"] == sum(len(ids) for row in used for ids, _ in row)


def test_a_peft_student_taught_by_its_base(tmp_path, tokenizer):
    """The trainer makes the PeftModel itself, so that the teacher is a function of it."""
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(4)
    trainer = trainer_of(tmp_path, tokenizer, "text", peft_config=adapter, teacher=WithoutAdapters)
    whole = peft.get_peft_model(model_of(0), adapter)
    whole.load_state_dict(trainer.model.state_dict())
    want = steps_alone(whole, model_of(0).eval(), list(documents(trainer)), 4)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(want, rel=1e-3)
    close(trainer.model, whole)


def test_a_cache_beside_the_data(tmp_path, tokenizer):
    """The samples' keys pass TRL's preparation; a data set that is tokenised otherwise is told apart."""
    teacher, whole = model_of(1).eval(), model_of(0)
    rows = list(documents(trainer_of(tmp_path, tokenizer, "text", teacher=teacher)))
    reader = filled(tmp_path / "c", teacher, [(f"s{i}", ids) for i, ((ids, _),) in enumerate(rows)])
    trainer = trainer_of(tmp_path, tokenizer, "text", teacher=reader)
    want = steps_alone(whole, teacher, rows, 4)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(want, rel=1e-2)  # stored in 16 bits
    close(trainer.model, whole, rtol=2e-3, atol=1e-4)
    cut = trainer_of(tmp_path, tokenizer, "text", teacher=reader, config={"max_length": 3})
    with pytest.raises(cache.CacheError, match="s0"):
        cut.train()
    packed = trainer_of(tmp_path, tokenizer, "text", teacher=reader, config={"padding_free": True, "max_length": None})
    with pytest.raises(ValueError, match=r"rows of 2 samples that have id: .*padding_free=False"):
        packed.train()


def test_a_loss_of_trl_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="loss_type has no say here"):
        trainer_of(tmp_path, tokenizer, "text", teacher=model_of(1), config={"loss_type": "dft"})


def test_evaluation(tmp_path, tokenizer):
    teacher, student = model_of(1).eval(), model_of(0).eval()
    trainer = trainer_of(tmp_path, tokenizer, "text", student=student, teacher=teacher, losses=[KD(temperature=1.0)])
    found = trainer.evaluate(trainer.train_dataset)
    total = items = 0
    for ((ids, labels),) in documents(trainer):
        x = torch.tensor([ids])
        part = {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": torch.tensor([labels])}
        with torch.no_grad():
            one, count = causal(student, teacher, part)
        total, items = total + one, items + count
    assert found["eval_kd.soft"] > 0
    assert 0.5 * found["eval_kd.soft"] + 0.5 * found["eval_kd.hard"] == pytest.approx((total / items).item(), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_steps_of_trl_s_gkd_trainer(tmp_path, tokenizer, beta):
    """On given answers (lmbda 0), as docs/migration.md has it."""
    gkd = importlib.import_module("trl.experimental.gkd")  # which warns that it may change
    in_order = type("GKD", (InOrder, gkd.GKDTrainer), {})
    data = [{"messages": row["messages"][:2]} for row in samples("assistant")]
    theirs, ours = model_of(0), model_of(0)
    config = {"max_length": 24, "bf16": False}
    in_order(
        model=theirs,
        teacher_model=model_of(1),
        args=gkd.GKDConfig(**options(tmp_path, lmbda=0.0, beta=beta, **config)),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
    ).train()
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    divergence = ends.get(beta) or kdfast.Divergence("jsd", beta=beta)
    MyTrainer(
        model=ours,
        teacher=model_of(1),
        losses=[KD(divergence=divergence, temperature=1.0, alpha=1.0)],
        args=trl.SFTConfig(**options(tmp_path, **config)),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in data]
        ),
        processing_class=tokenizer,
    ).train()
    close(ours, theirs)
