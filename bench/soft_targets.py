"""Measures `kdfast.soft_targets` beside what a person would write in PyTorch: `python -m bench.soft_targets`."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from bench import turns
from kdfast import soft_targets
from kdfast.benchmark.cases import DTYPES

SIZES = {"rows": 512, "vocab": 128256, "k": 64}

#: What a user would compare: two competitors, the slow one and the fast one; calls joined by ``+`` add up.
RATIOS = {
    "`torch.topk` + `torch.logsumexp`, over `soft_targets` at T = 1": ("topk + logsumexp", "kdfast T=1"),
    "the same over `soft_targets` at T = 1 and 2": ("topk + logsumexp", "kdfast T=1,2"),
    "with `torch.logsumexp(x / 2)` as well, over `soft_targets` at T = 1 and 2": (
        "topk + logsumexp + logsumexp at 2",
        "kdfast T=1,2",
    ),
    "`torch.topk` alone, over `soft_targets` at T = 1 and 2": ("topk", "kdfast T=1,2"),
    '`torch.softmax` + `torch.multinomial`, over `method="sample"`': ("softmax, multinomial", "kdfast sample"),
    "`soft_targets` at T = 1, over reading the logits once for their maximum": ("kdfast T=1", "read"),
}


def competitors(given: argparse.Namespace, *, dtype: torch.dtype) -> turns.Competitors:
    """Every method, and the calls of PyTorch; ``read`` reads the same logits once, with as many threads."""
    x = (2 * torch.randn(given.rows, given.vocab, generator=torch.Generator().manual_seed(0))).to(dtype)
    k = given.k
    return {
        "kdfast T=1": lambda: soft_targets(x, k=k),
        "kdfast T=1,2": lambda: soft_targets(x, k=k, temperatures=(1.0, 2.0)),
        "kdfast T=1,3": lambda: soft_targets(x, k=k, temperatures=(1.0, 3.0)),
        "kdfast topp": lambda: soft_targets(x, k=k, method="topp", p=0.9),
        "kdfast sample": lambda: soft_targets(x, k=k, method="sample", seed=0),
        "kdfast pps": lambda: soft_targets(x, k=k, method="pps", seed=0),
        "topk": lambda: torch.topk(x, k),
        "logsumexp": lambda: torch.logsumexp(x, -1),
        "logsumexp at 2": lambda: torch.logsumexp(x / 2, -1),
        "softmax, multinomial": lambda: torch.multinomial(torch.softmax(x.float(), -1), k, replacement=True),
        "read": lambda: x.amax(-1),
    }


SECTIONS: dict[str, turns.Section] = {name: partial(competitors, dtype=dtype) for name, dtype in DTYPES.items()}

if __name__ == "__main__":
    turns.main(__doc__, SIZES, SECTIONS, base="kdfast T=1", rounds=7)
