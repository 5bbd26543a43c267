"""How the commands of ``kdfast cache`` end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import typer

from kdfast.cache import CacheError
from kdfast.cache.remote.files import is_url
from kdfast.cli.missing import EXIT_USAGE, exit_missing
from kdfast.reporting.outputs import check_file, check_folder

EXIT_FAULTY = 1
EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C

__all__ = ["EXIT_FAULTY", "EXIT_INTERRUPTED", "EXIT_USAGE", "fail", "guarded", "needs", "writable"]


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message and no traceback."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def writable(path: str | os.PathLike[str], argument: str, *, folder: bool = False) -> None:
    """Ends the command where a file, or files in a folder, could not be written once the work is done."""
    if is_url(os.fspath(path)):
        return
    try:
        (check_folder if folder else check_file)(path, argument)
    except OSError as error:
        fail(str(error), EXIT_USAGE)


@contextlib.contextmanager
def needs(who: str, extras: Mapping[str, str]) -> Iterator[None]:
    """Names the extra of a package that is missing; of one that is not among ``extras`` the error goes on."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in extras:
            raise
        exit_missing(who, error, extras[package])


def guarded(call: Any, *arguments: object, **options: object) -> Any:
    """What it returns; a fault of the cache, or of where it lies, is a message, not a traceback."""
    try:
        with needs("a URL", {"fsspec": "remote"}):
            return call(*arguments, **options)
    except CacheError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(EXIT_FAULTY) from None
    except ModuleNotFoundError:
        raise
    except (ImportError, ValueError) as error:  # fsspec says which package a kind of URL needs
        fail(str(error), EXIT_USAGE)
    except OSError as error:
        fail(str(error), EXIT_FAULTY)
