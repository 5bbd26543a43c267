"""Feature losses on models of transformers: what their attention says is what the losses see of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers

from kdfast import Distiller
from kdfast.methods import CrossEntropy
from kdfast.methods.feature import AttentionMaps, FitNet, MiniLM, MiniLMv2, TinyBERT
from kdfast.methods.layers import matching

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

PAGE = Path(__file__).parents[2] / "docs" / "methods-feature.md"
V, B, S = 50, 3, 7
LENGTHS = torch.tensor([7, 4, 1])
ATTENTION = "encoder.layer.*.attention.self.{query,key}"
QKV = "encoder.layer.%d.attention.self.{query,key,value}"


def bert(width=12, layers=2, heads=2, dropout=0.1, attention="eager"):
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=16,
        max_position_embeddings=16,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=dropout,
        output_hidden_states=True,
        output_attentions=attention == "eager",
        initializer_range=0.5,
        attn_implementation=attention,
    )
    return transformers.BertModel(config)


def gpt(width=12, layers=2, heads=2):
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        output_hidden_states=True,
        output_attentions=True,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def batch():
    mask = (torch.arange(S)[None] < LENGTHS[:, None]).long()
    return {"input_ids": torch.randint(3, V, (B, S)), "attention_mask": mask}


def tokens(x):
    """Those that are not padding, of (B, S, ...)."""
    return torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)])


def test_minilm_is_the_divergence_of_the_models_own_attention():
    student, teacher, inputs = bert(layers=2).eval(), bert(width=16, layers=3).eval(), batch()
    with Distiller(student, teacher, [MiniLM(QKV % 1, QKV % 2, heads=2)]) as d:
        _, terms = d(inputs)
    p, q = (model(**inputs).attentions[-1].transpose(1, 2) for model in (student, teacher))  # (B, S, A, S)
    p, q = tokens(p), tokens(q)
    expected = torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1).mean()
    torch.testing.assert_close(terms["minilm.attention"], expected.detach(), rtol=1e-4, atol=1e-6)


def test_minilm_of_a_decoder_is_causal():
    student, teacher, inputs = gpt().eval(), gpt(width=16).eval(), batch()
    inputs.pop("attention_mask")
    fused = "transformer.h.1.attn.c_attn"
    with Distiller(student, teacher, [MiniLM(fused, fused, heads=2, causal=True)]) as d:
        _, terms = d(inputs)
    p, q = (model(**inputs).attentions[-1] for model in (student, teacher))
    expected = torch.where(q > 0, q * (q / p).log(), 0.0).sum(-1).mean()
    torch.testing.assert_close(terms["minilm.attention"], expected.detach(), rtol=1e-4, atol=1e-6)


def test_attention_is_the_same_from_every_kernel():
    """Nothing has to be configured: the scores come from the projections."""
    eager, inputs = bert().eval(), batch()
    fast = bert(attention="sdpa").eval()
    fast.load_state_dict(eager.state_dict())
    teacher = bert(layers=4)
    found = []
    for student in (eager, fast):
        with Distiller(student, teacher, [AttentionMaps(ATTENTION, ATTENTION, heads=2)]) as d:
            found.append(d(inputs)[0])
    torch.testing.assert_close(*found)


def test_attentions_that_the_models_return():
    student, teacher, inputs = bert().eval(), bert(width=16, layers=4).eval(), batch()
    with Distiller(student, teacher, [AttentionMaps(":attentions.*", ":attentions.*")]) as d:
        loss, _ = d(inputs)
    s, t = student(**inputs).attentions, teacher(**inputs).attentions
    expected = 0.0
    for a, b in ((s[0], t[1]), (s[1], t[3])):
        gaps = [(a - b)[i, :, :n, :n].square().flatten() for i, n in enumerate(LENGTHS)]
        expected = expected + torch.cat(gaps).mean()
    torch.testing.assert_close(loss, expected)


def test_tinybert_by_hidden_states_and_by_modules():
    student, teacher, inputs = bert().eval(), bert(width=16, layers=4).eval(), batch()
    attention = {"student_attention": ATTENTION, "teacher_attention": ATTENTION, "heads": 2}
    modules = "{embeddings,encoder.layer.*}"
    losses = [TinyBERT(**attention), TinyBERT(modules, modules, **attention)]
    with Distiller(student, teacher, losses) as d:
        d.prepare(inputs)
        losses[1].load_state_dict(losses[0].state_dict())
        _, terms = d(inputs)
    torch.testing.assert_close(terms["tinybert"], terms["tinybert_2"])
    own, other = student(**inputs).hidden_states, teacher(**inputs).hidden_states
    expected = sum((tokens(losses[0].hidden(own[m])) - tokens(other[2 * m])).square().mean() for m in (1, 2))
    torch.testing.assert_close(terms["tinybert.hidden"], expected.detach())
    expected = (tokens(losses[0].embeddings(own[0])) - tokens(other[0])).square().mean()
    torch.testing.assert_close(terms["tinybert.embeddings"], expected.detach())


LOSSES = {
    "fitnet": lambda: FitNet(":hidden_states.*", ":hidden_states.*"),
    "fitnet-modules": lambda: FitNet("encoder.layer.*.output", "encoder.layer.*.output", layer_map="last"),
    "fitnet-embeddings": lambda: FitNet("embeddings", "embeddings"),
    "scores": lambda: AttentionMaps(ATTENTION, ATTENTION, heads=2),
    "maps": lambda: AttentionMaps(":attentions.*", ":attentions.*"),
    "tinybert": lambda: TinyBERT(student_attention=ATTENTION, teacher_attention=ATTENTION, heads=2),
    "minilm": lambda: MiniLM(QKV % 1, QKV % 3, heads=2),
    "minilm-v2": lambda: MiniLMv2(QKV % 1, QKV % 3, relation_heads=4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_training_and_padding(name):
    """A student in train mode learns; what padding holds changes nothing of it."""
    student, teacher, inputs = bert(dropout=0.0), bert(width=16, layers=4), batch()
    student.train()
    with Distiller(student, teacher, [LOSSES[name]()]) as d:
        if not all(loss.prepared for loss in d.losses.values()):
            d.prepare(inputs)
        loss, _ = d(inputs)
        padded = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 1)
        torch.testing.assert_close(d({**inputs, "input_ids": padded})[0], loss, rtol=1e-4, atol=1e-6)
        loss.backward()
        optimizer = torch.optim.Adam([*student.parameters(), *d.parameters()], lr=3e-3)
        values = [loss.item()]
        for _ in range(12):
            loss, _ = d(inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert min(values[-4:]) < values[0]
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("heads", [(2, 4), (4, 2), (3, 8)])
def test_minilm_v2_of_other_heads_and_widths(heads):
    student, teacher = bert(width=24, heads=heads[0]), bert(width=48, layers=3, heads=heads[1])
    with Distiller(student, teacher, [MiniLMv2(QKV % 1, QKV % 1, relation_heads=12)]) as d:
        loss, terms = d(batch())
        loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert {"minilm_v2.query", "minilm_v2.key", "minilm_v2.value"} < terms.keys()
    assert student.encoder.layer[1].attention.self.value.weight.grad.abs().sum() > 0


def test_a_decoder_with_labels_in_bfloat16():
    student, teacher = gpt().bfloat16(), gpt(width=16, layers=4).bfloat16()
    fused = "transformer.h.*.attn.c_attn"
    losses = [
        CrossEntropy(),
        FitNet(":hidden_states.*", ":hidden_states.*", weight=1.0),
        AttentionMaps(fused, fused, heads=2, causal=True),
        MiniLMv2("transformer.h.1.attn.c_attn", "transformer.h.3.attn.c_attn", relation_heads=4, causal=True),
    ]
    inputs = batch()
    with Distiller(student, teacher, losses, causal=True) as d:
        d.prepare(inputs)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss, terms = d({**inputs, "labels": labels})
        loss.backward()
    assert loss.dtype == torch.float32
    assert all(term.isfinite() for term in terms.values())
    assert all(p.dtype == torch.float32 for p in d.parameters())


def test_gradient_checkpointing():
    teacher, inputs = bert(layers=4), batch()
    gradients = []
    states = bert(dropout=0.0).state_dict()
    projector = None
    for checkpointed in (False, True):
        student = bert(dropout=0.0).train()
        student.load_state_dict(states)
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        with Distiller(student, teacher, [FitNet("encoder.layer.*.output", "encoder.layer.*.output")]) as d:
            d.prepare(inputs)
            projector = projector or d.state_dict()
            d.load_state_dict(projector)
            for _ in range(2):
                student.zero_grad()
                d(inputs)[0].backward()
        gradients.append(student.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*gradients)


def test_hidden_states_that_were_not_asked_for():
    student = bert()
    student.config.output_hidden_states = False
    with (
        Distiller(student, bert(), [FitNet(":hidden_states.*", ":hidden_states.*")]) as d,
        pytest.raises(LookupError, match=r"student's layer ':hidden_states.\*': .* output_hidden_states=True"),
    ):
        d.prepare(batch())
    with Distiller(student, bert(), [FitNet(":hidden_states.*", ":hidden_states.*")]) as d:
        d.prepare({**batch(), "output_hidden_states": True})


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("bert.encoder.layer.*.output", r"near it: encoder.layer.\*.output"),
        ("encoder.layers.*.output", r"near it: encoder.layer.\*.output"),
        ("encoder.layer.output", r"near it: encoder.layer.\*.output"),
        ("bert.encoder.layer.3.output", r"near it: encoder.layer.3.output"),
        ("encoder.layer.3.attention.query", r"near it: encoder.layer.3.attention.self.query"),
        ("encoder.layer.*.attention.self.qeury", r"near it: encoder.layer.\*.attention.self.query"),
        ("encoder.layer.12.output", r"near it: .*encoder.layer.11.output"),
    ],
)
def test_near_matches(pattern, near):
    with pytest.raises(ValueError, match=near):
        matching(bert(layers=12), pattern, "student")


def test_page():
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(example, scope := {})
    assert scope["loss"].isfinite()
    assert {"tinybert.hidden", "minilm_v2.value"} < scope["terms"].keys()
