"""Calls measured in turns, as every comparison here is, and the files that keep what was found."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.benchmark.machine import Machine
from kdfast.benchmark.measure import MOST_STEPS, ROUND_SECONDS
from kdfast.benchmark.process import peak_extra_bytes

#: Competitors of a section by name; the text of who cannot run says why. Made from the sizes of the command line.
Competitors = dict[str, Callable[[], object] | str]
Section = Callable[[argparse.Namespace], Competitors]


@dataclass(frozen=True)
class Turns:
    """What one process found for calls that took turns in it."""

    machine: dict[str, Any]
    sizes: dict[str, int]
    rounds_ms: dict[str, list[float]]  # of every call, by round
    peak_bytes: dict[str, int | None]  # None where not measurable
    missing: dict[str, str]  # who did not run, and why

    def rounds(self, name: str) -> list[float]:
        """Milliseconds by round; a name such as ``a + b`` adds up calls that stand for one together."""
        return [sum(together) for together in zip(*(self.rounds_ms[one] for one in name.split(" + ")), strict=True)]

    def ms(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds(name))

    def ratio(self, slow: str, fast: str) -> float:
        """The median over the rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.rounds(slow), self.rounds(fast), strict=True))


def take_turns(competitors: Competitors, rounds: int, sizes: dict[str, int]) -> Turns:
    """Measures every call in each round, each round starting one further; a call that fails at first is left out.

    A first round warms up, compiles and is dropped. Peak memory, which perturbs the allocator, is measured last.
    """
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    for name, call in competitors.items():
        if isinstance(call, str):
            missing[name] = call
            continue
        try:
            call()
        except Exception as error:  # of a peer, which is no concern of the others
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        calls[name] = call
    names, times = list(calls), {name: [] for name in calls}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            times[name].append(_round(calls[name]))
    peaks = {name: peak_extra_bytes(call) for name, call in calls.items()}
    return Turns(dataclasses.asdict(Machine.here()), sizes, times, peaks, missing)


def _round(call: Callable[[], object]) -> float:
    """Median ms of a call, repeated for a while where it is short, so that one interruption does not make the round."""
    times: list[float] = []
    while sum(times) < ROUND_SECONDS * 1e3 and len(times) < MOST_STEPS:
        start = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - start) * 1e3)
        del result  # its memory is not the next one's concern
    return statistics.median(times)


def read(file: Path) -> dict[str, Turns]:
    """The sections of a file."""
    return {name: Turns(**fields) for name, fields in json.loads(file.read_text()).items()}


def write(file: Path, name: str, turns: Turns) -> None:
    """Puts a section into a file, in the place of an older one of that name."""
    sections = {**(read(file) if file.exists() else {}), name: turns}
    file.write_text(json.dumps({name: dataclasses.asdict(t) for name, t in sections.items()}, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def listing(turns: Turns, base: str) -> str:
    """Time, its ratio to that of ``base``, or of the first where that is not there, and peak memory; who is missing."""
    base = base if base in turns.rounds_ms else next(iter(turns.rounds_ms))
    rows = []
    for name in turns.rounds_ms:
        peak = turns.peak_bytes[name]
        shown = "n/a" if peak is None else f"{peak / 2**20:.0f}"
        rows.append([name, f"{turns.ms(name):.4g}", f"{turns.ratio(name, base):.2f}", shown])
    missing = "".join(f"\nNot measured: {name}: {why}\n" for name, why in turns.missing.items())
    return table(["", "ms", f"time / {base}", "peak MiB"], rows) + missing


def main(doc: str, sizes: Mapping[str, int], sections: Mapping[str, Section], *, base: str, rounds: int) -> None:
    """The command line of a script: measures its sections, prints them, and keeps them in a file."""
    prog = f"python -m bench.{Path(sys.argv[0]).stem}"
    parser = argparse.ArgumentParser(prog=prog, description=doc.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures; its other sections stay as they are")
    parser.add_argument("--only", choices=sections, action="append", help="one section; may be repeated")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    given = parser.parse_args()
    print(Machine.here())
    for name in given.only or sections:
        turns = take_turns(sections[name](given), given.rounds, {size: getattr(given, size) for size in sizes})
        shape = ", ".join(f"{size} {value}" for size, value in turns.sizes.items())
        print(f"\n{name}; {shape}; median of {given.rounds} rounds\n\n{listing(turns, base)}", flush=True)
        if given.json:
            write(given.json, name, turns)
