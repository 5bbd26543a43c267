"""Bytes a token and divergence of what the cache stores, for three teachers: `python -m bench.cache_sizes`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import cache_teacher, turns
from kdfast import SparseTargets, cache, soft_targets
from kdfast.benchmark.machine import Machine

TIERS = ("fixed", "compact")
DRAWS = (8, 12, 16, 24)


@dataclass(frozen=True)
class Stored:
    """What one way to store one teacher's targets came to."""

    teacher: str
    form: str
    tokens: int
    bytes_per_token: float  # of all files
    kl_nats: list[float]  # mean and largest at T = 1, then at T = 2; none of drawn targets, which are exact


def _fill(path: Path, targets: Sequence[SparseTargets], **options: object) -> float:
    count = 0
    with cache.Writer(path, vocab_size=targets[0].vocab_size, **options) as writer:
        for i, one in enumerate(targets):
            writer.write(i, one)
            count += len(one.ids)
    return sum(file.stat().st_size for file in path.iterdir()) / count


def _tokens(targets: Sequence[SparseTargets]) -> int:
    return sum(len(t.ids) for t in targets)


def measure(samples: int, tokens: int, k: int) -> list[Stored]:
    """Every tier and grid, and drawn targets by their number, of each teacher."""
    synthetic = f"synthetic, V = {cache_teacher.VOCAB}"
    calibrated = f"{synthetic}, calibrated ids"
    trained = "the demonstration's, V = 4096"
    found = []
    for teacher, targets in (
        (synthetic, cache_teacher.synthetic(samples, tokens, k)),
        (calibrated, cache_teacher.synthetic(samples, tokens, k, exponent=cache_teacher.CALIBRATED)),
        (trained, cache_teacher.demo(64, k)),
    ):
        print(f"{teacher}: ids of {cache_teacher.id_entropy(targets):.2f} bits", flush=True)
        for tier in TIERS:
            for grid in (4, 5):
                with tempfile.TemporaryDirectory(prefix="kdfast-bench-") as folder:
                    size = _fill(Path(folder), targets, tier=tier, grid=grid)
                    reader = cache.Reader(folder)
                    kl = [
                        torch.cat([cache_teacher.divergence(t, reader[i], at) for i, t in enumerate(targets)])
                        for at in cache_teacher.TEMPERATURES
                    ]
                figures = [float(x) for one in kl for x in (one.mean(), one.max())]
                found.append(Stored(teacher, f"{tier}, k = {k}, grid 1/{2**grid}", _tokens(targets), size, figures))
    logits = cache_teacher.synthetic_logits(512)
    likelier = cache_teacher.synthetic_logits(512, exponent=cache_teacher.CALIBRATED)
    for method in ("sample", "pps"):
        for draws in DRAWS:
            for teacher, targets in (
                (synthetic, [soft_targets(logits, k=draws, method=method, seed=0)]),
                (calibrated, [soft_targets(likelier, k=draws, method=method, seed=0)]),
                (trained, cache_teacher.demo(16, draws, (1.0,), method=method, seed=0)),
            ):
                entries = sum(int(t.valid.sum()) for t in targets) / _tokens(targets)
                with tempfile.TemporaryDirectory(prefix="kdfast-bench-") as folder:
                    size = _fill(Path(folder), targets)
                found.append(Stored(teacher, f"{method}, {entries:.1f} entries", _tokens(targets), size, []))
    return found


def listing(found: Sequence[Stored]) -> str:
    """Markdown."""
    header = ["teacher", "stored as", "tokens", "bytes/token", "mean KL, T=1", "largest", "mean KL, T=2", "largest"]
    rows = []
    for one in found:
        divergence = [f"{x:.2g}" for x in one.kl_nats] or [""] * 4
        rows.append([one.teacher, one.form, str(one.tokens), f"{one.bytes_per_token:.1f}", *divergence])
    return turns.table(header, rows)


def read(file: Path) -> list[Stored]:
    """What ``--json`` kept."""
    return [Stored(**one) for one in json.loads(file.read_text())["stored"]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache_sizes", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    for name, default in {"samples": 32, "tokens": 2048, "k": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    given = parser.parse_args()
    found = measure(given.samples, given.tokens, given.k)
    print(listing(found))
    if given.json:
        machine = dataclasses.asdict(Machine.here())
        kept = {"machine": machine, "stored": [dataclasses.asdict(one) for one in found]}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
