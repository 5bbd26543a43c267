"""What a run found out, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.benchmark.cases import ALPHA, TEMPERATURE, Case
from kdfast.benchmark.competitors import COMPILE, EAGER, KDFAST, TRIAD
from kdfast.benchmark.errors import BenchError
from kdfast.benchmark.machine import Machine

SCHEMA = "kdfast-bench"
VERSION = 1

#: What a variant of kdfast is compared with: each gives the ratio (its time) / (the variant's time), higher is better.
#: Against the triad this is the share of the machine's bandwidth.
AGAINST = (EAGER, COMPILE, TRIAD)


@dataclass(frozen=True)
class Timing:
    """One competitor in one case."""

    rounds_ms: list[float]  # the median step of each round, in the order of the rounds
    page_faults: float | None  # minor, per step, median; None: not counted on this system
    peak_bytes: int | None  # resident memory of one step above what is resident before it, gradient included
    first_step_s: float  # the first step ever, compilation included

    @property
    def ms(self) -> float:
        """Time of one step: the median over the rounds, milliseconds."""
        return statistics.median(self.rounds_ms)


@dataclass(frozen=True)
class CaseResult:
    """All competitors of one case, measured interleaved."""

    case: Case
    timings: dict[str, Timing]
    skipped: dict[str, str] = field(default_factory=dict)  # competitor -> why it was not measured

    def gb_per_s(self, name: str) -> float:
        """The case's floor bytes over the competitor's time, 1e9 bytes a second."""
        return self.case.floor_bytes / self.timings[name].ms / 1e6

    def ratio(self, variant: str, against: str) -> float | None:
        """(time of ``against``) / (time of ``variant``): the median over the rounds of the ratio within a round.

        Both times of a round were taken within seconds of each other, so that a machine that slows down for a while
        does not enter. None where one of the two was not measured.
        """
        if variant not in self.timings or against not in self.timings:
            return None
        mine, theirs = self.timings[variant].rounds_ms, self.timings[against].rounds_ms
        return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))

    def best_ratio(self, variant: str, against: str) -> float | None:
        """The same of the best round of each: what the two can do when nothing disturbs them."""
        if variant not in self.timings or against not in self.timings:
            return None
        return min(self.timings[against].rounds_ms) / min(self.timings[variant].rounds_ms)

    @property
    def variants(self) -> list[str]:
        """The measured settings of kdfast."""
        return [name for name in self.timings if name.startswith(KDFAST)]


@dataclass
class Run:
    """One run of the benchmarks: what the JSON holds."""

    machine: Machine
    created: str  # ISO 8601, UTC
    cases: dict[str, CaseResult] = field(default_factory=dict)

    def to_json(self) -> str:
        """The run as JSON; docs/benchmarks.md describes it."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "version": VERSION,
                "created": self.created,
                "options": {"temperature": TEMPERATURE, "alpha": ALPHA},
                "machine": dataclasses.asdict(self.machine),
                "cases": {name: _case_to_json(result) for name, result in self.cases.items()},
            },
            indent=1,
        )

    @staticmethod
    def read(path: Path) -> Run:
        """The run in a file.

        Raises:
            BenchError: no such file, not a run, another version of the schema, or other options of the loss.
        """
        try:
            data = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            msg = f"{path}: cannot be read as JSON: {error}"
            raise BenchError(msg) from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            msg = f'{path}: not a result of kdfast bench (no "schema": "{SCHEMA}")'
            raise BenchError(msg)
        if data.get("version") != VERSION:
            msg = f"{path}: version {data.get('version')!r} of the format, this kdfast reads {VERSION}: record it anew"
            raise BenchError(msg)
        if data.get("options") != {"temperature": TEMPERATURE, "alpha": ALPHA}:
            msg = f"{path}: was measured with other options of the loss ({data.get('options')!r}): record it anew"
            raise BenchError(msg)
        try:
            cases = {name: _case_from_json(name, entry) for name, entry in data["cases"].items()}
            return Run(Machine(**data["machine"]), str(data["created"]), cases)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"{path}: damaged ({type(error).__name__}: {error}): record it anew"
            raise BenchError(msg) from None


def _case_to_json(result: CaseResult) -> dict[str, Any]:
    """The measurements, and beside them what follows from them, for who reads the file with other tools."""
    return {
        **dataclasses.asdict(result.case),
        "floor_bytes": result.case.floor_bytes,
        "timings": {
            name: {"ms": timing.ms, "gb_per_s": result.gb_per_s(name), **dataclasses.asdict(timing)}
            for name, timing in result.timings.items()
        },
        "ratios": {
            variant: {a: result.ratio(variant, a) for a in AGAINST if a in result.timings}
            for variant in result.variants
        },
        "skipped": result.skipped,
    }


def _case_from_json(name: str, entry: dict[str, Any]) -> CaseResult:
    timings = {
        competitor: Timing(
            rounds_ms=[_positive(ms) for ms in timing["rounds_ms"]],
            page_faults=timing["page_faults"],
            peak_bytes=timing["peak_bytes"],
            first_step_s=timing["first_step_s"],
        )
        for competitor, timing in entry["timings"].items()
    }
    lengths = {len(timing.rounds_ms) for timing in timings.values()}
    if len(lengths) != 1 or 0 in lengths:
        msg = f"{name}: every competitor needs the same number of rounds, at least one"
        raise ValueError(msg)
    return CaseResult(Case.parse(name), timings, dict(entry["skipped"]))


def _positive(x: Any) -> float:
    value = float(x)
    if not 0 < value < float("inf"):
        msg = f"a time of {x!r} ms"
        raise ValueError(msg)
    return value
