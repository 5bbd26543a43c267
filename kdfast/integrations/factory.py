"""Functions that a command line names as ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


class FactoryError(ValueError):
    """A name that leads to no function; the message says why."""


def find(name: str, directory: str | None = None) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Args:
        name: what ``--factory`` was given.
        directory: where the module is looked for first, the working directory if not given; then where Python looks.

    Raises:
        FactoryError: no such module or function.
        ModuleNotFoundError: the module imports a package that is missing.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        msg = f"--factory must be module:function, got {name!r}"
        raise FactoryError(msg)
    first = os.getcwd() if directory is None else directory
    if first not in sys.path:  # as `python -m` has it; a console script does not
        sys.path.insert(0, first)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a package that the module imports
        msg = f"--factory {name}: there is no module {error.name!r} in {first} or where Python looks"
        raise FactoryError(msg) from error
    make = getattr(found, function, None)
    if not callable(make):
        msg = f"--factory {name}: {module} has no function {function!r}"
        raise FactoryError(msg)
    return make  # type: ignore[no-any-return]
