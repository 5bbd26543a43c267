"""How sure a stored teacher is, and what it takes on disk, from a part of the samples."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdfast.cache.reader import Reader
from kdfast.spec.sparse import SAMPLED

_BINS = 48
_LEAST_TAIL = 1e-12


class Histogram(NamedTuple):
    """Numbers of tokens in bins of equal width."""

    edges: list[float]  # one more than counts
    counts: list[int]


class Statistics(NamedTuple):
    """Of topk and topp targets at temperature 1, per token."""

    samples: int  # that were read
    tokens: int
    kept: float  # mean number of entries
    entropy: float  # mean, nats: of the kept entries and the tail as one more
    tail: float  # mean mass outside the kept entries
    entropies: Histogram  # nats
    tails: Histogram  # log10 of the tail mass; where there is less than 1e-12, or none, -12


class Size(NamedTuple):
    """What samples of one tier take, with their checksums and keys, without the index of the shard."""

    samples: int
    tokens: int
    bytes: int


def _spread(reader: Reader, samples: int) -> list[str]:
    """The keys of at most ``samples`` samples, evenly spread over the cache."""
    keys = list(reader.keys())
    step = max(1, -(-len(keys) // max(1, samples)))
    return keys[::step][:samples]


def sizes(reader: Reader, samples: int) -> dict[str, Size]:
    """By tier, of at most ``samples`` samples, evenly spread over the cache; only their indices are looked at."""
    found: dict[str, Size] = {}
    for key in _spread(reader, samples):
        entry = reader._engine.find(key)
        held = found.get(entry.tier, Size(0, 0, 0))
        found[entry.tier] = Size(held.samples + 1, held.tokens + entry.tokens, held.bytes + entry.frame_bytes)
    return found


def statistics(reader: Reader, samples: int) -> Statistics | None:
    """Of at most ``samples`` samples, evenly spread over the cache; None where none has log-probabilities."""
    # Numbers: small tensors between large ones that come and go would keep malloc from using their memory again.
    entropies: list[float] = []
    tails: list[float] = []
    kept = read = 0
    for key in _spread(reader, samples):
        entry = reader._engine.find(key)
        if entry.method in SAMPLED or not entry.tokens:
            continue
        read += 1
        for targets in reader._pieces(key):
            logprobs = targets.logprobs.double()  # type: ignore[union-attr]
            q = torch.where(targets.valid, logprobs.exp(), 0.0)
            tail = (1 - q.sum(-1)).clamp(min=0)
            entropies += (-(torch.special.xlogy(q, q).sum(-1) + torch.special.xlogy(tail, tail))).tolist()
            tails += tail.tolist()
            kept += int(targets.valid.sum())
    if not read:
        return None
    entropy, tail = torch.tensor(entropies, dtype=torch.float64), torch.tensor(tails, dtype=torch.float64)
    return Statistics(
        samples=read,
        tokens=len(entropy),
        kept=kept / len(entropy),
        entropy=entropy.mean().item(),
        tail=tail.mean().item(),
        entropies=_histogram(entropy),
        tails=_histogram(tail.clamp(min=_LEAST_TAIL).log10()),
    )


def _histogram(values: torch.Tensor) -> Histogram:
    counts, edges = torch.histogram(values, _BINS)
    return Histogram(edges.tolist(), [int(n) for n in counts.tolist()])
