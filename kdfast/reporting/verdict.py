"""What a report comes to, in a sentence for each student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdfast.reporting.table import interval


def verdict(figures: Mapping[str, Any], name: str) -> str:
    """Whether distillation helped a student; where no label-only student says so, how it stands beside its teacher.

    By cross-entropy of a language model, by accuracy of a classifier; without labels by the KL from the teacher.

    Args:
        figures: of a :class:`kdfast.reporting.report.Report`.
        name: of the student.
    """
    pairs = {row["second_role"]: row for row in figures["comparisons"] if row["first"] == name}
    language = figures["task"] == "language model"
    if "baseline" in pairs:
        row = pairs["baseline"]
        against = f" against {row['second']}"
        if row["accuracy"] is not None:
            outcome, said = _difference(row, "nats" if language else "accuracy", against)
            how = {1: f"Distillation helped {name}", -1: f"Distillation did not help {name}"}
            return f"{how.get(outcome, f'Whether distillation helped {name} cannot be told')}: {said}."
        if row["kl"] is not None:
            outcome, said = _difference(row, "kl", against)
            how = {1: f"Distillation brought {name} closer to its teacher"}
            how[-1] = f"Distillation brought {name} no closer to its teacher"
            unknown = f"Whether distillation brought {name} closer to its teacher cannot be told"
            return f"{how.get(outcome, unknown)}: {said}."
    row = pairs["teacher"]
    if row["accuracy"] is not None:
        outcome, said = _difference(row, "nats" if language else "accuracy")
        how = {1: f"{name} is better than its teacher", -1: f"{name} is behind its teacher"}
        return f"{how.get(outcome, f'{name} cannot be told from its teacher')}: {said}."
    model = next(model for model in figures["models"] if model["name"] == name)
    agreement = interval(model["against_teacher"]["agreement"], "{:.1f}", 100.0, " %")
    return f"{name} predicts what its teacher predicts at {agreement} of the {'tokens' if language else 'examples'}."


def _difference(row: Mapping[str, Any], key: str, against: str = "") -> tuple[int, str]:
    """1 where the first is better by more than chance explains, -1 where worse, else 0; and how much, in words."""
    form, scale, unit, better = {
        "accuracy": ("{:+.1f}", 100.0, "points of accuracy", 1),
        "nats": ("{:+.4f}", 1.0, "nats a token", -1),
        "kl": ("{:+.4f}", 1.0, "nats of KL", -1),
    }[key]
    estimate = row[key]
    text = f"{interval(estimate, form, scale)} {unit}{against}"
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return 0, f"{text}, with an unknown uncertainty"
    if low <= 0 <= high:
        return 0, f"{text}, which chance may explain"
    return better if low > 0 else -better, f"{text}, more than chance explains"
