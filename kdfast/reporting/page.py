"""The page of ``kdfast.report``, made from its figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdfast.reporting import plots
from kdfast.reporting.pages import template
from kdfast.reporting.plots import LABELS_ONLY, PARTS, TEACHER, Ranged, Reliability, student_colour
from kdfast.reporting.table import interval
from kdfast.reporting.verdict import verdict

OUTCOMES = (
    ("inherited", "inherited", PARTS[0]),
    ("other", "wrong otherwise", PARTS[1]),
    ("corrected", "corrected", PARTS[2]),
)
SQUARE = (3.4, 3.4)  # inches


def render(figures: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        figures: of a :class:`kdfast.reporting.report.Report`.
    """
    models = figures["models"]
    return template(Path(__file__).parent / "templates" / "report.html.j2").render(
        r=figures,
        teacher=models[0],
        students=[model for model in models if model["role"] == "student"],
        others=models[1:],
        language=figures["task"] == "language model",
        unit="token" if figures["task"] == "language model" else "example",
        plots=_plots(figures),
        interval=interval,
        verdict=lambda name: verdict(figures, name),
        labels=bucket_labels(figures["entropy_buckets"]),
        megabytes=lambda n: f"{n / 1e6:,.2f}" if n >= 1e4 else f"{n / 1e6:.4f}",
    )


def bucket_labels(buckets: Sequence[Mapping[str, Any]]) -> list[str]:
    """From where to where each bucket goes, in as few digits as tell all ends of the buckets apart."""
    for digits in range(2, 18):
        ends = [[f"{end:.{digits}g}" for end in dict.fromkeys((row["low"], row["high"]))] for row in buckets]
        labels = [" to ".join(pair) for pair in ends]
        if len(set(labels)) == len(labels) and all(len(set(pair)) == len(pair) for pair in ends):
            break
    return labels


def _plots(figures: dict[str, Any]) -> dict[str, Any]:
    models = figures["models"]
    others = models[1:]
    students = (model["name"] for model in models if model["role"] == "student")
    colour = {name: student_colour(i) for i, name in enumerate(students)}
    colour |= {
        model["name"]: TEACHER if model["role"] == "teacher" else LABELS_ONLY
        for model in models
        if model["name"] not in colour
    }

    def ranged(model: dict[str, Any], estimate: dict[str, Any], scale: float = 1.0) -> Ranged:
        value, low, high = (None if estimate[k] is None else scale * estimate[k] for k in ("value", "low", "high"))
        return Ranged(model["name"], colour[model["name"]], value, low, high)

    found: dict[str, Any] = {
        "task": [],
        "agreement": [
            plots.interval_bars(
                "Top-1 agreement with the teacher, %",
                "{:.1f}",
                [ranged(m, m["against_teacher"]["agreement"], 100) for m in others],
                100,
            ),
            plots.interval_bars(
                "KL(teacher, model), nats (lower is better)",
                "{:.4f}",
                [ranged(m, m["against_teacher"]["kl"]) for m in others],
            ),
        ],
        "reliability": [],
        "errors": None,
    }
    if models[0]["task"] is not None:
        if figures["task"] == "language model":
            found["task"].append(
                plots.interval_bars(
                    "Perplexity (lower is better)", "{:.2f}", [ranged(m, m["task"]["perplexity"]) for m in models]
                )
            )
        found["task"].append(
            plots.interval_bars("Accuracy, %", "{:.1f}", [ranged(m, m["task"]["accuracy"], 100) for m in models], 100)
        )
        for model in models:
            bins = model["calibration"]["reliability"]
            found["reliability"].append(
                plots.reliability_panels(
                    [
                        Reliability(
                            model["name"],
                            colour[model["name"]],
                            ([row["confidence"] for row in bins], [row["accuracy"] for row in bins]),
                            [row["share"] for row in bins],
                            f"ECE {model['calibration']['ece']:.3f}",
                        )
                    ],
                    SQUARE,
                )
            )
        if models[1]["errors"]["teacher_errors"]:
            found["errors"] = plots.stacked_bars(
                [m["name"] for m in others],
                [(title, tone, [100 * m["errors"][name]["value"] for m in others]) for name, title, tone in OUTCOMES],
                "% of the teacher's errors",
                plots.NARROW,
            )
    buckets = figures["entropy_buckets"]
    ticks = bucket_labels(buckets)
    found["buckets"] = [
        plots.interval_lines(
            title,
            "teacher's entropy, nats",
            ticks,
            [[ranged(m, row["models"][m["name"]][key], scale) for row in buckets] for m in others],
        )
        for title, key, scale in (("KL(teacher, model), nats", "kl", 1.0), ("Top-1 agreement, %", "agreement", 100.0))
    ]
    similarity = figures["similarity"]
    found["similarity"] = [
        plots.heatmap(f"CKA: {name} (rows) and teacher", one["layers"], similarity["teacher_layers"], one["cka"])
        for name, one in (similarity["models"] if similarity else {}).items()
    ]
    return found
