"""What a run of the suite found, as Markdown."""

from __future__ import annotations

from typing import Any

#: A competitor this close to kdfast, or ahead of it, is listed by itself.
CLOSE = 1.05


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(results: dict[str, Any]) -> str:
    """All tables of ``results.json``."""
    machine = results["machine"]
    lines = [
        f"# {machine['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.items() if k != "device"),
        "",
        f"Copy bandwidth, device to device: {results['copy_bytes_per_second'] / 1e12:.2f} TB/s. `of copy` is the share",
        "of it, over the bytes that any implementation moves (read the logits, write the gradient if any). Medians of",
        "interleaved rounds, caches flushed between steps.",
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
            share = None if ms is None else case["floor_bytes"] / (ms * 1e-3) / results["copy_bytes_per_second"]
            cells = [case["name"], name, _cell(ms, ".3f"), _cell(timing["spread"], ".2f"), _cell(ratio, ".2f")]
            cells += [_cell(share, ".2f"), _cell(None if peak is None else peak / 2**20, ".0f"), timing["note"]]
            lines.append(f"| {' | '.join(cells)} |")
            if name != "kdfast" and ratio is not None and ratio < CLOSE:
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
    return "\n".join(lines) + "\n"
