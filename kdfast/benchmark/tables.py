"""Runs and comparisons as tables: in the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from kdfast.benchmark.cases import Case
from kdfast.benchmark.compare import Row
from kdfast.benchmark.competitors import COMPILE, EAGER, KDFAST, OVERWRITE, TRIAD
from kdfast.benchmark.results import CaseResult, Run

MEBIBYTE = 2**20


@dataclass
class Grid:
    """A table before it is drawn: the first columns are text, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    text_columns: int = 1

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=Text(self.title), title_justify="left", title_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index < self.text_columns else "right", no_wrap="\n" not in name)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """For a document."""
        rule = ["---" if index < self.text_columns else "---:" for index in range(len(self.header))]
        lines = [[name.replace("\n", " ") for name in self.header], rule, *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def case_grid(result: CaseResult) -> Grid:
    """All competitors of one case."""
    grid = Grid(
        result.case.name,
        ["competitor", "ms", "time / kdfast", "GB/s", "of triad", "page faults", "peak MiB", "first step s"],
    )
    for name, timing in result.timings.items():
        relative, share = result.ratio(KDFAST, name), result.ratio(name, TRIAD)
        grid.rows.append(
            [
                name,
                f"{timing.ms:.3g}" if timing.ms < 100 else f"{timing.ms:.0f}",
                _number(relative, "x"),
                f"{result.gb_per_s(name):.1f}",
                _number(share),
                "n/a" if timing.page_faults is None else f"{timing.page_faults:.0f}",
                "n/a" if timing.peak_bytes is None else f"{timing.peak_bytes / MEBIBYTE:.0f}",
                f"{timing.first_step_s:.1f}",
            ]
        )
    return grid


def summary_grid(results: Sequence[CaseResult]) -> Grid:
    """A line per case: what kdfast gains, default and overwriting the logits."""
    header = ["case"]
    for variant in (KDFAST, OVERWRITE):
        short = "default" if variant == KDFAST else "overwrite"
        header += [f"{short}\n{column}" for column in ("ms", "x eager", "x compile", "of triad")]
    grid = Grid("Speed-up of kdfast", header)
    for result in results:
        row = [result.case.name]
        for variant in (KDFAST, OVERWRITE):
            timing = result.timings.get(variant)
            row.append("n/a" if timing is None else f"{timing.ms:.3g}")
            row += [_number(result.ratio(variant, EAGER)), _number(result.ratio(variant, COMPILE))]
            row.append(_number(result.ratio(variant, TRIAD)))
        grid.rows.append(row)
    return grid


def comparison_grid(rows: Sequence[Row], fail_below: float | None, gates: Sequence[str]) -> Grid:
    """Then and now; with a limit, the verdict on what is gated."""
    header = ["case", "variant", "against", "base", "new", "new / base", "of best rounds"]
    grid = Grid("Ratios, time of the other / time of kdfast: higher is better", header, text_columns=3)
    if fail_below is not None:
        grid.header.append("verdict")
    for row in rows:
        cells = [row.case, row.variant, row.against, _number(row.base), _number(row.new), f"{row.by_median:.3f}"]
        cells.append(f"{row.by_best:.3f}")
        if fail_below is not None:
            gated = "ok" if row.against in gates else "not gated"
            cells.append("FAIL" if row.fails(fail_below, gates) else gated)
        grid.rows.append(cells)
    return grid


def cases_grid(cases: Sequence[Case]) -> Grid:
    """What could be measured."""
    grid = Grid("Cases", ["case", "rows", "vocabulary", "dtype", "floor MiB"])
    for case in cases:
        floor = f"{case.floor_bytes / MEBIBYTE:.0f}"
        grid.rows.append([case.name, str(case.rows), str(case.vocab), case.dtype, floor])
    return grid


def run_markdown(run: Run) -> str:
    """The whole run as a document."""
    results = list(run.cases.values())
    parts = [f"Measured {run.created} on {run.machine}.\n", summary_grid(results).markdown()]
    for result in results:
        parts.append(case_grid(result).markdown())
        parts += [f"{name} was not measured: {why}\n" for name, why in result.skipped.items()]
    return "\n".join(parts)


def _number(x: float | None, unit: str = "") -> str:
    """Three digits, however large."""
    if x is None:
        return "n/a"
    return (f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}") + unit
