"""docs/methods-results.md, from the files of results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.suite.methods import LABELS
from examples.training import spread
from kdfast.reporting.uncertainty import student_t

HEAD = """# Methods compared

Written by `python -m examples.suite` from `examples/results/*.json`; do not edit.

Each method trains the same student from the same first weights on the same batches, once for each seed, with the
published weight or the one that the table states; nothing was tuned for these tasks, neither the methods nor labels
alone. Teacher, training examples and held-out examples are the same for all seeds: deviations are those of first
weights and batches. Accuracy is held-out, in per cent, mean +- sample deviation over the seeds. The difference to
labels alone is paired by seed, with its 95 % interval (Student's t): a method **helps** or **hurts** where the interval
leaves out 0; otherwise (-) these seeds do not tell. No correction was made for the number of methods: of twenty that do
nothing, one is expected to leave out 0. Seconds are of a student's training on one thread of a machine that was busy
with other work, a rough order only. An order of methods on such small tasks is not one on ImageNet.
"""


def difference(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and half the width of its 95 % interval (infinite for one pair)."""
    found = [a - b for a, b in zip(ours, base, strict=True)]
    if len(found) < 2:
        return statistics.fmean(found), math.inf
    half = student_t(len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return statistics.fmean(found), half


def verdict(mean: float, half: float) -> str:
    """What the interval says."""
    return "helps" if mean - half > 0 else "hurts" if mean + half < 0 else "-"


def table(results: dict[str, Any]) -> str:
    """One task: a heading, what it is, and a row for each method, best first; of the seeds that all methods have."""
    methods = results["methods"]
    seeds = sorted(set.intersection(*(set(row["runs"]) for row in methods.values())), key=int)
    base = _values(methods[LABELS], seeds, "accuracy")
    settings = results["settings"]
    lines = [
        f"## {results['title']}",
        "",
        f"Teacher {results['teacher']['accuracy']:.2f} %, {results['teacher']['parameters']:,} parameters; student "
        f"{results['student']['parameters']:,}. {len(seeds)} seeds, {settings['epochs']} epochs of batches of "
        f"{settings['batch']}, Adam at {settings['lr']:g} with a cosine to 0, {settings['test']:,} held-out examples.",
        "",
        "| method | weights | accuracy | less labels alone | | agrees with the teacher | s |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(methods, key=lambda name: -statistics.fmean(_values(methods[name], seeds, "accuracy")))
    for name in order:
        row = methods[name]
        accuracy = _values(row, seeds, "accuracy")
        mean, half = difference(accuracy, base)
        against, said = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]", verdict(mean, half)
        if name == LABELS:
            against = said = ""
        agreement, seconds = (
            spread(_values(row, seeds, "agreement"), 1),
            statistics.fmean(_values(row, seeds, "seconds")),
        )
        cells = (name, row["setting"], spread(accuracy), against, said, agreement, f"{seconds:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(folder: Path) -> str:
    """The whole page: its head, a table of each task, and what was written by hand below them.

    Args:
        folder: of the results; ``notes.md`` there is what a person made of them.
    """
    files = sorted(folder.glob("*.json"))
    tables = [table(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    notes = folder / "notes.md"
    closing = [notes.read_text(encoding="utf-8")] if notes.exists() else []
    return "\n".join([HEAD, *tables, *closing])


def _values(row: dict[str, Any], seeds: Sequence[str], figure: str) -> list[float]:
    return [row["runs"][seed][figure] for seed in seeds]
