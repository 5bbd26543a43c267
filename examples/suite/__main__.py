"""``python -m examples.suite``: runs what is missing, then writes the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print as show

from examples.suite.page import page, table
from examples.suite.run import task_results
from examples.suite.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results"
PAGE = ROOT / "docs" / "methods-results.md"


def main(
    task: Annotated[list[str] | None, typer.Option(help="digits, transformer or fashion-mnist; all by default")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="paired runs of each method")] = 5,
    seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="one epoch of little data, to see that every method runs")
    ] = False,
    results: Annotated[Path | None, typer.Option(help="folder of the results; what it holds is not run again")] = None,
    to: Annotated[Path | None, typer.Option("--page", help="file of the page")] = None,
) -> None:
    """Compares every method with labels alone, and writes docs/methods-results.md."""
    torch.set_num_threads(1)  # the models are too small for more
    if quick and (results is None or to is None):
        msg = "a quick run says nothing: name other places for it with --results and --page"
        raise typer.BadParameter(msg)
    folder, path = results or RESULTS, to or PAGE
    for name in task or list(TASKS):
        if name not in TASKS:
            msg = f"there is no task {name!r}: {', '.join(TASKS)}"
            raise typer.BadParameter(msg)
        made = TASKS[name](quick=quick)
        found = task_results(made, list(range(seed, seed + seeds)), folder / f"{name}.json", show)
        print(table(found))
    path.write_text(page(folder), encoding="utf-8")
    show(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
