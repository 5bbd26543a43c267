"""Measures the soft-target cache's speed beside other stores: `python -m bench.cache`.

Sections: ``read`` (every sample once), ``ranges`` (random ranges of 256 tokens, a batch in a call and one by one),
``cold`` (as read, from a file that the system was asked to forget), ``write``, ``pipeline`` (logits to disk). One
thread unless --threads says more; warm but for ``cold``. kdfast verifies its checksums in all of them and gives back
int32 ids and fp32 log-probabilities, but for ``packed``, its :meth:`kdfast.cache.Reader.packed`; the other stores give
back bytes as they are stored, ``raw`` (u32 and fp16, 384 bytes a token at k = 64), ``packed`` (kdfast's own payload
without its framing) and, of the memmap, ``widened`` (int32 and fp32, as kdfast gives them back).
"""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench import cache_peers, cache_teacher, turns
from kdfast import SparseTargets, cache, soft_targets

SIZES = {"samples": 32, "tokens": 2048, "k": 64, "threads": 1}
RANGE = 256
CALLS, RANGES = 8, 32  # calls, and ranges of each: what comes back is as large as a batch


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="kdfast-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _targets(samples: int, tokens: int, k: int) -> list[SparseTargets]:
    return cache_teacher.synthetic(samples, tokens, k)


def fill(path: Path, targets: Sequence[SparseTargets], **options: object) -> Path:
    """A cache of these targets, made anew."""
    shutil.rmtree(path, ignore_errors=True)
    with cache.Writer(path, vocab_size=targets[0].vocab_size, **options) as writer:
        for i, one in enumerate(targets):
            writer.write(i, one)
    return path


@functools.cache
def _cache(samples: int, tokens: int, k: int, tier: str) -> Path:
    return fill(_folder() / tier, _targets(samples, tokens, k), tier=tier)


def _payloads(given: argparse.Namespace) -> dict[str, list[np.ndarray]]:
    targets = _targets(given.samples, given.tokens, given.k)
    raw = [
        np.concatenate([t.ids.numpy().view(np.uint8), t.logprobs.half().numpy().view(np.uint8)], axis=1)
        for t in targets
    ]
    packed_bytes = -(-_size(_cache(given.samples, given.tokens, given.k, "fixed")) // (given.samples * given.tokens))
    rng = np.random.default_rng(0)  # as incompressible as what is packed
    packed = [rng.integers(0, 256, (given.tokens, packed_bytes), np.uint8) for _ in targets]
    widened = [
        np.concatenate([t.ids.numpy().view(np.uint8), t.logprobs.numpy().view(np.uint8)], axis=1) for t in targets
    ]
    return {"raw": raw, "packed": packed, "widened": widened}


def _stores(payload: str) -> dict[str, cache_peers.Store]:
    """Those that hold a payload: all of them, but only a memmap would be kept widened."""
    return cache_peers.STORES if payload != "widened" else {"memmap": cache_peers.STORES["memmap"]}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _opened(given: argparse.Namespace) -> dict[str, tuple[Callable[[list[tuple[int, int, int]]], object], Path] | str]:
    """Every store, filled: what reads (sample, start, stop) of it, and where it lies."""
    torch.set_num_threads(given.threads)
    stores: dict[str, tuple[Callable[[list[tuple[int, int, int]]], object], Path] | str] = {}
    for tier in TIERS:
        path = _cache(given.samples, given.tokens, given.k, tier)
        stores[f"kdfast {tier}"] = (partial(_read, cache.Reader(path)), path)
    fixed = _cache(given.samples, given.tokens, given.k, "fixed")
    stores["kdfast fixed, packed"] = (partial(_read_packed, cache.Reader(fixed)), fixed)
    for payload, samples in _payloads(given).items():
        for name, store in _stores(payload).items():
            path = _folder() / f"{name}-{payload}"
            try:
                cache_peers.write(store, path, samples)
                read = store.open(path)
            except ImportError as error:
                stores[f"{name} {payload}"] = f"{error} (pip install {store.package})"
                continue
            stores[f"{name} {payload}"] = (partial(_read_each, read), path)
    return stores


TIERS = ("fixed", "compact")


def _read(reader: cache.Reader, ranges: list[tuple[int, int, int]]) -> object:
    return reader.read([(i, slice(start, stop)) for i, start, stop in ranges])


def _read_packed(reader: cache.Reader, ranges: list[tuple[int, int, int]]) -> object:
    return reader.packed([(i, slice(start, stop)) for i, start, stop in ranges])


def _read_one(reader: cache.Reader, i: int, start: int, stop: int) -> object:
    return reader[i, start:stop]


def _read_each(read: Callable[[int, int, int], object], ranges: list[tuple[int, int, int]]) -> object:
    return [read(*one) for one in ranges]


def read_section(given: argparse.Namespace, *, cold: bool = False) -> turns.Competitors:
    """Every sample once, in calls of eight."""
    everything = [(i, 0, given.tokens) for i in range(given.samples)]

    def all_of(read: Callable[[list[tuple[int, int, int]]], object], path: Path) -> None:
        if cold:
            _forget(path)
        for first in range(0, len(everything), 8):
            read(everything[first : first + 8])

    return {n: s if isinstance(s, str) else partial(all_of, *s) for n, s in _opened(given).items()}


def ranges_section(given: argparse.Namespace) -> turns.Competitors:
    """Random ranges, a batch in each call; of kdfast also each in a call of its own, as the other stores read them."""
    rng = random.Random(0)
    starts = [(rng.randrange(given.samples), rng.randrange(given.tokens - RANGE + 1)) for _ in range(CALLS * RANGES)]
    picked = [(i, start, start + RANGE) for i, start in starts]

    def all_of(read: Callable[[list[tuple[int, int, int]]], object], _: Path) -> None:
        for first in range(0, len(picked), RANGES):
            read(picked[first : first + RANGES])

    stores = _opened(given)
    for tier in TIERS:
        path = _cache(given.samples, given.tokens, given.k, tier)
        stores[f"kdfast {tier}, one by one"] = (partial(_read_each, partial(_read_one, cache.Reader(path))), path)
    return {n: s if isinstance(s, str) else partial(all_of, *s) for n, s in stores.items()}


def write_section(given: argparse.Namespace) -> turns.Competitors:
    """All samples to a fresh store, kdfast's durably."""
    torch.set_num_threads(given.threads)
    targets = _targets(given.samples, given.tokens, given.k)
    calls: turns.Competitors = {
        f"kdfast {tier}": partial(fill, _folder() / "written", targets, tier=tier, threads=given.threads)
        for tier in TIERS
    }
    for payload, samples in _payloads(given).items():
        for name, store in _stores(payload).items():
            calls[f"{name} {payload}"] = partial(cache_peers.write, store, _folder() / "written-peer", samples)
    return calls


def pipeline_section(given: argparse.Namespace) -> turns.Competitors:
    """From logits of 512 tokens to disk, and its parts."""
    torch.set_num_threads(given.threads)
    logits = 2 * torch.randn(512, cache_teacher.VOCAB, generator=torch.Generator().manual_seed(0))
    selected = soft_targets(logits, k=given.k, temperatures=cache_teacher.TEMPERATURES)
    writer = cache.Writer(
        _folder() / "pipeline", vocab_size=cache_teacher.VOCAB, temperatures=cache_teacher.TEMPERATURES
    )
    atexit.register(writer.close)
    numbers = iter(range(1 << 30))

    def select() -> SparseTargets:
        return soft_targets(logits, k=given.k, temperatures=cache_teacher.TEMPERATURES)

    def committed(targets: SparseTargets) -> None:
        writer.write(next(numbers), targets)
        writer.commit()

    return {
        "soft_targets": select,
        "write": lambda: committed(selected),
        "soft_targets, write": lambda: writer.write(next(numbers), select()),
    }


def _forget(path: Path) -> None:
    """Asks the system to drop a store's pages."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@dataclass(frozen=True)
class Speed:
    """What a section's time means, as a rate."""

    unit: str
    count: Callable[[dict[str, int]], float]  # of the sizes, in that unit times seconds

    def of(self, sizes: dict[str, int], ms: float) -> float:
        """The rate, in :attr:`unit`."""
        return self.count(sizes) / (ms / 1e3)


def _million_tokens(sizes: dict[str, int]) -> float:
    return sizes["samples"] * sizes["tokens"] / 1e6


#: The sections that are about a store's speed.
SPEEDS = {
    "read": Speed("M tokens/s", _million_tokens),
    "cold": Speed("M tokens/s", _million_tokens),
    "ranges": Speed("1000 ranges/s", lambda _: CALLS * RANGES / 1e3),
    "write": Speed("M tokens/s", _million_tokens),
}

SECTIONS: dict[str, turns.Section] = {
    "read": read_section,
    "ranges": ranges_section,
    "cold": partial(read_section, cold=True),
    "write": write_section,
    "pipeline": pipeline_section,
}

if __name__ == "__main__":
    turns.main(__doc__, SIZES, SECTIONS, base="kdfast fixed", rounds=5)
