"""`kdfast bench`: times the loss beside its competitors, and compares two such runs."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from kdfast.benchmark.cases import Case
    from kdfast.benchmark.compare import Row
    from kdfast.benchmark.results import CaseResult, Run

EXIT_REGRESSION = 1  # slower than the base, or a wrong result
EXIT_USAGE = 2

Measure = Callable[["Case"], "CaseResult"]


def bench(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="The small selection, for a CI: a minute or two.")] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Cases that match, or any DIVERGENCE-ROWSxVOCAB-DTYPE. Repeatable."),
    ] = None,
    competitor: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Competitors that match, besides kdfast. Repeatable.")
    ] = None,
    isa: Annotated[
        str | None, typer.Option(metavar="A,B", help="Measure kdfast under these instruction sets too.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds over all competitors of a case; their median counts.", min=1)] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if not given.", min=1)] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the run as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Show the selected cases and competitors; no run.")] = False,
    compare: Annotated[
        Path | None, typer.Option(metavar="BASE.json", help="Run the cases of this file and compare the ratios.")
    ] = None,
    with_: Annotated[
        Path | None, typer.Option("--with", metavar="NEW.json", help="Compare with this file in place of a run.")
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Exit 1 where a gated ratio is below this share of the base's, such as 0.9."
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Gated ratio: eager (default), torch.compile or triad. Repeatable."),
    ] = None,
) -> None:
    """Time the loss, forward and backward, beside eager PyTorch, torch.compile and the machine's bandwidth.

    The competitors of a case take turns in one process, after their results have been checked against each other. Exit
    code 0: done, and no regression; 1: a regression or a wrong result; 2: wrong use or an unusable file.
    """
    from kdfast.benchmark.errors import BenchError, WrongResultError
    from kdfast.cli.terminal import console

    try:
        failed = _bench(
            console(),
            quick=quick,
            case_patterns=case or [],
            competitor_patterns=competitor or [],
            isas=[] if isa is None else [word.strip() for word in isa.split(",")],
            rounds=rounds,
            threads=threads,
            json=json,
            markdown=markdown,
            list_only=list_only,
            base_file=compare,
            new_file=with_,
            fail_below=fail_below,
            gates=gate,
        )
    except (BenchError, WrongResultError) as error:
        console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True)
        raise typer.Exit(EXIT_USAGE if isinstance(error, BenchError) else EXIT_REGRESSION) from None
    if failed:
        raise typer.Exit(EXIT_REGRESSION)


def _bench(
    console: Console,
    *,
    quick: bool,
    case_patterns: Sequence[str],
    competitor_patterns: Sequence[str],
    isas: Sequence[str],
    rounds: int,
    threads: int | None,
    json: Path | None,
    markdown: Path | None,
    list_only: bool,
    base_file: Path | None,
    new_file: Path | None,
    fail_below: float | None,
    gates: Sequence[str] | None,
) -> bool:
    """Does what the options say; True where the gate fails."""
    import torch
    from rich.text import Text

    from kdfast.benchmark import cases, competitors, tables
    from kdfast.benchmark.compare import DEFAULT_GATES, compare
    from kdfast.benchmark.errors import BenchError
    from kdfast.benchmark.machine import Machine
    from kdfast.benchmark.measure import measure
    from kdfast.benchmark.results import AGAINST, Run
    from kdfast.reporting.outputs import check_file

    if base_file is None and (new_file or fail_below is not None or gates):
        msg = "--with, --fail-below and --gate need --compare BASE.json"
        raise BenchError(msg)
    if gates and fail_below is None:
        msg = "--gate needs --fail-below: without a limit nothing is gated"
        raise BenchError(msg)
    if fail_below is not None and not 0 < fail_below < float("inf"):
        msg = f"--fail-below must be a positive share such as 0.9, got {fail_below}"
        raise BenchError(msg)
    for name in gates or []:
        if name not in AGAINST:
            msg = f"--gate must be one of {', '.join(AGAINST)}, got {name!r}"
            raise BenchError(msg)
    gates = gates or DEFAULT_GATES
    for name, file in {"--json": json, "--markdown": markdown}.items():
        if file is not None:
            try:
                check_file(file, name)
            except OSError as error:
                raise BenchError(str(error)) from error

    base = None if base_file is None else Run.read(base_file)
    if base is not None and new_file is not None:
        new = Run.read(new_file)
        _say_differences(console, base, new)
        return _verdict(console, compare(base, new), fail_below, gates)

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = competitors.select(competitor_patterns, isas)
    if base is not None and not case_patterns and not quick:
        selected = [cases.Case.parse(name) for name in base.cases]
    else:
        selected = cases.select(case_patterns, quick=quick)
    if list_only:
        console.print(tables.cases_grid(selected).rich())
        console.print("competitors: " + ", ".join(c.name for c in chosen))
        return False
    if base is not None:
        _require_common(base, selected)

    run = Run(Machine.here(), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    console.print(str(run.machine), soft_wrap=True)
    if base is not None:
        _say_differences(console, base, run)

    def measure_one(case: cases.Case) -> CaseResult:
        with console.status("") as status:
            return measure(case, chosen, rounds=rounds, say=lambda text: status.update(Text(text)))

    for case in selected:
        run.cases[case.name] = result = measure_one(case)
        console.print(tables.case_grid(result).rich())
        for name, why in result.skipped.items():
            console.print(f"{name} was not measured: {why}")
        _write(run, json, markdown)  # after every case, so that an interrupted run leaves what it has
    if len(selected) > 1:
        console.print(tables.summary_grid(list(run.cases.values())).rich())
    if base is None:
        return False
    rows = _retried(console, base, compare(base, run), fail_below=fail_below, gates=gates, measure_one=measure_one)
    return _verdict(console, rows, fail_below, gates)


def _write(run: Run, json: Path | None, markdown: Path | None) -> None:
    from kdfast.benchmark.tables import run_markdown

    if json is not None:
        json.write_text(run.to_json() + "\n")
    if markdown is not None:
        markdown.write_text(run_markdown(run))


def _require_common(base: Run, selected: Sequence[Case]) -> None:
    """Says before the measuring that nothing could be compared after it."""
    from kdfast.benchmark.errors import BenchError

    if not any(case.name in base.cases for case in selected):
        msg = f"--compare: the base has none of the selected cases; it holds {', '.join(base.cases) or 'none'}"
        raise BenchError(msg)


def _say_differences(console: Console, base: Run, new: Run) -> None:
    differences = base.machine.differences(new.machine)
    if differences:
        text = "; ".join(differences)
        console.print(f"note: the base was measured elsewhere ({text}); ratios may differ for that alone")


def _retried(
    console: Console,
    base: Run,
    rows: list[Row],
    *,
    fail_below: float | None,
    gates: Sequence[str],
    measure_one: Measure,
) -> list[Row]:
    """The rows after a second measurement of the cases that fail, so that a neighbour's job fails no gate."""
    from kdfast.benchmark.compare import better, compare_case

    for name in dict.fromkeys(row.case for row in rows if row.fails(fail_below, gates)):
        console.print(f"{name} is below {fail_below} of the base: measuring it once more")
        again = measure_one(base.cases[name].case)
        rows = better(rows, compare_case(base.cases[name], again))
    return rows


def _verdict(console: Console, rows: Sequence[Row], fail_below: float | None, gates: Sequence[str]) -> bool:
    from kdfast.benchmark.compare import require_gated
    from kdfast.benchmark.tables import comparison_grid

    console.print(comparison_grid(rows, fail_below, gates).rich())
    if fail_below is None:
        return False
    require_gated(rows, gates)
    failures = [row for row in rows if row.fails(fail_below, gates)]
    gated = sum(row.against in gates for row in rows)
    for row in failures:
        console.print(
            f"FAIL {row.case}: {row.variant} was {row.base:.2f} times as fast as {row.against}, now it is "
            f"{row.new:.2f} times: {row.by_median:.3f} of the base, {row.by_best:.3f} in the best rounds, the limit is "
            f"{fail_below}",
            style="red",
            soft_wrap=True,
        )
    if not failures:
        console.print(f"no regression: {gated} gated ratios, none below {fail_below} of the base")
    return bool(failures)
