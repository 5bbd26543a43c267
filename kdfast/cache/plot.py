"""The picture of `kdfast cache info --plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from kdfast.cache import Histogram, Size, Statistics
from kdfast.reporting.plots import INK, PARTS, STYLE, TEACHER


def write_plot(path: Path, title: str, sizes: Mapping[str, Size], statistics: Statistics | None) -> None:
    """Draws bytes a token by tier and, where there are some, how sure the teacher is.

    Args:
        path: the file; its ending is the format.
        title: above all panels.
        sizes: by tier.
        statistics: of the same samples.
    """
    with mpl.rc_context(STYLE):
        panels = 1 if statistics is None else 3
        figure = Figure(figsize=(4.4 * panels, 3.8), layout=ConstrainedLayoutEngine(w_pad=0.15))
        *histograms, bars = figure.subplots(1, panels, squeeze=False)[0]
        if statistics is not None:
            entropy, tail = histograms
            _draw(entropy, statistics.entropies, TEACHER, statistics.entropy)
            entropy.set_title(f"Teacher entropy: mean {statistics.entropy:.2f} nats (dashed)")
            entropy.set_xlabel("nats a token, at T = 1, the tail as one entry")
            tails = statistics.tails._replace(edges=[10**edge for edge in statistics.tails.edges])
            tail.set_xscale("log")
            _draw(tail, tails, TEACHER, statistics.tail)
            tail.set_title(f"Tail mass: mean {statistics.tail:.2g} (dashed)")
            tail.set_xlabel(f"probability outside the {statistics.kept:.4g} kept entries, at T = 1")
        _draw_sizes(bars, sizes)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
        figure.savefig(path, dpi=150)


def _draw(axes: Axes, histogram: Histogram, colour: str, mean: float) -> None:
    edges, counts = np.asarray(histogram.edges), histogram.counts
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colour, edgecolor="white", linewidth=0.3)
    axes.axvline(mean, color=INK, linestyle="--", linewidth=1.2)
    axes.set_ylabel("tokens")
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_sizes(axes: Axes, sizes: Mapping[str, Size]) -> None:
    values: Sequence[float] = [size.bytes / max(1, size.tokens) for size in sizes.values()]
    axes.barh(range(len(values)), values, color=PARTS[1], height=0.3)
    for row, (value, size) in enumerate(zip(values, sizes.values(), strict=True)):
        axes.annotate(
            f"{value:.1f} bytes a token\n{size.samples:,} samples\n{size.tokens:,} tokens",
            (value, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(values)), list(sizes))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.7 * max(values))
    axes.grid(visible=False, axis="y")
    axes.set_title("Size by tier")
    axes.set_xlabel("bytes a token, without indices")
