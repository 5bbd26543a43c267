"""Writes the tables of the documentation from the recorded runs: `python -m bench.tables`.

A page says where a table goes: everything between ``<!-- bench:begin NAME -->`` and ``<!-- bench:end -->`` is written
here, by that name in ``REGIONS``, once for each machine that has its file in ``bench/results/MACHINE/``:

* ``bench.json``: ``kdfast bench --json``
* ``head.json``, ``sparse.json``, ``soft_targets.json``, ``cache.json``, ``cache_sizes.json``, ``cache_fidelity.json``,
  ``cache_growth.json``: ``--json`` of these scripts
* ``nightly.json``: ``python -m bench.nightly --json``
* ``gpu.json``: ``results.json`` of ``python -m bench.gpu``
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import cache, cache_fidelity, cache_growth, cache_sizes, nightly, soft_targets, sparse
from bench.gpu.tables import summary
from bench.turns import Turns, read, table
from kdfast.benchmark.cases import DTYPES
from kdfast.benchmark.competitors import COMPILE, EAGER, KDFAST, OVERWRITE, TRIAD
from kdfast.benchmark.results import CaseResult, Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench", "results")

#: The cases that the README shows.
SELECTION = (
    "forward_kl-512x128256-fp32",
    "forward_kl-512x128256-bf16",
    "reverse_kl-512x128256-bf16",
    "jsd-512x128256-bf16",
    "forward_kl-2048x32000-fp32",
    "forward_kl-8192x1000-fp32",
)

#: What the calls of bench/head.py are called in a table.
CALLS = {"two heads": "`distill_loss(LMHead, LMHead)`", "cross-entropy": "`distill_loss(LMHead, labels=y)`"}


@dataclass(frozen=True)
class Region:
    """A table: the file of a machine that it shows, how, and what stands there while no machine has one."""

    file: str
    text: Callable[[Path], str]
    absent: str = "No run is recorded.\n"


def _number(x: float | None, form: str) -> str:
    return "n/a" if x is None else format(x, form)


def _mebibytes(x: float | None) -> str:
    return "n/a" if x is None else f"{x / 2**20:.0f}"


def _machine(machine: dict[str, Any]) -> str:
    fixed = "{cpu}, {isa}, {threads} threads, huge pages {huge_pages}, torch {torch}, commit {commit}"
    return fixed.format(**machine)


# --- The dense loss ---------------------------------------------------------------------------------------------------


def _dense_row(result: CaseResult) -> list[str]:
    def ratio(variant: str, against: str, form: str) -> str:
        value = result.ratio(variant, against)
        return _number(value, form) + ("x" if value is not None and against != TRIAD else "")

    measured = result.timings
    peaks = (measured[name].peak_bytes if name in measured else None for name in (KDFAST, COMPILE, EAGER))
    return [
        result.case.name,
        f"{measured[KDFAST].ms:.1f}",
        ratio(KDFAST, EAGER, ".0f"),
        ratio(KDFAST, COMPILE, ".1f"),
        _number(measured[OVERWRITE].ms if OVERWRITE in measured else None, ".1f"),
        ratio(OVERWRITE, COMPILE, ".1f"),
        ratio(OVERWRITE, TRIAD, ".2f"),
        " / ".join(map(_mebibytes, peaks)),
    ]


def _dense(run: Run, results: Iterable[CaseResult]) -> str:
    header = ["case", "ms", "over eager", "over torch.compile", "overwriting, ms", "over torch.compile", "of triad"]
    rows = [_dense_row(result) for result in results]
    return f"On {_machine(vars(run.machine))}:\n\n" + table([*header, "peak MiB: kdfast / compile / eager"], rows)


def _dense_all(file: Path) -> str:
    run = Run.read(file)
    return _dense(run, run.cases.values())


def _dense_selection(file: Path) -> str:
    run = Run.read(file)
    return _dense(run, [run.cases[name] for name in SELECTION if name in run.cases])


# --- What took turns in a script of bench/ ----------------------------------------------------------------------------


def _on(sections: Iterable[Turns]) -> str:
    """Machine and sizes, said once where all sections share them."""
    said = {f"{_machine(s.machine)}; {', '.join(f'{k} {v}' for k, v in s.sizes.items())}": None for s in sections}
    return f"On {' and '.join(said)}:\n\n"


def _heads(loss: str) -> Callable[[Path], str]:
    def text(file: Path) -> str:
        found = {name: s for name, s in read(file).items() if name.startswith(loss)}
        columns = {dtype: [s for name, s in found.items() if name.endswith(f", {dtype}")] for dtype in DTYPES}
        names = dict.fromkeys(name for s in found.values() for name in (*s.rounds_ms, *s.missing))
        rows = []
        for name in names:
            row, peaks = [CALLS[loss] if name == "kdfast" else name], []
            for sections in columns.values():
                measured = next((s for s in sections if name in s.rounds_ms), None)
                row.append(_number(measured.ratio(name, "kdfast") if measured else None, ".2f"))
                peaks.append(_mebibytes(measured.peak_bytes[name] if measured else None))
            rows.append([*row, " / ".join(peaks)])
        missing = {f"\nNot measured: {name}: {why}\n": None for s in found.values() for name, why in s.missing.items()}
        return (
            _on(found.values())
            + table(["time / kdfast", *columns, f"peak MiB: {' / '.join(columns)}"], rows)
            + "".join(missing)
        )

    return text


def _ratios(rows: dict[str, tuple[str, str]], corner: str) -> Callable[[Path], str]:
    """A table of ratios, (slow, fast) by what they are called, a column per dtype."""

    def text(file: Path) -> str:
        found = read(file)
        cells = [[name, *(f"{found[d].ratio(*pair):.2f}" for d in DTYPES)] for name, pair in rows.items()]
        return _on(found.values()) + table([corner, *DTYPES], cells)

    return text


def _cache(file: Path) -> str:
    """Speeds of the stores, a section a column."""
    found = {name: section for name, section in read(file).items() if name in cache.SPEEDS}
    names = dict.fromkeys(name for section in found.values() for name in section.rounds_ms)
    rows = []
    for name in names:
        row = []
        for title, section in found.items():
            measured = name in section.rounds_ms
            row.append(f"{cache.SPEEDS[title].of(section.sizes, section.ms(name)):.3g}" if measured else "")
        rows.append([name, *row])
    why = {name: reason for section in reversed(found.values()) for name, reason in section.missing.items()}
    missing = [f"\nNot measured: {name}: {reason}\n" for name, reason in why.items()]
    header = ["", *(f"{name}, {cache.SPEEDS[name].unit}" for name in found)]
    return _on(found.values()) + table(header, rows) + "".join(missing)


def _cache_fidelity(file: Path) -> str:
    return cache_fidelity.listing(cache_fidelity.read(file))


def _cache_growth(file: Path) -> str:
    return cache_growth.listing(cache_growth.read(file))


def _cache_sizes(file: Path) -> str:
    return cache_sizes.listing(cache_sizes.read(file))


def _nightly(file: Path) -> str:
    return nightly.listing(nightly.read(file))


def _gpu(file: Path) -> str:
    return summary(json.loads(file.read_text()))


REGIONS = {
    "dense": Region("bench.json", _dense_all),
    "dense-selection": Region("bench.json", _dense_selection),
    "two-heads": Region("head.json", _heads("two heads")),
    "linear-cross-entropy": Region("head.json", _heads("cross-entropy")),
    "sparse": Region(
        "sparse.json",
        _ratios({loss: (loss, sparse.CROSS_ENTROPY) for loss in sparse.LOSSES}, "time over the cross-entropy alone"),
    ),
    "soft-targets": Region("soft_targets.json", _ratios(soft_targets.RATIOS, "")),
    "cache": Region("cache.json", _cache),
    "cache-fidelity": Region("cache_fidelity.json", _cache_fidelity),
    "cache-growth": Region("cache_growth.json", _cache_growth),
    "cache-sizes": Region("cache_sizes.json", _cache_sizes),
    "nightly": Region("nightly.json", _nightly, "No run of the whole is recorded yet.\n"),
    "gpu": Region("gpu.json", _gpu, "No run on a GPU is recorded yet.\n"),
}

_MARKED = re.compile(r"(<!-- bench:begin (?P<name>[a-z-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)


def rewritten(page: str, root: Path) -> str:
    """A page with its tables as the recorded runs have them."""

    def fill(marked: re.Match[str]) -> str:
        region = REGIONS[marked["name"]]
        files = sorted((root / RESULTS).glob(f"*/{region.file}"))
        return marked[1] + ("\n".join(map(region.text, files)) or region.absent) + marked[3]

    page, filled = _MARKED.subn(fill, page)
    if filled != page.count("<!-- bench:") / 2:
        msg = f"markers that are no pair of bench:begin NAME and bench:end, beside {filled} that are"
        raise ValueError(msg)
    return page


def pages(root: Path) -> Iterator[Path]:
    """Those that may hold tables."""
    yield from (root / "README.md", *sorted((root / "docs").glob("*.md")))


def main() -> int:
    """Exit code 1 where ``--check`` finds a page that is not as it would be written."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    given = parser.parse_args()
    stale = False
    for page in pages(given.root):
        before = page.read_text()
        after = rewritten(before, given.root)
        if after != before:
            stale = True
            print(f"{page}: {'stale: run python -m bench.tables' if given.check else 'written'}")
            if not given.check:
                page.write_text(after)
    return int(stale and given.check)


if __name__ == "__main__":
    sys.exit(main())
