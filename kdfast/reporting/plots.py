"""Figures of a report, each returned as an SVG document in a data URI, so that a page needs no second file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

# A model has its colour on every page: the teacher, a student that learned from labels only, and the distilled ones in
# their order. Okabe and Ito's palette: told apart by readers who do not see all colours.
TEACHER = "#6B7280"
LABELS_ONLY = "#D55E00"
DISTILLED = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PARTS = ("#4C3B76", "#8C7AB8", "#C0B4DC", "#E4DFF0")  # of what a model does or takes: no model's colour, dark to light
GREY = "#6B7280"  # of lines to compare against
INK = "#1F2937"

NARROW = 5.0  # inches: a panel that is read on a phone
LONGEST_NAME = 22  # characters of a layer's path

STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9.5,
    "axes.edgecolor": "#9CA3AF",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "kdfast",  # the same figures give the same bytes
}


@dataclass(frozen=True)
class Curve:
    """One line, with every seed's values; the mean is drawn, and the range of the seeds shaded."""

    name: str
    colour: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Curves that share axes, with an optional level to compare against."""

    title: str
    y_label: str
    curves: Sequence[Curve]
    level: tuple[str, float] | None = None


@dataclass(frozen=True)
class Bar:
    """One bar with its standard deviation (0: not drawn)."""

    name: str
    colour: str
    value: float
    deviation: float


@dataclass(frozen=True)
class Reliability:
    """Bins of one model's top-1 confidence."""

    title: str
    colour: str
    points: tuple[Sequence[float], Sequence[float]]  # mean confidence and accuracy of each bin
    share: Sequence[float]  # of the tokens, in each bin
    note: str
    fitted: tuple[Sequence[float], Sequence[float]] | None = None  # the points once the logits are rescaled


@dataclass(frozen=True)
class Ranged:
    """A value with its interval; None: not known."""

    name: str
    colour: str
    value: float | None
    low: float | None
    high: float | None


def student_colour(number: int) -> str:
    """The colour of a page's distilled student, counted from 0."""
    return DISTILLED[number % len(DISTILLED)]


def curve_panels(panels: Sequence[Panel], smoothing: int = 1) -> str:
    """Draws panels side by side; `smoothing` is the number of steps a moving average runs over."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            for curve in panel.curves:
                _draw_curve(axes, curve, smoothing)
            if panel.level is not None:
                name, value = panel.level
                axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=name)
            axes.set_title(panel.title)
            axes.set_xlabel("step")
            axes.set_ylabel(panel.y_label)
            if panel.curves:
                axes.legend()
        return data_uri(figure)


def bar_panels(panels: Sequence[tuple[str, str, Sequence[Bar]]]) -> str:
    """Draws horizontal bars, one panel for each (title, format of a value, bars)."""
    with mpl.rc_context(STYLE):
        rows = max(len(bars) for _, _, bars in panels)
        figure = Figure(figsize=(10, 0.9 + 0.5 * rows), layout="constrained")
        for axes, (title, value_format, bars) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
        ):
            for row, bar in enumerate(bars):
                axes.barh(row, bar.value, color=bar.colour, height=0.62, xerr=bar.deviation or None)
                text = value_format.format(bar.value)
                if bar.deviation:
                    text += " ± " + value_format.format(bar.deviation)
                axes.annotate(
                    text, (bar.value + bar.deviation, row), xytext=(6, 0), textcoords="offset points", va="center"
                )
            axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlim(right=1.28 * max(bar.value + bar.deviation for bar in bars))
            axes.set_title(title)
        return data_uri(figure)


def reliability_panels(models: Sequence[Reliability], size: tuple[float, float] = (10, 3.0)) -> str:
    """Draws accuracy over confidence for each model; the area of a dot is the share of the predictions in its bin."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes_row = np.atleast_1d(figure.subplots(1, len(models), sharey=True))
        for axes, model in zip(axes_row, models, strict=True):
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
            axes.plot(*model.points, color=model.colour, linewidth=1.2)
            if model.fitted is not None:
                axes.plot(*model.fitted, color=INK, linestyle=":", linewidth=1.2)
            axes.scatter(*model.points, s=12 + 400 * np.asarray(model.share), color=model.colour, alpha=0.75)
            axes.set_title(model.title)
            axes.text(0.04, 0.96, model.note, transform=axes.transAxes, va="top", fontsize=8.5)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1)
            axes.set_aspect("equal")
            axes.set_xticks((0, 0.5, 1))
            axes.set_yticks((0, 0.5, 1))
            axes.set_xlabel("confidence")
        axes_row[0].set_ylabel("accuracy")
        return data_uri(figure)


def stacked_bars(
    names: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]], x_label: str, width: float = 10
) -> str:
    """Draws one horizontal bar for each name, made of (part, colour, length for each name)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 1.1 + 0.5 * len(names)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(names))
        for part, colour, lengths in parts:
            axes.barh(range(len(names)), lengths, left=left, color=colour, height=0.62, label=part)
            left = left + np.asarray(lengths)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        axes.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return data_uri(figure)


def interval_bars(title: str, value_format: str, rows: Sequence[Ranged], most: float | None = None) -> str:
    """Draws one horizontal bar for each value, with its interval; a narrow panel. ``most`` is what values may reach."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 0.9 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        longest = 0.0
        for place, row in enumerate(rows):
            value = row.value
            if value is None:
                axes.annotate("infinite", (0, place), xytext=(6, 0), textcoords="offset points", va="center")
                continue
            known = row.low is not None and row.high is not None
            axes.barh(place, value, color=row.colour, height=0.62)
            end = value
            if row.low is not None and row.high is not None:
                axes.errorbar(value, place, xerr=[[value - row.low], [row.high - value]], color=INK, capsize=3)
                end = max(value, row.high)
            axes.annotate(
                value_format.format(value) + ("" if known else " (interval unknown)"),
                (end, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
            longest = max(longest, end)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.25 * longest or 1.0)
        if most is not None:
            axes.set_xticks([tick for tick in axes.get_xticks() if tick <= most])
        axes.set_title(title)
        return data_uri(figure)


def dots(title: str, rows: Sequence[Ranged]) -> str:
    """Draws one dot with its interval for each value, around 0; a narrow panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 1.1 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
        for place, row in enumerate(rows):
            if row.value is None:
                axes.annotate("unknown", (0, place), xytext=(6, 0), textcoords="offset points", va="center")
                continue
            known = row.low is not None and row.high is not None
            ends = [[row.value - (row.low or 0.0)], [(row.high or 0.0) - row.value]] if known else None
            axes.errorbar(row.value, place, xerr=ends, fmt="o", color=row.colour, capsize=3)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_title(title)
        return data_uri(figure)


def interval_lines(title: str, x_label: str, ticks: Sequence[str], lines: Sequence[Sequence[Ranged]]) -> str:
    """Draws, for each line, its values with their intervals over named places; a narrow panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 3.3), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(lines):
            offset = 0.12 * (number - (len(lines) - 1) / 2)
            known = [(x + offset, p) for x, p in enumerate(line) if p.value is not None]
            x = [place for place, _ in known]
            values = np.array([p.value for _, p in known], dtype=np.float64)
            low = np.array([p.value if p.low is None else p.low for _, p in known], dtype=np.float64)
            high = np.array([p.value if p.high is None else p.high for _, p in known], dtype=np.float64)
            axes.errorbar(
                x,
                values,
                yerr=np.stack([values - low, high - values]) if known else None,
                color=line[0].colour,
                label=line[0].name,
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
        axes.set_xticks(range(len(ticks)), list(ticks), rotation=35, ha="right", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_title(title)
        if len(lines) > 1:
            axes.legend()
        return data_uri(figure)


def heatmap(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """Draws values of 0 to 1 as a table of tones with the numbers in it; a narrow panel. None: a dash."""
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(NARROW, 1.5 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        tones = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=np.float64)
        axes.imshow(tones, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                tone = "white" if v is not None and v > 0.6 else INK
                axes.text(j, i, "-" if v is None else f"{v:.2f}", ha="center", va="center", fontsize=7.5, color=tone)
        axes.set_xticks(range(len(columns)), [_end(name) for name in columns], rotation=35, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), [_end(name) for name in rows], fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("teacher's layer")
        axes.set_title(title)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return data_uri(figure)


def _end(name: str) -> str:
    """The end of a path, which tells layers apart."""
    return name if len(name) <= LONGEST_NAME else f"…{name[-LONGEST_NAME:]}"


def _draw_curve(axes: Axes, curve: Curve, smoothing: int) -> None:
    runs = np.asarray(curve.runs, dtype=np.float64)
    smooth = np.stack([_moving_average(run, smoothing) for run in runs])
    x = np.asarray(curve.x)[len(curve.x) - smooth.shape[1] :]
    if len(runs) > 1:
        axes.fill_between(x, smooth.min(0), smooth.max(0), color=curve.colour, alpha=0.2, linewidth=0)
    axes.plot(x, smooth.mean(0), color=curve.colour, linewidth=1.6, label=curve.name)


def _moving_average(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Averages each value with those before it; the first `length - 1` values have too few and are dropped."""
    length = max(1, min(length, len(values) // 2))
    return np.convolve(values, np.full(length, 1 / length), mode="valid")


def data_uri(figure: Figure) -> str:
    """The figure as SVG in a URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
