"""`kdfast report`: a student beside its teacher, from a factory of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli.cache_errors import EXIT_USAGE, fail
from kdfast.integrations.factory import FactoryError, find

if TYPE_CHECKING:
    from kdfast.demo.display import Display

DEFAULT_OUT = Path("distillation-report")
NEEDED = ("student", "teacher", "loader")


def report(
    *,
    factory: Annotated[
        str,
        typer.Option(
            help="module:function, which returns a mapping or a NamedTuple of student, teacher, loader, and what else "
            "kdfast.report takes, as baseline, causal, layers or describe.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of report.html and report.json.")] = DEFAULT_OUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON in place of the table.")] = False,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Measure a student against its teacher and, where there is one, against a label-only student.

    Task metric, agreement, KL by the teacher's entropy, calibration, errors inherited and corrected, largest
    disagreements, size, latency and similarity by layer.
    """
    import jinja2  # noqa: F401 - what the page needs only at the end is looked for before the models run
    import matplotlib  # noqa: F401

    import kdfast
    from kdfast.cli.terminal import console
    from kdfast.demo.display import Display
    from kdfast.reporting.outputs import check_folder
    from kdfast.reporting.report import HTML_NAME, JSON_NAME

    try:
        check_folder(out, "--out", (HTML_NAME, JSON_NAME))
    except OSError as error:
        fail(str(error), EXIT_USAGE)
    terminal = console(stderr=True)  # what is printed at the end stays alone on the other stream
    terminal.print(f"making the models and the data: {factory}", soft_wrap=True)
    options = _options(factory) | {"out": out} | ({} if title is None else {"title": title})
    try:
        with Display(terminal) as display:
            if isinstance(options["loader"], Iterable):  # what is none is told by the report
                options["loader"] = _Watched(options["loader"], display)
            found = kdfast.report(**options)
    except (TypeError, ValueError, OSError) as error:
        if not _ours(error):
            raise
        fail(str(error), EXIT_USAGE)
    typer.echo(found.json() if as_json else f"{found}\n\nreport: {out / 'report.html'}, figures: {out / 'report.json'}")


def _options(factory: str) -> dict[str, Any]:
    """What the factory returns, by the names of kdfast.report's arguments."""
    import kdfast

    try:
        made = find(factory)()
    except FactoryError as error:
        fail(str(error), EXIT_USAGE)
    except ModuleNotFoundError as error:
        fail(f"--factory {factory}: it needs the package {error.name!r}, which is not installed", EXIT_USAGE)
    if hasattr(made, "_asdict"):
        made = made._asdict()
    if not isinstance(made, Mapping):
        fail(
            f"--factory {factory}: it must return a mapping or a NamedTuple of {', '.join(NEEDED)} and options, got "
            f"{type(made).__name__}",
            EXIT_USAGE,
        )
    known = set(inspect.signature(kdfast.report).parameters) - {"out"}
    missing, unknown = [n for n in NEEDED if n not in made], sorted(map(str, set(made) - known))
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which kdfast.report has not"
        fail(f"--factory {factory}: what it returned {wrong}", EXIT_USAGE)
    return dict(made)


class _Watched:
    """A loader that says how far it has been read."""

    def __init__(self, loader: Iterable[Any], display: Display) -> None:
        self.loader, self.display = loader, display

    def __iter__(self) -> Iterator[Any]:
        self.display.task("batches through all models", len(self.loader) if isinstance(self.loader, Sized) else None)
        for number, batch in enumerate(self.loader, 1):
            yield batch
            self.display.advance(number)
        self.display.note("timing the models, and drawing the page")


def _ours(error: BaseException) -> bool:
    """Whether kdfast raised the error: one of the user's models or loader keeps its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return isinstance(error, OSError) or module.partition(".")[0] == "kdfast"
