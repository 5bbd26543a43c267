"""Where an answer begins and ends in a text, of which padding is no part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from machine import ONCE

pytest.importorskip("transformers", reason="the hf extra is not installed")

import transformers
from texts import H, V, gradients_of, padded, texts

from kdfast import Distiller
from kdfast.methods import (
    CC,
    DIST,
    KD,
    PKT,
    RKD,
    SP,
)

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers


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
