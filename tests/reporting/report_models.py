"""Small models and their data, for the tests of kdfast.report."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class Table(nn.Module):
    """A model that looks its logits up by the number of the example: predictions by hand."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[x]


class Tiny(nn.Module):
    def __init__(self, width, vocab=17, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocab)

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + self.drop(block(h))
        return self.head(h)


def mlp(width, classes=7):
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Dropout(0.4), nn.Linear(width, classes)
    )


def softmax(z):
    z = z - z.max(-1, keepdims=True)
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def fp64(model, x):
    model.eval()
    with torch.no_grad():
        return model(x).double().numpy()


def loader(x, y, size=16):
    return list(zip(x.split(size), y.split(size), strict=True))


def classifier():
    """Inputs, labels with some dropped, a teacher and two smaller models."""
    x, y = torch.randn(83, 6), torch.randint(0, 7, (83,))
    y[::9] = -100
    models = mlp(24), mlp(5), mlp(5)
    return x, y, *models
