"""A report's figures as a short table of text."""

from __future__ import annotations

from typing import Any

from kdfast.reporting.words import counted


def table(figures: dict[str, Any]) -> str:
    """Models by row, with 95 % intervals, then what the students' differences are."""
    language = figures["task"] == "language model"
    timed = figures["latency"]
    header = ["", "parameters", "MB"]
    header += ["nats", "accuracy"] if language else ["accuracy"]
    header += ["agrees", "KL", "ECE", "ms/example"]
    rows = [header]
    for model in figures["models"]:
        task, against = model["task"], model["against_teacher"]
        row = [model["name"], f"{model['parameters']:,}", f"{model['bytes'] / 1e6:.2f}"]
        if language:
            row.append("-" if task is None else interval(task["nats"], "{:.3f}"))
        row.append("-" if task is None else interval(task["accuracy"], "{:.1f}", 100.0, " %"))
        row.append("" if against is None else interval(against["agreement"], "{:.1f}", 100.0, " %"))
        row.append("" if against is None else interval(against["kl"], "{:.4f}"))
        row.append("-" if model["calibration"] is None else f"{model['calibration']['ece']:.3f}")
        row.append("-" if timed is None else f"{timed['models'][model['name']]['ms_per_example']['value']:.3g}")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    data = figures["data"]
    what = counted(data["positions"], "token" if language else "example")
    lines = [f"{figures['title']}: {what}, 95 % intervals in brackets", "", *lines, ""]
    for row in figures["comparisons"]:
        pair = f"{row['first']} less {row['second']}"
        if row["accuracy"] is not None:
            text = interval(row["accuracy"], "{:+.1f}", 100.0)
            lines.append(f"{pair}: {text} points of accuracy, {interval(row['nats'], '{:+.4f}')} nats")
        if row["kl"] is not None:
            text = interval(row["agreement"], "{:+.1f}", 100.0)
            lines.append(f"{pair}: {text} points of agreement, {interval(row['kl'], '{:+.4f}')} nats of KL")
    lines += [f"not measured: {what} ({why})" for what, why in figures["not_measured"].items()]
    return "\n".join(line.rstrip() for line in lines)


def interval(estimate: dict[str, Any], form: str, scale: float = 1.0, unit: str = "") -> str:
    """A value and its interval in brackets, as far as they are known."""
    if estimate["value"] is None:
        return "infinite" if estimate.get("infinite") else "-"
    text = form.format(scale * estimate["value"]) + unit
    if estimate["low"] is None or estimate["high"] is None:
        return text
    return f"{text} [{form.format(scale * estimate['low'])}, {form.format(scale * estimate['high'])}]"


def plus_minus(estimate: dict[str, Any], form: str) -> str:
    """A value and half its interval, as far as they are known."""
    if estimate["value"] is None or estimate["high"] is None:
        return interval(estimate, form)
    return f"{form.format(estimate['value'])} ± {(estimate['high'] - estimate['low']) / 2:.2g}"
