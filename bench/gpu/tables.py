"""What a run of the suite found, as Markdown."""

from __future__ import annotations

from typing import Any

#: A competitor this close to kdfast, or ahead of it, is listed by itself.
CLOSE = 1.05


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(case: dict[str, Any], ms: float | None, results: dict[str, Any]) -> float | None:
    """Of the copy bandwidth; None where traffic is not the floor."""
    if ms is None or case["floor_bytes"] is None:
        return None
    return float(case["floor_bytes"] / (ms * 1e-3) / results["copy_bytes_per_second"])


def summary(results: dict[str, Any]) -> str:
    """A line per case, for the documentation: kdfast, and the time of all others over its own."""
    machine, rows = results["machine"], []
    for case in results["cases"]:
        ours = case["timings"]["kdfast"]
        ms = ours["milliseconds"]
        others = (
            f"{name} {_cell(timing['milliseconds'] / ms if ms else None, '.2f')}"
            for name, timing in case["timings"].items()
            if name != "kdfast" and timing["milliseconds"] is not None
        )
        share = _cell(_share(case, ms, results), ".2f")
        rows.append([case["name"], _cell(ms, ".3f") if ms else ours["note"], share, "; ".join(others)])
    lines = [["case", "ms", "of copy", "time of others / kdfast"], ["---", "---:", "---:", "---"], *rows]
    said = f"On {machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}; "
    said += f"a copy moves {results['copy_bytes_per_second'] / 1e12:.2f} TB/s:\n\n"
    return said + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """All tables of ``results.json``."""
    machine = results["machine"]
    lines = [
        f"# {machine['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.items() if k != "device"),
        "",
        f"Copy bandwidth, device to device: {results['copy_bytes_per_second'] / 1e12:.2f} TB/s. `of copy` is the share",
        "of it, over the bytes that any implementation moves. Medians of interleaved rounds, caches flushed between",
        'steps. Rows that begin with "bare" are floors: a part of the work that no implementation is spared.',
        "",
        f"Tests on the GPU: {results['tests']}",
        "",
        "| case | competitor | ms | spread | time / kdfast | of copy | peak MiB | note |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    close = []
    for case in results["cases"]:
        ours = case["timings"]["kdfast"]["milliseconds"]
        for name, timing in case["timings"].items():
            ms, peak = timing["milliseconds"], timing["peak_bytes"]
            ratio = None if ms is None or ours is None else ms / ours
            share = _share(case, ms, results)
            cells = [case["name"], name, _cell(ms, ".3f"), _cell(timing["spread"], ".2f"), _cell(ratio, ".2f")]
            cells += [_cell(share, ".2f"), _cell(None if peak is None else peak / 2**20, ".0f"), timing["note"]]
            lines.append(f"| {' | '.join(cells)} |")
            if name != "kdfast" and not name.startswith("bare") and ratio is not None and ratio < CLOSE:
                close.append(f"- {case['name']}: {name} takes {ratio:.2f} of kdfast's time")
    lines += ["", f"## Within {CLOSE - 1:.0%} of kdfast, or ahead of it", "", *(close or ["None."])]
    if results["not_run"]:
        lines += ["", "## Not run: out of time", "", *(f"- {name}" for name in results["not_run"])]
    lines += [
        "",
        "## Largest error of the gradient, over its largest element; of soft targets that of a log-normaliser",
        "",
        "| case | kdfast | eager |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {case['name']} | {case['errors']['kdfast']:.2e} | {case['errors']['eager']:.2e} |"
        for case in results["cases"]
        if case["errors"]
    ]
    lines += [f"| {case['name']} | {case['errors_note']} | |" for case in results["cases"] if case["errors_note"]]
    return "\n".join(lines) + "\n"
