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

# Okabe and Ito's palette: told apart by readers who do not see all colours. Grey is for what is compared against.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#6B7280"
INK = "#1F2937"

_STYLE: Any = {
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
    fitted: tuple[Sequence[float], Sequence[float]]  # the points once the logits are rescaled


def curve_panels(panels: Sequence[Panel], smoothing: int = 1) -> str:
    """Draws panels side by side; `smoothing` is the number of steps a moving average runs over."""
    with mpl.rc_context(_STYLE):
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
        return _data_uri(figure)


def bar_panels(panels: Sequence[tuple[str, str, Sequence[Bar]]]) -> str:
    """Draws horizontal bars, one panel for each (title, format of a value, bars)."""
    with mpl.rc_context(_STYLE):
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
        return _data_uri(figure)


def reliability_panels(models: Sequence[Reliability]) -> str:
    """Draws accuracy over confidence for each model; the size of a dot is the share of tokens in its bin."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.0), layout="constrained")
        axes_row = np.atleast_1d(figure.subplots(1, len(models), sharey=True))
        for axes, model in zip(axes_row, models, strict=True):
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
            axes.plot(*model.points, color=model.colour, linewidth=1.2)
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
        return _data_uri(figure)


def stacked_bars(names: Sequence[str], parts: Sequence[tuple[str, str, Sequence[float]]], x_label: str) -> str:
    """Draws one horizontal bar for each name, made of (part, colour, length for each name)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 1.1 + 0.5 * len(names)), layout="constrained")
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
        return _data_uri(figure)


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


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
