"""Which positions count: padding's content, side and amount change nothing, nor does what a document is packed with."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from machine import INTERPRETING, VARIANTS
from torch import nn

pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers

import kdfast
from kdfast import Distiller, cache
from kdfast.methods import (
    CC,
    DIST,
    DKD,
    FSP,
    KD,
    NKD,
    NST,
    PKT,
    RKD,
    SP,
    TTM,
    VID,
    AdaptiveKL,
    AttentionMaps,
    AttentionTransfer,
    CrossEntropy,
    FitNet,
    Inputs,
    LogitStandardisation,
    MiniLM,
    MiniLMv2,
    TinyBERT,
)
from kdfast.methods.positions import documents, placed, predicting
from kdfast.reporting.measure import positions

pytestmark = [
    pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there"),
    pytest.mark.skipif(INTERPRETING, reason="the kernels' backend makes no difference to a Distiller"),
    pytest.mark.filterwarnings("ignore"),  # of transformers
]

V, H = 37, 16
LENGTHS = (9, 5, 7)
QKV = "model.layers.1.self_attn.{q,k,v}_proj"


def llama(layers=2, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        attn_implementation="eager",
        output_hidden_states=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def padded(rows, *, left=False, more=0, fill=0):
    """(B, S) of documents of different lengths."""
    longest = max(map(len, rows)) + more
    out = torch.full((len(rows), longest), fill, dtype=rows[0].dtype)
    for one, row in zip(out, rows, strict=True):
        place = slice(longest - len(row), None) if left else slice(len(row))
        one[place] = row
    return out


def texts():
    return [torch.randint(1, V, (n,)) for n in LENGTHS]


#: How a batch may lie: the side, how much padding beyond the longest, and what stands in it.
LAYOUTS = {
    "longer": {"more": 4},
    "other tokens": {"fill": V - 1},
    "left": {"left": True},
    "left, longer": {"left": True, "more": 3, "fill": 5},
}

LOSSES = {
    "kd": lambda: KD(temperature=2.0, alpha=0.4),
    "kd reverse": lambda: KD(divergence="reverse_kl", alpha=1.0),
    "ce": CrossEntropy,
    "dkd": DKD,
    "nkd": NKD,
    "ttm": lambda: TTM(alpha=0.5),
    "akl": lambda: AdaptiveKL(alpha=0.5),
    "dist": lambda: DIST(alpha=0.5),
    "standardised": lambda: LogitStandardisation(alpha=0.5),
    "fitnet": lambda: FitNet("model.layers.*", "model.layers.*"),
    "vid": lambda: VID("model.layers.1", "model.layers.1"),
    "tinybert": lambda: TinyBERT(
        student_attention="model.layers.*.self_attn.{q,k}_proj",
        teacher_attention="model.layers.*.self_attn.{q,k}_proj",
        heads=2,
        causal=True,
    ),
    "maps": lambda: AttentionMaps(
        "model.layers.*.self_attn.{q,k}_proj", "model.layers.*.self_attn.{q,k}_proj", heads=2, causal=True
    ),
    "minilm": lambda: MiniLM(QKV, QKV, heads=2, causal=True),
    "minilm v2": lambda: MiniLMv2(QKV, QKV, relation_heads=4, causal=True),
    "sp": lambda: SP("model.layers.1", "model.layers.1"),
    "sp of logits": SP,
    "pkt": lambda: PKT("model.layers.1", "model.layers.1"),
    "rkd": lambda: RKD("model.layers.1", "model.layers.1"),
}
NEEDS_LABELS = {"ce", "dkd", "nkd"}


def gradients_of(d, student, batch, **options):
    student.zero_grad()
    loss, terms = d(batch, **options)
    loss.backward()
    return loss.detach(), terms, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("labelled", ["labels", "no labels"])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name, labelled):
    """Of a causal model, without labels or with those that a careless collator makes: all of input_ids."""
    if labelled == "no labels" and name in NEEDS_LABELS:
        return
    student, teacher, rows = llama(), llama(seed=1), texts()

    def batch(**layout):
        ids = padded(rows, **layout)
        mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], **{**layout, "fill": 0})
        # what a left-padded batch needs of positions, transformers' generate makes
        place = (mask.cumsum(1) - 1).clamp(min=0)
        found = {"input_ids": ids, "attention_mask": mask, "position_ids": place}
        return found | ({"labels": ids.clone()} if labelled == "labels" else {})

    with Distiller(student, teacher, [LOSSES[name]()], causal=True) as d:
        d.prepare(batch())
        want = gradients_of(d, student, batch())
        assert want[0] > 0
        for layout, options in LAYOUTS.items():
            got = gradients_of(d, student, batch(**options))
            for a, b in zip((got[0], got[2]), (want[0], want[2]), strict=True):
                torch.testing.assert_close(
                    a, b, rtol=2e-5, atol=2e-8 + 1e-5 * b.abs().max().item(), msg=lambda m, at=layout: f"{at}: {m}"
                )


def test_a_first_token_is_not_predicted_from_padding():
    """By hand, from the logits of each text alone."""
    student, teacher, rows = llama(), llama(seed=1).eval(), texts()
    with torch.no_grad():
        logits = [[m(input_ids=row[None]).logits[0, :-1] for row in rows] for m in (student, teacher)]
        z, t = (torch.cat(one) for one in logits)
        want = kdfast.distill_loss(z, t, torch.cat([row[1:] for row in rows]), temperature=4.0, alpha=0.9)
    with Distiller(student, teacher, [KD()], causal=True) as d:
        for left in (False, True):
            ids = padded(rows, left=left)
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], left=left)
            place = (mask.cumsum(1) - 1).clamp(min=0)
            batch = {"input_ids": ids, "attention_mask": mask, "position_ids": place, "labels": ids.clone()}
            torch.testing.assert_close(d(batch)[0], want, rtol=1e-6, atol=0)
            items = sum(LENGTHS) - len(LENGTHS)  # of which the batch's own count is the same
            torch.testing.assert_close(d(batch, num_items=2.0 * items)[0], want / 2, rtol=1e-6, atol=0)


class Poison(nn.Module):
    """NaN at padding, where it is told what that is."""

    padding = None

    def forward(self, x):
        return x if self.padding is None else x.masked_fill(self.padding[..., None], torch.nan)


class Tokens(nn.Module):
    """A causal model that sees a token alone, so that packing needs no attention mask."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(V, H)
        self.query, self.key, self.value = (nn.Sequential(nn.Linear(H, H), Poison()) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(H, V), Poison())

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in (self.query, self.key, self.value):
            layer(x)
        return {"logits": self.head(sum(layer[0](x) for layer in (self.query, self.key, self.value)))}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda: KD(temperature=2.0),
        lambda: AttentionMaps("{query,key}", "{query,key}", heads=2, causal=True),
        lambda: AttentionMaps("{query,key}", "{query,key}", heads=2),
        lambda: MiniLMv2("{query,key,value}", "{query,key,value}", relation_heads=4),
        lambda: FitNet("embed", "embed", identity=True),
    ],
    ids=["kd", "causal maps", "maps", "minilm v2", "fitnet"],
)
def test_packing_changes_nothing(loss, labelled):
    student, teacher, rows = Tokens(1).double(), Tokens(2).double(), texts()
    apart = padded(rows)
    mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows])
    packed = torch.cat(rows)[None]
    place = torch.cat([torch.arange(len(row)) for row in rows])[None]
    batches = [{"input_ids": apart, "attention_mask": mask}, {"input_ids": packed, "position_ids": place}]
    images = torch.zeros(3, *place.shape, dtype=torch.int64)  # of a vision-language model, beside the text's
    batches.append({"input_ids": packed, "position_ids": torch.cat((place[None], images))})
    if labelled:
        for one in batches:
            one["labels"] = one["input_ids"].clone()
    with Distiller(student, teacher, [loss()], causal=True) as d:
        d.prepare(batches[0])
        want, *others = (gradients_of(d, student, one) for one in batches)
        for got in others:
            for a, b in zip((got[0], got[2]), (want[0], want[2]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "loss",
    [
        KD,
        lambda: KD(alpha=0.5),
        DIST,
        lambda: FitNet("query", "query"),
        lambda: VID("query", "query"),
        lambda: AttentionMaps("{query,key}", "{query,key}", heads=2),
        lambda: MiniLM("{query,key,value}", "{query,key,value}", heads=2),
        *(lambda kind=kind: kind("query", "query") for kind in (SP, PKT, RKD, CC)),
        SP,
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_nan_in_padding_stays_there(loss, causal):
    student, teacher, rows = Tokens(1), Tokens(2), texts()
    found = []
    with Distiller(student, teacher, [loss()], causal=causal) as d:
        for left in (False, True):
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], left=left)
            for module in (*student.modules(), *teacher.modules()):
                if isinstance(module, Poison):
                    module.padding = mask == 0
            batch = {"input_ids": padded(rows, left=left), "attention_mask": mask}
            if not found:
                d.prepare(batch)
            found.append(gradients_of(d, student, batch))
    for a, b in zip((found[0][0], found[0][2]), (found[1][0], found[1][2]), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-8 + 1e-5 * b.abs().max().item())


def test_a_mask_of_the_completion_decides_for_the_logits():
    student, teacher = Tokens(1), Tokens(2)
    ids = torch.randint(1, V, (3, 8))
    completion = torch.rand(3, 8) < 0.5
    with Distiller(student, teacher, [KD()], causal=True) as d:
        got, _ = d({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_mask": completion})
    counts = (completion[:, 1:] & completion[:, :-1]).float()
    z, t = student(ids)["logits"][:, :-1], teacher(ids)["logits"][:, :-1].detach()
    torch.testing.assert_close(got, kdfast.distill_loss(z, t, temperature=4.0, weights=counts))


# --- A teacher on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_beside_padding(tmp_path, packed):
    """Read by the batch's keys, or with the samples by a collator that pads on its own side."""
    student, teacher, rows = llama(), llama(seed=1).eval(), texts()
    keys = [str(i) for i in range(len(rows))]
    with torch.no_grad(), cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        for key, row in zip(keys, rows, strict=True):
            writer.write(key, kdfast.soft_targets(teacher(input_ids=row[None]).logits[0], k=8), row)
    reader = cache.Reader(tmp_path / "c")
    stored = reader.read(keys)
    with torch.no_grad():
        z = torch.cat([student(input_ids=row[None]).logits[0, :-1] for row in rows])
    want = kdfast.distill_loss(z, kdfast.SparseTargets.cat([one[:-1] for one in stored]), temperature=1.0)
    samples = [{"input_ids": row, "id": key} for key, row in zip(keys, rows, strict=True)]
    data = cache.Dataset(reader, samples, packed=packed)
    targets = cache.collate(data.__getitems__(range(len(rows))))["targets"]
    with Distiller(student, reader, [KD(temperature=1.0)], causal=True) as d:
        for layout in ({}, {"left": True}, {"left": True, "more": 3}, {"more": 2}):
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], **layout)
            place = (mask.cumsum(1) - 1).clamp(min=0)
            batch = {"input_ids": padded(rows, **layout), "attention_mask": mask, "position_ids": place}
            for more in ({"id": keys}, {"targets": targets}):
                torch.testing.assert_close(d(batch | more)[0], want, rtol=2e-5, atol=1e-6)
    with Distiller(student, None, [KD(temperature=1.0)], causal=True) as d:
        torch.testing.assert_close(d(batch | {"targets": targets})[0], want, rtol=2e-5, atol=1e-6)


def test_a_model_s_own_targets_stay():
    """Those that were made of a left-padded batch have entries at padding, too."""
    student, teacher = Tokens(1), Tokens(2)
    ids, mask = torch.randint(1, V, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    with torch.no_grad():
        targets = kdfast.soft_targets(teacher(ids)["logits"], k=V)
    with Distiller(student, None, [KD(temperature=1.0)]) as d:
        got, _ = d({"input_ids": ids, "attention_mask": mask, "targets": targets})
    want = kdfast.distill_loss(student(ids)["logits"], teacher(ids)["logits"].detach(), weights=mask.float())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_targets_that_are_in_place_stay():
    """Those that a collator has put where the tokens are are told by where they have entries."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    ids = torch.arange(8).view(2, 4, 1).int()
    first = kdfast.SparseTargets(
        ids, torch.zeros(2, 4, 1), vocab_size=V, k_eff=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    )
    there = kdfast.SparseTargets(ids, torch.zeros(2, 4, 1), vocab_size=V, k_eff=mask.int())
    assert placed(first, mask).ids[..., 0][mask].tolist() == [0, 1, 4, 5, 6]
    assert placed(there, mask).ids[..., 0][mask].tolist() == [2, 3, 5, 6, 7]
    assert placed(there, None) is there


# --- Encoder-decoder models -------------------------------------------------------------------------------------------


def t5(seed=0, wide=16):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=V,
        d_model=wide,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def translation():
    """Sources and targets as long as each other, with unlike padding."""
    ids, mask = torch.randint(1, V, (3, 6)), torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 4 + [0] * 2])
    labels = torch.randint(1, V, (3, 6)).masked_fill(
        torch.tensor([[0] * 3 + [1] * 3, [0] * 6, [0] * 5 + [1]]).bool(), -100
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_source_s_mask_says_nothing_of_target_tokens():
    student, teacher, batch = t5(), t5(1), translation()
    decoder = student.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    seen = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": decoder}
    z, t = student(**seen).logits, teacher(**seen).logits.detach()
    with Distiller(student, teacher, [KD()]) as d:
        got, _ = d(batch)
        torch.testing.assert_close(got, kdfast.distill_loss(z, t, batch["labels"], temperature=4.0, alpha=0.9))
        # without labels every token of the decoder counts, or those of its mask
        got, _ = d(seen)
        torch.testing.assert_close(got, kdfast.distill_loss(z, t, temperature=4.0))
        there = (batch["labels"] != -100).long()
        got, _ = d(seen | {"decoder_attention_mask": there})
        z, t = (m(**seen, decoder_attention_mask=there).logits for m in (student, teacher))
        torch.testing.assert_close(got, kdfast.distill_loss(z, t.detach(), temperature=4.0, weights=there.float()))


def test_the_labels_are_not_passed_to_a_model():
    student, batch = t5(), translation()
    given = []
    handle = student.register_forward_pre_hook(lambda m, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    with Distiller(student, t5(1), [KD()]) as d:
        d(batch)
        handle.remove()
        assert given == [{"input_ids", "attention_mask", "decoder_input_ids"}]
    with (
        Distiller(student, t5(1), [KD()], unlabelled=-1) as d,
        pytest.raises(ValueError, match="labels may be -1, which is no token that a decoder could see"),
    ):
        d(batch)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        Distiller(student, t5(1), [KD()], causal=True)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_layers_of_each_side_have_its_mask(side):
    student, teacher, batch = t5(wide=16), t5(1, wide=16), translation()
    layer = f"{side}.block.1.layer.1"
    mask = batch["attention_mask"].bool() if side == "encoder" else batch["labels"] != -100
    found = {}
    for model in (student, teacher):
        hook = model.get_submodule(layer).register_forward_hook(lambda m, a, out, name=model: found.update({name: out}))
        decoder = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=decoder)
        hook.remove()
    a, b = ((x[0] if isinstance(x, tuple) else x)[mask] for x in found.values())
    with Distiller(student, teacher, [FitNet(layer, layer, identity=True, weight=1.0)]) as d:
        d.prepare(batch)
        torch.testing.assert_close(d(batch)[0], (a - b).square().mean(), rtol=1e-5, atol=1e-7)
        # cross-attention's keys are of the source
    keys = "decoder.block.1.layer.1.EncDecAttention.k"
    with Distiller(student, teacher, [FitNet(keys, keys, identity=True)]) as d:
        d.prepare(batch)
        want, _ = d(batch)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
        torch.testing.assert_close(d(batch)[0], want)
    with pytest.raises(ValueError, match="of the encoder and of the decoder: name one of them"):
        Distiller(student, teacher, [FitNet("*.block.1", "*.block.1")]).__enter__()


def test_labels_that_are_no_tokens_make_no_decoder_inputs():
    shape = {"d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.BartConfig(vocab_size=V, num_labels=3, dropout=0.0, **shape, **heads)
    ids = torch.cat((torch.randint(3, V, (2, 5)), torch.full((2, 1), 2)), 1)
    labels = torch.tensor([0, 2])
    model = transformers.BartForSequenceClassification(config)
    with Distiller(model, None, [CrossEntropy()]) as d:
        got, _ = d({"input_ids": ids, "labels": labels})
    torch.testing.assert_close(got, F.cross_entropy(model(input_ids=ids).logits, labels))
    model = transformers.BartForQuestionAnswering(config)
    with Distiller(model, None, [CrossEntropy()]) as d:
        got, _ = d({"input_ids": ids, "start_positions": labels, "end_positions": labels + 1})
    out = model(input_ids=ids)
    want = (F.cross_entropy(out.start_logits, labels) + F.cross_entropy(out.end_logits, labels + 1)) / 2
    torch.testing.assert_close(got, want)


def test_a_report_of_an_encoder_decoder_model():
    batch = translation()
    inputs = Inputs(kwargs=batch, labels=batch["labels"], mask=batch["attention_mask"].bool())
    found = positions(inputs, batch["labels"].shape, batch["labels"], causal=False, model=t5())
    assert torch.equal(found, batch["labels"] != -100)


# --- The rule alone ---------------------------------------------------------------------------------------------------


def test_what_has_other_axes_says_nothing():
    mask = torch.ones(2, 5, dtype=torch.bool)
    cpu = torch.device("cpu")
    assert predicting(torch.Size([2]), mask, None, causal=False, device=cpu) is None
    assert predicting(torch.Size([2, 4]), mask, None, causal=False, device=cpu) is None
    assert predicting(torch.Size([2, 5]), None, None, causal=False, device=cpu) is None
    assert documents(torch.zeros(3, 2, 5)) is None  # of images, which do not rise
    assert documents(torch.tensor([[0, 1, 2, 0, 1, 0, 0]])).tolist() == [[0, 0, 0, 1, 1, 2, 3]]


def test_a_text_that_is_classified_has_no_mask_of_its_logits():
    """A mask (B, S) where the number of classes is S and that of the sequence the batch's."""
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=4
    )
    student, teacher = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    batch = {"input_ids": torch.randint(1, V, (4, 4)), "attention_mask": torch.tensor([[1, 1, 1, 0]] * 4)}
    with Distiller(student, teacher, [KD()]) as d:
        got, _ = d(batch)
    z, t = student(**batch).logits, teacher(**batch).logits
    torch.testing.assert_close(got, kdfast.distill_loss(z, t.detach(), temperature=4.0))


@pytest.mark.parametrize("kind", ["tokens", "classes", "maps"])
def test_a_token_mask_of_any_axes(kind):
    shape = {"tokens": (3, 6), "classes": (3,), "maps": (3, 4, 5)}[kind]
    z, t, y = torch.randn(*shape, 7), torch.randn(*shape, 7), torch.randint(7, shape)
    student, teacher = nn.Linear(7, 7), nn.Linear(7, 7)
    mask = torch.rand(shape) < 0.6
    mask.flatten()[0] = True
    with Distiller(student, teacher, [KD()]) as d:
        want = kdfast.distill_loss(student(z), teacher(z), y, temperature=4.0, alpha=0.9, weights=mask.float())
        for given in (mask, mask.long(), mask.float()):
            torch.testing.assert_close(d({"input": z, "labels": y, "token_mask": given})[0], want)
            torch.testing.assert_close(d.loss(student(z), teacher(z), y, token_mask=given)[0], want)
        if kind == "tokens":
            torch.testing.assert_close(d.loss(student(z), teacher(z), y, mask=mask.long())[0], want)
            inputs = Inputs(args=(z,), labels=y, mask=mask.float())
            torch.testing.assert_close(d(inputs)[0], want)
            with pytest.raises(
                ValueError, match=r"token_mask must have the logits' leading axes \(3, 6\), got \(3, 5\)"
            ):
                d({"input": z, "labels": y, "token_mask": mask[:, 1:]})
            with pytest.raises(ValueError, match=r"weights must have the student's leading axes \(3, 6\), got \(6,\)"):
                d({"input": z, "attention_mask": mask, "weights": torch.ones(6)})
    del t


def test_positions_that_are_the_same_for_all_rows():
    student, teacher = Tokens(1), Tokens(2)
    batch = {"input_ids": torch.randint(1, V, (3, 6)), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with Distiller(student, teacher, [KD()], causal=True) as d:
        want, _ = d(batch | {"position_ids": batch["position_ids"].expand(3, 6)})
        torch.testing.assert_close(d(batch)[0], want)


@pytest.mark.parametrize("sparse", [False, True])
def test_one_sequence_without_a_batch(sparse):
    student, teacher, ids = Tokens(1), Tokens(2), torch.randint(1, V, (6,))
    with torch.no_grad():
        taught = teacher(ids)["logits"]
    targets = kdfast.soft_targets(taught, k=V) if sparse else taught
    want = kdfast.distill_loss(student(ids)["logits"][:-1], taught[:-1], ids[1:], temperature=1.0, alpha=0.9)
    with Distiller(student, None if sparse else teacher, [KD(temperature=1.0)], causal=True) as d:
        got, _ = d({"input_ids": ids, "labels": ids} | ({"targets": targets} if sparse else {}))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_probabilities_of_the_next_token():
    student, teacher, ids = Tokens(1), Tokens(2), torch.randint(1, V, (3, 6))
    y = torch.rand(3, 6, V).softmax(-1)
    with Distiller(student, teacher, [KD(alpha=0.5)], causal=True) as d:
        got, _ = d({"input_ids": ids, "labels": y})
    z, t = student(ids)["logits"][:, :-1], teacher(ids)["logits"][:, :-1].detach()
    torch.testing.assert_close(got, kdfast.distill_loss(z, t, y[:, 1:], temperature=4.0, alpha=0.5))


# --- No hard label ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0])
@pytest.mark.parametrize("name", ["kd", "ttm", "akl", "standardised"])
def test_unlabelled_tokens_keep_their_soft_term(name, alpha):
    makers = {"kd": KD, "ttm": TTM, "akl": AdaptiveKL, "standardised": LogitStandardisation}
    student, teacher = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(7, (12,))
    y[:3], y[3:7] = -100, -1
    labelled, marked = y >= 0, y == -1

    def run(rows, labels, **options):
        twin = copy.deepcopy(student)
        with Distiller(twin, teacher, [makers[name](alpha=alpha, weight=1.0)], **options) as d:
            loss, _, gradient = gradients_of(d, twin, (x[rows], labels))
        return loss, gradient

    got = run(slice(None), y, unlabelled=-1)
    parts = (run(labelled, y[labelled]), run(marked, None))
    for a, one, other in zip(got, *parts, strict=True):
        torch.testing.assert_close(a, (5 * one + 4 * other) / 9, rtol=1e-5, atol=1e-7)


def test_losses_of_labels_drop_what_has_none():
    student, teacher = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(7, (12,))
    dropped = y.masked_fill(torch.arange(12) < 5, -100)
    y = y.masked_fill(torch.arange(12) < 5, -1)
    losses = [CrossEntropy(), DKD(), NKD(), KD(alpha=0.5)]
    with Distiller(student, teacher, losses, unlabelled=-1) as d:
        whole, terms = d((x, y))
        _, parts = d((x[:6], y[:6]), num_items=12)
        one, _ = d((x[:6], y[:6]), num_items=12)
        two, _ = d((x[6:], y[6:]), num_items=12)
    with Distiller(student, teacher, losses) as d:
        _, want = d((x, dropped))
    for name in ("ce", "dkd", "nkd"):
        torch.testing.assert_close(terms[name], want[name])
    assert terms["kd"] != want["kd"]
    labelled = 7 / 12  # of the mean over all, as num_items has it
    together = labelled * (terms["ce"] + terms["dkd"] + terms["nkd"]) + terms["kd"]
    torch.testing.assert_close(one + two, together, rtol=1e-6, atol=1e-9)
    assert parts.keys() == terms.keys()
    assert whole.isfinite()
    with pytest.raises(TypeError, match="unlabelled must be a label, an int, or None, got float"):
        Distiller(student, teacher, losses, unlabelled=-1.0)
    with pytest.raises(ValueError, match="unlabelled must be another label than -100, which drops a token"):
        Distiller(student, teacher, losses, unlabelled=-100)


def test_items_of_class_probabilities():
    """Mixup's labels: a row of probabilities is one example."""
    student, teacher = nn.Linear(4, 7).double(), nn.Linear(4, 7).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.rand(12, 7, dtype=torch.float64)
    y = y / y.sum(1, keepdim=True)
    with Distiller(student, teacher, [KD(alpha=0.5)]) as d:
        whole, _ = d((x, y))
        parts = [d((x[rows], y[rows]), num_items=12)[0] for rows in (slice(4), slice(4, None))]
    torch.testing.assert_close(sum(parts), whole)
    p, q = F.log_softmax(student(x) / 4, -1), F.log_softmax(teacher(x) / 4, -1)
    soft = 16 * (q.exp() * (q - p)).sum(-1).mean()
    torch.testing.assert_close(whole, 0.5 * soft + 0.5 * F.cross_entropy(student(x), y))


# --- An answer in a text ----------------------------------------------------------------------------------------------


def test_start_and_end_of_an_answer():
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    student, teacher = (transformers.BertForQuestionAnswering(config).eval() for _ in range(2))
    rows = texts()
    answers = {"start_positions": torch.tensor([1, 2, 30]), "end_positions": torch.tensor([4, 2, 6])}

    def by_hand(row, start, end):
        values = []
        for name, y in (("start_logits", start), ("end_logits", end)):
            z, t = (m(input_ids=row[None])[name].double()[0] for m in (student, teacher))
            p, q = F.log_softmax(z / 4, -1), F.log_softmax(t / 4, -1)
            if y < len(row):  # cut off otherwise: no label, and so no token
                values.append(0.9 * 16 * (q.exp() * (q - p)).sum() - 0.1 * F.log_softmax(z, -1)[y])
        return values

    found = [v for row, *span in zip(rows, *answers.values(), strict=True) for v in by_hand(row, *map(int, span))]
    assert len(found) == 5
    want = torch.stack(found).mean().float()
    with Distiller(student, teacher, [KD()]) as d:
        for layout in ({}, {"more": 4, "fill": 3}):
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], **{**layout, "fill": 0})
            got, _ = d({"input_ids": padded(rows, **layout), "attention_mask": mask, **answers})
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [DIST, SP, RKD, PKT, CC])
def test_other_losses_of_spans(loss):
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    student, teacher = (transformers.BertForQuestionAnswering(config).eval() for _ in range(2))
    rows, found = texts(), []
    with Distiller(student, teacher, [loss()]) as d:
        for layout in ({}, {"more": 4, "fill": 3}):
            mask = padded([torch.ones(len(row), dtype=torch.int64) for row in rows], **{**layout, "fill": 0})
            found.append(gradients_of(d, student, {"input_ids": padded(rows, **layout), "attention_mask": mask}))
    for a, b in zip((found[0][0], found[0][2]), (found[1][0], found[1][2]), strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-7 + 1e-4 * a.abs().max().item())


# --- Channels last ----------------------------------------------------------------------------------------------------


class Maps(nn.Module):
    def __init__(self, width, last, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 1)
        self.one, self.two = nn.Identity(), nn.Identity()
        self.last = last

    def forward(self, x):
        a = self.first(x)
        b = self.second(a.relu())
        if self.last:
            a, b = a.permute(0, 2, 3, 1).contiguous(), b.permute(0, 2, 3, 1).contiguous()
        self.one(a)
        return self.two(b).flatten(1)[:, :5]


@pytest.mark.parametrize("loss", [FitNet, VID, NST, AttentionTransfer, FSP])
def test_maps_with_channels_last(loss):
    x = torch.randn(4, 3, 12, 12)

    def value(student_last, teacher_last, **options):
        torch.manual_seed(0)
        layers = ("one", "two") if loss is FSP else "two"
        with Distiller(Maps(24, student_last, 1), Maps(24, teacher_last, 2), [loss(layers, layers, **options)]) as d:
            torch.manual_seed(3)
            d.prepare(x)
            return d(x)[0].detach()

    want = value(False, False)
    torch.testing.assert_close(value(True, True, channels_last=True), want)
    torch.testing.assert_close(value(False, True, channels_last=(False, True)), want)
    torch.testing.assert_close(value(False, False, channels_last=False), want)
    with pytest.raises(ValueError, match=r"looks like \(B, H, W, C\): pass channels_last=True"):
        value(True, True)
    with pytest.raises(TypeError, match=r"channels_last must be .*, got 'yes'"):
        loss(("one", "two"), ("one", "two"), channels_last="yes")


def test_strides_change_nothing():
    x = torch.randn(4, 3, 12, 12)
    for loss in (FitNet, NST, AttentionTransfer):
        with Distiller(Maps(24, False, 1), Maps(24, False, 2), [loss("two", "two")]) as d:
            d.prepare(x)
            torch.testing.assert_close(d(x.to(memory_format=torch.channels_last))[0], d(x)[0])


def test_sequences_that_a_relation_cannot_place():
    student, teacher = Tokens(1), Tokens(2)
    batch = {"input_ids": torch.randint(1, V, (3, 8)), "attention_mask": torch.ones(3, 7)}
    with (
        Distiller(student, teacher, [SP("embed", "embed")]) as d,
        pytest.raises(ValueError, match=r"SP: the mask is \(3, 7\), and the student's layer \(3, 8, 16\)"),
    ):
        d(batch)
