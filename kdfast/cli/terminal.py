"""How the commands write to a terminal, and how they quote themselves there."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

WIDE = 140  # columns of a file or a CI's log, which have no width of their own


def console(*, stderr: bool = False) -> Console:
    """The console of a command.

    What is printed is text: paths, keys and messages may hold square brackets, as kdfast[triton] does, which rich would
    take for its markup and leave out.
    """
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


def program() -> list[str]:
    """The words that start this program again from the same shell: not all have its folder in their PATH."""
    started = sys.argv[0]
    if Path(started).name == "__main__.py":
        return [sys.executable, "-m", "kdfast"]
    found = shutil.which("kdfast")
    if not os.path.isfile(started) or (found is not None and os.path.samefile(found, started)):
        return ["kdfast"]
    inside = os.path.relpath(started)  # the whole path comes from PATH or from make; a short one reads better
    return [started if inside.startswith(os.pardir) else inside]


def again(command: str, options: Mapping[str, Any]) -> str:
    """The command line that gives these options once more.

    Args:
        command: its name.
        options: by their names; True is a flag, a list repeats its option, None and False are left out.
    """
    words = [*program(), command]
    for name, value in options.items():
        if value is True:
            words.append(name)
        elif isinstance(value, list | tuple):
            words += [word for one in value for word in (name, str(one))]
        elif value is not None and value is not False:
            words += [name, str(value)]
    return shlex.join(words)
