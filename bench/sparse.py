"""Measures the loss of sparse targets beside the cross-entropy alone: `python -m bench.sparse`.

The student is sure of the kept columns in every second token, where the tail's mass takes a pass of its own.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from bench import turns
from kdfast import distill_loss, soft_targets
from kdfast.benchmark.cases import DTYPES

SIZES = {"rows": 512, "vocab": 128256, "k": 64}
CROSS_ENTROPY = "cross-entropy"
#: Options of the sparse losses by name.
LOSSES: dict[str, dict[str, Any]] = {
    "forward KL, T = 1": {},
    "forward KL, T = 2": {"temperature": 2.0},
    "jsd, T = 1": {"divergence": "jsd"},
    "renorm, T = 1": {"tail": "renorm"},
}


def competitors(given: argparse.Namespace, *, dtype: torch.dtype) -> turns.Competitors:
    """The cross-entropy, and the sparse losses with that cross-entropy in them."""
    torch.manual_seed(0)
    targets = soft_targets(2 * torch.randn(given.rows, given.vocab), k=given.k, temperatures=(1.0, 2.0))
    labels = torch.randint(given.vocab, (given.rows,))
    logits = 2 * torch.randn(given.rows, given.vocab)
    logits[::2].scatter_add_(-1, targets.ids[::2].long(), torch.full((len(logits[::2]), given.k), 9.0))
    z = logits.to(dtype).requires_grad_()

    def step(teacher: Any, options: dict[str, Any]) -> object:
        return torch.autograd.grad(distill_loss(z, teacher, labels, **options), z)

    losses = {name: partial(step, targets, options) for name, options in LOSSES.items()}
    return {CROSS_ENTROPY: partial(step, None, {}), **losses}


SECTIONS: dict[str, turns.Section] = {name: partial(competitors, dtype=dtype) for name, dtype in DTYPES.items()}

if __name__ == "__main__":
    turns.main(__doc__, SIZES, SECTIONS, base=CROSS_ENTROPY, rounds=9)
