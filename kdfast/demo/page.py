"""The report of `kdfast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdfast.demo.results import cache_cost, verdict
from kdfast.reporting import plots
from kdfast.reporting.pages import template
from kdfast.reporting.plots import LABELS_ONLY, PARTS, TEACHER, Bar, Curve, Panel, Reliability, student_colour

SMOOTHING = 20  # steps
TIMED = (("model", "model, forward and backward"), ("loss", "loss and its gradient"), ("optimizer", "optimizer"))


def write_report(results: dict[str, Any], path: Path) -> None:
    """Writes the report of a run, one HTML file with everything in it.

    Args:
        results: what `results.json` holds.
        path: the file.
    """
    page = template(Path(__file__).with_name("page.html.j2")).render(
        r=results,
        several=len(results["settings"]["seeds"]) > 1,
        figures=_figures(results),
        smoothing=SMOOTHING,
        verdict=verdict(results),
        cost=cache_cost(results),
    )
    path.write_text(page, encoding="utf-8")


def _figures(results: dict[str, Any]) -> dict[str, str]:
    summary = results["summary"]
    runs = {row["method"]: [run for run in results["students"] if run["method"] == row["method"]] for row in summary}
    colour = {row["method"]: student_colour(i - 1) if i else LABELS_ONLY for i, row in enumerate(summary)}
    title = {row["method"]: row["title"] for row in summary}
    teacher = results["teacher"]["evaluation"]

    def curves(kind: str, term: str) -> list[Curve]:
        lines = []
        for name, group in runs.items():
            values = [run[kind][term] for run in group]
            if values[0]:
                x = group[0][kind].get("step", range(1, len(values[0]) + 1))
                lines.append(Curve(title[name], colour[name], x, values))
        return lines

    models = [("teacher", TEACHER, teacher)]
    models += [(_short(title[name]), colour[name], runs[name][0]["evaluation"]) for name in runs]
    return {
        "training": plots.curve_panels(
            [
                Panel("Soft term: divergence from the teacher", "nats per token", curves("history", "soft")),
                Panel("Hard term: cross-entropy with the labels", "nats per token", curves("history", "hard")),
            ],
            SMOOTHING,
        ),
        "held_out": plots.curve_panels(
            [
                Panel("KL(teacher, student) on held-out text", "nats per token", curves("probes", "soft")),
                Panel(
                    "Cross-entropy on held-out text",
                    "nats per token",
                    curves("probes", "hard"),
                    ("teacher, all held-out text", teacher["nats"]),
                ),
            ]
        ),
        "bars": plots.bar_panels(
            [
                (
                    "Perplexity (lower is better)",
                    "{:.1f}",
                    [Bar("teacher", TEACHER, teacher["perplexity"], 0.0)]
                    + [_bar(row, "perplexity", colour[row["method"]], 1.0) for row in summary],
                ),
                (
                    "Top-1 agreement with the teacher, %",
                    "{:.1f}",
                    [_bar(row, "agreement", colour[row["method"]], 100.0) for row in summary],
                ),
            ]
        ),
        "calibration": plots.reliability_panels(
            [
                Reliability(
                    name,
                    tone,
                    _points(score["reliability"]),
                    [row["share"] for row in score["reliability"]],
                    f"ECE {score['ece']:.3f}\nfitted T {score['fitted_temperature']:.2f}",
                    _points(score["reliability_fitted"]),
                )
                for name, tone, score in models
            ]
        ),
        "time": plots.stacked_bars(
            [row["title"] for row in summary],
            [
                (label, PARTS[i], [row[f"ms_{key}"]["mean"] for row in summary])
                for i, (key, label) in enumerate((*TIMED, ("data", "targets of the batch")))
            ],
            "milliseconds per step",
        ),
    }


def _short(title: str) -> str:
    return title.removeprefix("distilled, ")


def _points(bins: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [row["confidence"] for row in bins], [row["accuracy"] for row in bins]


def _bar(row: dict[str, Any], key: str, colour: str, scale: float) -> Bar:
    return Bar(_short(row["title"]), colour, scale * row[key]["mean"], scale * row[key]["std"])
