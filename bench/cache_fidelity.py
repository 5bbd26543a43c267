"""How far what the cache stores is from what it was given, by temperature: `python -m bench.cache_fidelity`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench import cache_teacher, turns
from kdfast import SparseTargets, cache, soft_targets
from kdfast.benchmark.machine import Machine
from kdfast.cache.grid import grid_for

TEMPERATURES = (0.05, 0.1, 0.25, 0.5, 0.7, 1.0, 2.0)
K = 64


@dataclass(frozen=True)
class Fidelity:
    """What a grid costs and what it leaves, of one teacher at the lowest temperature captured."""

    teacher: str
    temperature: float
    grid: int
    auto: bool
    bytes_per_token: float
    mean: float  # KL(given || stored), nats
    largest: float


def _targets(teacher: str, temperatures: Sequence[float]) -> list[SparseTargets]:
    if teacher == "the demonstration's, V = 4096":
        return cache_teacher.demo(32, K, temperatures)
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(256, 32000, generator=generator) for _ in range(16)]
    return [soft_targets(x, k=K, temperatures=temperatures) for x in logits]


def measure() -> list[Fidelity]:
    """The grid of 1/16 nat, and that which the temperatures ask for."""
    found = []
    for teacher in ("the demonstration's, V = 4096", "normal logits of deviation 2, V = 32000"):
        for t in TEMPERATURES:
            temperatures = tuple(sorted({t, 1.0}))
            targets = _targets(teacher, temperatures)
            grids: tuple[int | Literal["auto"], ...] = (4, "auto")
            for grid in grids:
                with tempfile.TemporaryDirectory(prefix="kdfast-bench-") as folder:
                    with cache.Writer(folder, vocab_size=targets[0].vocab_size, grid=grid) as writer:
                        for i, one in enumerate(targets):
                            writer.write(i, one)
                    reader = cache.Reader(folder)
                    size = sum(shard.bytes for shard in reader.shards()) / sum(len(one.ids) for one in targets)
                    stored = reader.read(range(len(targets)))
                kl = torch.cat([cache_teacher.divergence(a, b, t) for a, b in zip(targets, stored, strict=True)])
                used = grid_for(grid, temperatures)
                found.append(Fidelity(teacher, t, used, grid == "auto", size, float(kl.mean()), float(kl.max())))
    return found


def listing(found: Sequence[Fidelity]) -> str:
    """Markdown."""
    header = ["teacher", "T", "grid 4: bytes", "mean KL", "largest", "`auto`", "bytes", "mean KL", "largest"]
    rows = []
    for four, auto in zip(found[::2], found[1::2], strict=True):
        figures = [[f"{x.bytes_per_token:.1f}", f"{x.mean:.1e}", f"{x.largest:.1e}"] for x in (four, auto)]
        rows.append([four.teacher, f"{four.temperature:g}", *figures[0], str(auto.grid), *figures[1]])
    return turns.table(header, rows)


def read(file: Path) -> list[Fidelity]:
    """What ``--json`` kept."""
    return [Fidelity(**one) for one in json.loads(file.read_text())["fidelity"]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache_fidelity", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    found = measure()
    print(listing(found))
    if given.json:
        kept = {"machine": dataclasses.asdict(Machine.here()), "fidelity": [dataclasses.asdict(one) for one in found]}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
