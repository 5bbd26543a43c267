"""What a cache costs as it grows, with its index and without: `python -m bench.cache_growth`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import turns
from kdfast import SparseTargets, cache
from kdfast.benchmark.machine import Machine
from kdfast.cache import Reader

V, TOKENS, K = 1000, 4, 4
SHARDS = 100
LOOKUPS = 20_000


@dataclass(frozen=True)
class Cost:
    """Of a cache in a fresh process, its files in the page cache."""

    samples: int
    shards: int
    indexed: bool
    index_bytes: int
    open: float  # s
    private: int  # bytes of memory that opening takes, of no other process
    find: float  # s a key, one by one from Python
    writer: float  # s to open a writer
    missing: float  # s for all keys
    close: float  # s, with one sample more


def _targets() -> list[SparseTargets]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(64):
        ids = torch.rand((TOKENS, V), generator=generator).argsort(-1)[:, :K].int()
        mass = torch.rand((TOKENS, K), generator=generator).sort(-1, descending=True).values
        logprobs = (0.9 * mass / mass.sum(-1, keepdim=True)).log()
        out.append(SparseTargets(ids, logprobs, vocab_size=V, lse={1.0: torch.zeros(TOKENS)}))
    return out


def fill(folder: str, samples: int) -> None:
    """Small samples, in about SHARDS shards, by one writer."""
    targets, token_ids = _targets(), torch.arange(TOKENS)
    frame = 280  # bytes that one of them takes, with its entry in the index of its shard
    with cache.Writer(folder, vocab_size=V, shard_bytes=max(1, samples * frame // SHARDS), threads=1) as writer:
        for i in range(samples):
            writer.write(f"sample-{i}", targets[i % len(targets)], token_ids)


def _private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(folder: str, samples: int) -> Cost:
    """In this process, which should have opened nothing before."""
    torch.set_num_threads(1)
    before = _private()
    begun = time.perf_counter()
    reader = Reader(folder)
    opened = time.perf_counter() - begun
    private = _private() - before
    assert len(reader) >= samples
    keys = [f"sample-{random.randrange(samples)}" for _ in range(LOOKUPS)]

    def find() -> None:
        for key in keys:
            reader.tokens(key)

    everything = [f"sample-{i}" for i in range(samples)]
    finding = min(_seconds(find) for _ in range(3)) / LOOKUPS
    begun = time.perf_counter()
    writer = cache.Writer(folder, vocab_size=V, threads=1)
    writing = time.perf_counter() - begun
    missing = _seconds(lambda: writer.missing(everything))
    writer.write(f"more-{os.getpid()}-{begun}", _targets()[0], torch.arange(TOKENS))
    writer.commit()
    return Cost(
        samples=samples,
        shards=len(reader.shards()),
        indexed=reader.indexed_shards > 0,
        index_bytes=sum(file.stat().st_size for file in Path(folder).glob("*.index")),
        open=opened,
        private=private,
        find=finding,
        writer=writing,
        missing=missing,
        close=_seconds(writer.close),
    )


def _measured(folder: str, samples: int, *, indexed: bool) -> Cost:
    """In a fresh process; without its index, where it is to have none."""
    if not indexed:
        for file in Path(folder).glob("*.index"):
            file.unlink()
    command = [sys.executable, "-m", "bench.cache_growth", "--measure", folder, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Cost(**json.loads(done.stdout))


def _median(costs: Sequence[Cost]) -> Cost:
    fields = dataclasses.asdict(costs[0])
    numbers = ("open", "private", "find", "writer", "missing", "close")
    fields |= {name: statistics.median(getattr(cost, name) for cost in costs) for name in numbers}
    return Cost(**fields)


def compare(samples: int, rounds: int) -> list[Cost]:
    """One cache with its index and without, in turns."""
    with tempfile.TemporaryDirectory(prefix="kdfast-bench-") as root:
        with_index, without = f"{root}/a", f"{root}/b"
        fill(with_index, samples)
        Path(without).mkdir()
        for file in Path(with_index).iterdir():
            os.link(file, f"{without}/{file.name}")
        Path(without, "manifest.json").unlink()
        found: list[list[Cost]] = [[], []]
        for _ in range(rounds):
            for costs, folder in zip(found, (with_index, without), strict=True):
                costs.append(_measured(folder, samples, indexed=folder == with_index))
    return [_median(costs) for costs in found]


def listing(found: Sequence[Cost]) -> str:
    """Markdown."""
    header = ["samples", "index", "open, ms", "memory, KiB", "find, us", "writer: open, ms", "missing, s", "close, ms"]
    rows = [
        [
            f"{c.samples:,}",
            f"{c.index_bytes / c.samples:.0f} bytes a sample" if c.indexed else "none",
            f"{1e3 * c.open:.2f}",
            f"{c.private / 1024:,.0f}",
            f"{1e6 * c.find:.2f}",
            f"{1e3 * c.writer:.2f}",
            f"{c.missing:.2f}",
            f"{1e3 * c.close:,.1f}",
        ]
        for c in found
    ]
    return turns.table(header, rows)


def read(file: Path) -> list[Cost]:
    """What ``--json`` kept."""
    return [Cost(**one) for one in json.loads(file.read_text())["growth"]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache_growth", description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(dataclasses.asdict(measure(given.measure, given.samples[0]))))
        return
    found = [cost for samples in given.samples for cost in compare(samples, given.rounds)]
    print(listing(found))
    if given.json:
        kept = {"machine": dataclasses.asdict(Machine.here()), "growth": [dataclasses.asdict(one) for one in found]}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
