"""The `kdfast` command.

The package itself needs torch and numpy only. A command that needs more says which extra to install, in place of a
traceback, and `kdfast` itself does the same where typer is missing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from kdfast.cli.missing import exit_missing


class Command(NamedTuple):
    """Where a command lives, and the extra that brings what it imports."""

    module: str  # the function has the command's name
    extra: str


#: Every command; a new one is a row here and a module with a function of that name.
COMMANDS = {
    "demo": Command("kdfast.cli.demo", "demo"),
    "bench": Command("kdfast.cli.bench", "bench"),
    "doctor": Command("kdfast.cli.doctor", "demo"),
    "plan": Command("kdfast.cli.plan", "demo"),
    "cache": Command("kdfast.cli.cache", "demo"),
    "report": Command("kdfast.cli.report", "demo"),
    "tune": Command("kdfast.cli.tune", "tune"),
}


def main() -> None:
    """Runs the command line; the console script's entry point."""
    try:
        import typer
    except ModuleNotFoundError as error:
        asked = next((COMMANDS[word] for word in sys.argv[1:] if word in COMMANDS), COMMANDS["demo"])
        exit_missing("kdfast", error, asked.extra)
    app = typer.Typer(
        name="kdfast",
        help="Fast, exact knowledge distillation for PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help texts hold square brackets: kdfast[demo]
    )

    @app.callback()
    def root() -> None:  # a callback keeps the command's name necessary while there is only one
        pass

    for name, command in COMMANDS.items():
        loaded = _load(name, command)
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=name)
        else:
            app.command(name)(loaded)
    app(prog_name="kdfast")


def _load(name: str, command: Command) -> Callable[..., Any]:
    """Returns the command's function or group; a package missing inside it ends in a message, and breaks no other."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(command.module), name)
    except ModuleNotFoundError as error:
        missing = error

        def unavailable() -> None:
            exit_missing(f"kdfast {name}", missing, command.extra)

        unavailable.__doc__ = f'(not installed: pip install "kdfast[{command.extra}]")'
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
