"""Feature maps whose channels are the last axis, and layers that have no place for a mask."""

from __future__ import annotations

import pytest
import torch
from machine import ONCE
from torch import nn

pytest.importorskip("transformers", reason="the hf extra is not installed")

from texts import Tokens, V

from kdfast import Distiller
from kdfast.methods import (
    FSP,
    NST,
    SP,
    VID,
    AttentionTransfer,
    FitNet,
)

pytestmark = [*ONCE, pytest.mark.filterwarnings("ignore")]  # of transformers


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
