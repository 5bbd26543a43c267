"""Measures `LMHead` beside stored logits, its peers and its own matrix products: `python -m bench.head`."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from bench import heads, turns
from kdfast.benchmark.cases import DTYPES

SIZES = {"tokens": 2048, "vocab": 151936, "hidden": 256}


def _inputs(given: argparse.Namespace, dtype: torch.dtype) -> heads.HeadInputs:
    return heads.HeadInputs(given.tokens, given.vocab, given.hidden, dtype, "cpu")


#: Peers with heads of their own take turns with kdfast in a run of theirs, which would be a long one otherwise.
PEERS = ("TRL, chunked (no CE)", "Liger, chunked (no tau^2)")


def _distillation(given: argparse.Namespace, *, dtype: torch.dtype) -> turns.Competitors:
    found = heads.distillation(_inputs(given, dtype), "forward_kl")
    return {name: step for name, step in found.items() if name not in PEERS}


def _peers(given: argparse.Namespace, *, dtype: torch.dtype) -> turns.Competitors:
    found = heads.distillation(_inputs(given, dtype), "forward_kl")
    return {name: found[name] for name in ("kdfast", *PEERS)}


def _cross_entropy(given: argparse.Namespace, *, dtype: torch.dtype) -> turns.Competitors:
    return heads.cross_entropy(_inputs(given, dtype))


LOSSES = {"two heads": _distillation, "two heads, peers": _peers, "cross-entropy": _cross_entropy}

SECTIONS: dict[str, turns.Section] = {
    f"{loss}, {name}": partial(competitors, dtype=dtype)
    for loss, competitors in LOSSES.items()
    for name, dtype in DTYPES.items()
}

if __name__ == "__main__":
    turns.main(__doc__, SIZES, SECTIONS, base="kdfast", rounds=2)
