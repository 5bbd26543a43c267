"""Whether results can be written, asked before the work that they come from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn


def check_file(path: str | os.PathLike[str], argument: str) -> None:
    """Tries whether a file can be written, and leaves everything as it is.

    Args:
        path: of the file; its folder must be there.
        argument: what the user calls it, ``--json``.

    Raises:
        OSError: it cannot; the message names argument, path and reason.
    """
    file = Path(path)
    if not file.parent.is_dir():
        _refuse(argument, path, f"there is no folder {file.parent}")
    try:
        if file.is_dir():
            _refuse(argument, path, "it is a folder, name a file")
        if file.is_file():
            with file.open("ab"):
                pass
        elif not file.exists():  # a pipe or a device is left alone: opening it is felt on its other side
            _try_folder(file.parent)
    except OSError as error:
        if error.strerror is None:  # ours
            raise
        _refuse(argument, path, error.strerror)


def check_folder(path: str | os.PathLike[str], argument: str, names: Iterable[str] = ()) -> None:
    """Tries whether files can be written into a folder, which may not be there yet, and leaves everything as it is.

    Args:
        path: of the folder.
        argument: what the user calls it, ``--out``.
        names: files that will be written into it.

    Raises:
        OSError: they cannot; the message names argument, path and reason.
    """
    folder = Path(path)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        _refuse(argument, path, f"{there} is no folder")
    try:
        _try_folder(there)
    except OSError as error:
        _refuse(argument, path, error.strerror or str(error))
    for name in names:
        if (folder / name).exists():
            check_file(folder / name, argument)


def _try_folder(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):  # access() knows nothing of a read-only mount, nor of root's powers
        pass


def _refuse(argument: str, path: str | os.PathLike[str], reason: str) -> NoReturn:
    msg = f"{argument} {os.fspath(path)} cannot be written: {reason}"
    raise OSError(msg)
