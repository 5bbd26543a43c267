"""REPORT.md: what failed, what to change, what to keep."""

from __future__ import annotations

from typing import Any

from bench.gpu.tables import CLOSE, markdown

#: Lines of a failure's cause that the report holds; the log has all.
LINES = 40
#: Share of the copy bandwidth from which on a kernel of memory is as good as done.
GOOD = 0.8


def report(results: dict[str, Any]) -> str:
    """The whole report, for a person, of what is known so far."""
    parts = [_verdict(results), _failures(results), _changes(results), _keeps(results), _phases(results)]
    parts += [_compilation(results), markdown(results)]
    return "\n".join(part for part in parts if part)


def _verdict(results: dict[str, Any]) -> str:
    failures, cases = len(results["failures"]), len(results["cases"])
    late = len(results["not_run"])
    said = "Nothing failed" if not failures else f"{failures} failures"
    measured = f"{cases} cases measured, {late} not for want of time; tests: {results['tests']}"
    if not cases and not results.get("tiles"):
        measured = f"no case was measured, so that nothing is proven; tests: {results['tests']}"
    return f"# Report\n\n{said}; {measured}. After {results.get('seconds', 0)} s.\n"


def _failures(results: dict[str, Any]) -> str:
    lines = ["## What failed", ""]
    for failure in results["failures"]:
        where = f" (logs/{failure['log']})" if failure["log"] else ""
        why = failure["why"].splitlines()
        cut = [f"... {len(why) - LINES} lines before"] if len(why) > LINES else []
        lines += [
            f"- **{failure['what']}**{where}",
            "",
            "  ```",
            *(f"  {w}" for w in [*cut, *why[-LINES:]]),
            "  ```",
            "",
        ]
    return "\n".join([*lines, *([] if results["failures"] else ["Nothing.", ""])])


def _ours(case: dict[str, Any]) -> float | None:
    ms: float | None = case["timings"]["kdfast"]["milliseconds"]
    return ms


def _share(case: dict[str, Any], results: dict[str, Any]) -> float | None:
    ms, copy = _ours(case), results["copy_bytes_per_second"]
    return case["floor_bytes"] / (ms * 1e-3) / copy if ms and copy and case["floor_bytes"] else None


def _others(case: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of those that kdfast is held against: not of itself, nor of a bare part of the work."""
    timed = {name: timing["milliseconds"] for name, timing in case["timings"].items()}
    return {name: ms for name, ms in timed.items() if ms is not None and not name.startswith(("kdfast", "bare"))}


def _changes(results: dict[str, Any]) -> str:
    lines = [f"- {said}" for said in results.get("tiles", {}).get("changes", [])]
    for row in results.get("compilation", []):
        if row["spills"]:
            lines.append(f"- {row['call']}, {row['kernel']}: spills {row['spills']} bytes at {row['tile']} columns and "
                         f"{row['warps']} warps: another tile in kernels/triton/tiles.json")  # fmt: skip
    if results.get("rehearsal"):
        lines.append("- A rehearsal: its times are those of the interpreter, and say nothing.")
        return "\n".join(["## What to change", "", *lines, ""])
    for case in results["cases"]:
        ms, share = _ours(case), _share(case, results)
        if ms is None:
            continue
        for name, theirs in _others(case).items():
            if theirs < CLOSE * ms:
                lines.append(f"- {case['name']}: {name} takes {theirs / ms:.2f} of kdfast's time")
        graph = (case.get("captured") or {}).get("milliseconds")
        if graph is not None and graph < 0.8 * ms:
            lines.append(
                f"- {case['name']}: {graph:.3f} ms in a CUDA graph, {ms:.3f} without: the host's launches bound it"
            )
        if share is not None and share < GOOD / 2:
            lines.append(f"- {case['name']}: {share:.2f} of the copy bandwidth")
    return "\n".join(["## What to change", "", *(lines or ["Nothing that the figures show."]), ""])


def _keeps(results: dict[str, Any]) -> str:
    lines = []
    for case in results["cases"]:
        ms, share = _ours(case), _share(case, results)
        others = list(_others(case).values())
        if ms is None or not case.get("right") or (others and min(others) < CLOSE * ms):
            continue
        said = [f"{min(others) / ms:.2f} times as fast as the next"] if others else []
        said += [f"{share:.2f} of the copy bandwidth"] if share is not None else []
        lines.append(f"- {case['name']}: right, {ms:.3f} ms" + "".join(f", {x}" for x in said))
    return "\n".join(["## What to keep", "", *(lines or ["Nothing was shown to be right and ahead."]), ""])


def _phases(results: dict[str, Any]) -> str:
    lines = ["## Phases", "", "| phase | items | ended as | note |", "|---|---:|---|---|"]
    for name, phase in results["phases"].items():
        states = ", ".join(f"{n} {state}" for state, n in phase["states"].items())
        lines.append(f"| {name} | {phase['items']} | {states} | {phase['note']} |")
    return "\n".join([*lines, ""])


def _compilation(results: dict[str, Any]) -> str:
    rows = results.get("compilation", [])
    if not rows:
        return ""
    lines = [
        "## Compilation",
        "",
        "| call | kernel | tile | warps | registers | spilled | shared |",
        "|---|---|" + "---:|" * 5,
    ]
    keys = ("call", "kernel", "tile", "warps", "registers", "spills", "shared")
    return "\n".join([*lines, *(f"| {' | '.join(str(row[k]) for k in keys)} |" for row in rows), ""])
