"""The page of ``kdfast tune``, made from its figures alone, and the same in the terminal."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kdfast.reporting import plots
from kdfast.reporting.pages import template
from kdfast.reporting.plots import DISTILLED, INK, Ranged
from kdfast.reporting.table import interval, plus_minus
from kdfast.reporting.words import counted
from kdfast.tuning import landscapes
from kdfast.tuning.result import near_sentences
from kdfast.tuning.space import format_settings, format_value

MOST_PAIRS = 6
SHOWN = 8  # trials in the terminal
FORM = "{:.5g}"


def render(figures: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        figures: as :func:`kdfast.tuning.tune` returns them, read back from JSON.
    """
    return template(Path(__file__).with_name("page.html.j2")).render(
        r=figures,
        found=figures["recommendation"],
        ordered=_ordered(figures),
        near=near_sentences(figures),
        plots=_plots(figures),
        interval=interval,
        form=FORM,
        settings_text=format_settings,
        value_text=format_value,
    )


def trials_table(figures: dict[str, Any]) -> Table:
    """The best trials, for the terminal."""
    sign = "more" if figures["maximize"] else "less"
    trials = counted(len(figures["trials"]), "trial")
    shown = f"the best {SHOWN} of {trials}" if len(figures["trials"]) > SHOWN else trials
    table = Table(
        title=f"{figures['metric']} ({sign} is better), {counted(len(figures['seeds']), 'seed')}",
        caption=f"{shown}; ± is half a 95 % interval",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("trial", *figures["searched"], "mean", "from the best", "seeds"):
        table.add_column(name, justify="right")
    for row in _ordered(figures)[:SHOWN]:
        table.add_row(
            str(row["number"]),
            *(format_value(row["settings"][name]) for name in figures["searched"]),
            "-" if row["mean"] is None else FORM.format(row["mean"]),
            _from_best(row, figures),
            str(len(row["values"])),
        )
    return table


def finalists_table(figures: dict[str, Any]) -> Table:
    """The finalists and the baseline on fresh seeds, for the terminal."""
    found = figures["recommendation"]
    table = Table(
        title=f"on {counted(len(figures['confirm_seeds']), 'fresh seed')}, ± half a 95 % interval",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("settings")
    table.add_column("mean", justify="right")
    if found["baseline"]:
        table.add_column("from the baseline", justify="right")
    for row in [*found["finalists"], *([found["baseline"]] if found["baseline"] else [])]:
        cells = [format_settings(row["settings"]), plus_minus(row["mean"], FORM)]
        if found["baseline"]:
            cells.append(plus_minus(row["from_baseline"], "{:+.3g}") if "from_baseline" in row else "baseline")
        table.add_row(*cells)
    return table


def _ordered(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Trials with all seeds first, best first; then those dropped, by how far they came."""
    sign = -1 if figures["maximize"] else 1

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return -len(row["values"]), 0.0 if row["from_best"] is None else sign * row["from_best"]["value"]

    return sorted(figures["trials"], key=order)


def _from_best(row: dict[str, Any], figures: dict[str, Any]) -> str:
    if row["number"] == figures["best"]:
        return "best"
    return row["state"] if row["from_best"] is None else plus_minus(row["from_best"], "{:+.3g}")


def _plots(figures: dict[str, Any]) -> dict[str, Any]:
    sign = -1 if figures["maximize"] else 1
    measured = [row for row in figures["trials"] if row["from_best"] is not None]
    worse = [sign * row["from_best"]["value"] for row in measured]
    best = next(i for i, row in enumerate(measured) if row["number"] == figures["best"])
    axes = [
        landscapes.Axis(name, [row["settings"][name] for row in measured], held)
        for name, held in figures["searched"].items()
    ]
    whole = [row["state"] == "complete" for row in measured]
    found = figures["recommendation"]
    bars = [Ranged(_title(i), DISTILLED[0], *_against(row)) for i, row in enumerate(found["finalists"])]
    if found["baseline"]:
        bars.append(Ranged("baseline", INK, 0.0, None, None))
    return {
        "pairs": [
            landscapes.heatmap(x, y, worse, best)
            for x, y in itertools.islice(itertools.combinations(axes, 2), MOST_PAIRS)
        ],
        "slices": [landscapes.slices(axis, worse, whole, best) for axis in axes],
        "finalists": plots.dots(
            "Change against the baseline" if found["baseline"] else "Change against the best", bars
        ),
    }


def _title(place: int) -> str:
    return "the search's best" if place == 0 else f"its number {place + 1}"


def _against(row: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    one = row["from_baseline"] or row["from_best"]
    if one is None:
        return 0.0, None, None
    return one["value"], one["low"], one["high"]
