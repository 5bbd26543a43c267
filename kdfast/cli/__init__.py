"""The `kdfast` command.

The package itself needs torch and numpy only. A command that needs more says which extra to install, in place of a
traceback, and `kdfast` itself does the same where typer is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from kdfast.cli.missing import exit_missing


class Command(NamedTuple):
    """Where a command lives, the extra that brings what it imports, and what the list of commands says of it."""

    module: str  # the function has the command's name
    extra: str
    summary: str = ""


#: Every command; a new one is a row here and a module with a function of that name.
COMMANDS = {
    "demo": Command("kdfast.cli.demo", "demo", "Distil a small GPT on Python's own source code."),
    "bench": Command("kdfast.cli.bench", "bench", "Time the loss beside its competitors."),
    "doctor": Command("kdfast.cli.doctor", "demo", "Say what is available here, and what would run."),
    "plan": Command("kdfast.cli.plan", "demo", "Say what a step of each path costs in memory."),
    "cache": Command("kdfast.cli.cache", "demo", "Fill a soft-target cache, and look after it."),
    "report": Command("kdfast.cli.report", "demo", "Measure a student against its teacher."),
    "tune": Command("kdfast.cli.tune", "tune", "Search a temperature, an alpha or any loss weight."),
}

#: Commands that train for minutes. Threads that spin while they wait for one another make that an hour where other
#: processes want the cores: they sleep instead. Not those that measure time alone.
SHARING = ("demo", "tune")


def main() -> None:
    """Runs the command line; the console script's entry point."""
    given = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if given in SHARING:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch's OpenMP is loaded
    try:
        import typer
    except ModuleNotFoundError as error:
        exit_missing("kdfast", error, COMMANDS.get(given or "", COMMANDS["demo"]).extra)
    app = typer.Typer(
        name="kdfast",
        help="Fast, exact knowledge distillation for PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help texts hold square brackets: kdfast[demo]
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        pass

    for name, command in COMMANDS.items():
        loaded = _load(name, command) if name == given else _listed(command)  # which spares torch's import
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=name)
        else:
            app.command(name)(loaded)
    app(prog_name="kdfast")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"kdfast {importlib.metadata.version('kdfast')}")
        sys.exit(0)


def _listed(command: Command) -> Callable[..., Any]:
    """A command that is only listed."""

    def listed() -> None:
        raise NotImplementedError

    there = importlib.util.find_spec(command.module) is not None
    listed.__doc__ = command.summary if there else _not_installed(command)
    return listed


def _not_installed(command: Command) -> str:
    return f'(not installed: pip install "kdfast[{command.extra}]")'


def _load(name: str, command: Command) -> Callable[..., Any]:
    """Returns the command's function or group; a package missing inside it ends in a message, and breaks no other."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(command.module), name)
    except ModuleNotFoundError as error:
        missing = error

        def unavailable() -> None:
            exit_missing(f"kdfast {name}", missing, command.extra)

        unavailable.__doc__ = _not_installed(command)
        return unavailable

    if not inspect.isfunction(function):
        return function

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except ModuleNotFoundError as error:
            exit_missing(f"kdfast {name}", error, command.extra)

    return run
