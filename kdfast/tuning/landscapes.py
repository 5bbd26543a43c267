"""Figures of a search: how much worse than the best settings are, over one setting and over pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from kdfast.reporting.plots import DISTILLED, GREY, INK, NARROW, STYLE, data_uri
from kdfast.tuning.space import position

MOST_BINS = 6  # of a range


@dataclass(frozen=True)
class Axis:
    """One setting: what a search may choose, and where a value lies from 0 to 1."""

    name: str
    values: Sequence[Any]  # of every trial
    searched: dict[str, Any]  # one of Space.ranges

    def where(self, value: Any) -> float:
        """As :func:`kdfast.tuning.space.position`."""
        return position(self.searched, value)

    @property
    def choices(self) -> Sequence[Any] | None:
        """None: a range."""
        found: Sequence[Any] | None = self.searched.get("choices")
        return found

    def edges(self, bins: int) -> np.ndarray[Any, Any]:
        """Of its cells."""
        return np.linspace(0, 1, (bins if self.choices is None else len(self.choices)) + 1)

    def ticks(self, bins: int) -> tuple[list[float], list[str]]:
        """Where the axis is marked, and how: a range at the edges of its cells, choices in the middle of theirs."""
        if self.choices is not None:
            return [self.where(choice) for choice in self.choices], [_short(choice) for choice in self.choices]
        low, high = self.searched["low"], self.searched["high"]
        places = [float(edge) for edge in self.edges(bins)]
        if self.searched["log"]:
            return places, [_short(low * (high / low) ** edge) for edge in places]
        return places, [_short(low + (high - low) * edge) for edge in places]


def heatmap(x: Axis, y: Axis, worse: Sequence[float], best: int) -> str:
    """Draws the mean of ``worse`` in cells of two settings, a dot for each trial and a ring around the best one.

    Args:
        x: across.
        y: upwards.
        worse: of every trial, 0 or more but for chance.
        best: the index of the best trial.
    """
    bins = max(2, min(MOST_BINS, round(math.sqrt(len(worse)))))
    xs, ys = [x.where(v) for v in x.values], [y.where(v) for v in y.values]
    edges = (x.edges(bins), y.edges(bins))
    counts = np.histogram2d(xs, ys, bins=edges)[0]
    sums = np.histogram2d(xs, ys, bins=edges, weights=np.asarray(worse, dtype=np.float64))[0]
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    # A few bad settings would make all others look alike.
    most = float(np.quantile(means[counts > 0], 0.8)) or 1.0
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(NARROW, NARROW * 0.82), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor("#F3F4F6")
        image = axes.pcolormesh(*edges, np.ma.masked_invalid(means.T), cmap="Blues_r", vmin=0, vmax=most)
        for i, j in itertools.product(range(counts.shape[0]), range(counts.shape[1])):
            if counts[i, j]:
                axes.text(
                    (edges[0][i] + edges[0][i + 1]) / 2,
                    edges[1][j + 1] - 0.012,
                    f"{means[i, j]:.3g}",
                    ha="center",
                    va="top",
                    fontsize=7.5,
                    color="white" if means[i, j] < 0.45 * most else INK,
                )
        axes.scatter(xs, ys, s=14, color="white", edgecolors=INK, linewidths=0.8, zorder=3, clip_on=False)
        axes.scatter(xs[best], ys[best], s=90, facecolors="none", edgecolors=INK, linewidths=2, zorder=4, clip_on=False)
        for axis, put in ((x, axes.set_xticks), (y, axes.set_yticks)):
            put(*axis.ticks(bins))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel(x.name)
        axes.set_ylabel(y.name)
        axes.set_title(f"{x.name} and {y.name}")
        figure.colorbar(image, ax=axes, extend="max", label="worse than the best by")
        return data_uri(figure)


def slices(axis: Axis, worse: Sequence[float], whole: Sequence[bool], best: int) -> str:
    """Draws every trial's ``worse`` over one setting; hollow where it was dropped early."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 3.2), layout="constrained")
        axes = figure.subplots()
        xs = np.asarray([axis.where(v) for v in axis.values])
        kept, height = np.asarray(whole), np.asarray(worse, dtype=np.float64)
        axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
        axes.scatter(xs[~kept], height[~kept], s=26, facecolors="none", edgecolors=DISTILLED[0], label="dropped early")
        axes.scatter(xs[kept], height[kept], s=26, color=DISTILLED[0], label="all seeds")
        axes.scatter(xs[best], height[best], s=90, facecolors="none", edgecolors=INK, linewidths=2, label="best")
        axes.set_xticks(*axis.ticks(4))
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(axis.name)
        axes.set_ylabel("worse than the best by")
        axes.set_title(axis.name)
        axes.legend(fontsize=8)
        return data_uri(figure)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
