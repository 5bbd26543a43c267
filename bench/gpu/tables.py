"""What a run of the suite found, as Markdown."""

from __future__ import annotations

from typing import Any

#: A competitor this close to kdfast, or ahead of it, is listed by itself.
CLOSE = 1.05


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bandwidth(results: dict[str, Any]) -> str:
    copy = results["copy_bytes_per_second"]
    return "unknown" if copy is None else f"{copy / 1e12:.2f} TB/s"


def _share(case: dict[str, Any], ms: float | None, results: dict[str, Any]) -> float | None:
    """Of the copy bandwidth; None where traffic is not the floor."""
    if ms is None or case["floor_bytes"] is None or results["copy_bytes_per_second"] is None:
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
    said += f"a copy moves {_bandwidth(results)}:\n\n"
    return said + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """All tables of ``results.json``."""
    machine = results["machine"]
    lines = [
        f"# {machine['device']}",
        "",
        ", ".join(f"{k} {v}" for k, v in machine.items() if k != "device"),
        "",
        f"Copy bandwidth, device to device: {_bandwidth(results)}. `of copy` is the share",
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
        "## Largest error of the gradient, over its largest element; of soft targets that of a log-normaliser, in nats",
        "",
        "| case | kdfast | at | tolerance | eager |",
        "|---|---:|---|---:|---:|",
    ]
    for case in results["cases"]:
        if case["errors"]:
            ours, eager = case["errors"]["kdfast"], case["errors"]["eager"]
            cells = [
                case["name"],
                _error(ours),
                str(ours["index"]),
                f"{case['errors']['tolerance']:.1e}",
                _error(eager),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    notes = [c for c in results["cases"] if c["errors_note"]]
    lines += [f"| {c['name']} | {c['errors_note'].strip().splitlines()[-1].replace('|', '/')} | | | |" for c in notes]
    lines += [
        "",
        "## Launches of a step, and its time in a CUDA graph",
        "",
        "| case | by kdfast | on the device | ms |",
    ]
    lines += ["|---|---:|---:|---:|"]
    for case in results["cases"]:
        counted, graph = case.get("launches"), case.get("captured")
        if counted and graph:
            time = graph["note"] if graph["milliseconds"] is None else f"{graph['milliseconds']:.3f}"
            device = "-" if counted["device"] is None else counted["device"]
            lines.append(f"| {case['name']} | {counted['triton']} | {device} | {time} |")
    return "\n".join(lines) + "\n"


def _error(error: dict[str, Any]) -> str:
    return "not finite" if error["value"] is None else f"{error['value']:.2e}"
