"""Which positions count in an encoder-decoder model: the decoder's, whatever the source is padded with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from machine import ONCE

pytest.importorskip("transformers", reason="the hf extra is not installed")

import tiny_models
import transformers
from texts import H, V

import kdfast
from kdfast import Distiller
from kdfast.methods import (
    KD,
    CrossEntropy,
    FitNet,
    Inputs,
)
from kdfast.reporting.measure import positions

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers


def t5(seed=0, wide=16):
    torch.manual_seed(seed)
    return tiny_models.t5(vocab_size=V, d_model=wide)


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
