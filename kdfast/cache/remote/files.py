"""The files of one remote directory."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kdfast.cache.error import CacheError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(::|://)")


def is_url(path: str) -> bool:
    """Whether a path is one for fsspec, as ``s3://bucket/dir``, ``memory://dir`` and ``file:///dir`` are."""
    return _URL.match(path) is not None


class RemoteFiles:
    """A directory of a file system of fsspec; what that raises goes on to the caller, but for a file that is not there.

    Belongs to the process and thread that made it, as many of those file systems do.

    Args:
        url: of the directory.
        storage_options: for the file system, as fsspec takes them.

    Raises:
        ImportError: fsspec, or the package of this kind of URL, is not installed.
        ValueError: a kind of URL that fsspec does not know.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        try:
            import fsspec.core
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "fsspec":
                raise
            msg = f'{url} needs the package "fsspec", which is not installed: pip install "kdfast[remote]"'
            raise ModuleNotFoundError(msg, name="fsspec") from error
        self.url = url.rstrip("/")
        self._fs, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
        self._root = root.rstrip("/")
        # Listings that were kept would hide what others have written since.
        self._fs.invalidate_cache()

    def path(self, name: str) -> str:
        """For people."""
        return f"{self.url}/{name}"

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes [start, stop) of files, as many as were asked for; together, where the file system can.

        Raises:
            CacheError: a file that is not there, or ends before.
        """
        names = [name for name, _, _ in wanted]
        parts = self._cat(names, [start for _, start, _ in wanted], [stop for _, _, stop in wanted])
        for (name, start, stop), part in zip(wanted, parts, strict=True):
            if len(part) != stop - start:
                what = f"{len(part)} bytes came, {stop - start} were asked for"
                raise CacheError(what, "truncated", self.path(name), offset=start)
        return parts

    def whole(self, names: Sequence[str]) -> list[bytes]:
        """All of some files.

        Raises:
            CacheError: one that is not there.
        """
        return self._cat(names, [None] * len(names), [None] * len(names))

    def _cat(self, names: Sequence[str], starts: list[Any], stops: list[Any]) -> list[bytes]:
        found = self._fs.cat_ranges([self._at(name) for name in names], starts, stops, on_error="return")
        for name, part in zip(names, found, strict=True):
            if isinstance(part, FileNotFoundError):
                what = "the file is not there"
                raise CacheError(what, "missing", self.path(name)) from part
            if isinstance(part, BaseException):
                raise part
        return [bytes(part) for part in found]

    def read_if_there(self, name: str) -> bytes | None:
        """All of a file, or None."""
        try:
            return self.whole([name])[0]
        except CacheError as error:
            if error.code != "missing":
                raise
            return None

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where it is not there."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(self._at(name))["size"])
        except FileNotFoundError:
            return None

    def make(self) -> None:
        """The directory itself, where the file system has such a thing."""
        self._fs.makedirs(self._root, exist_ok=True)

    def send(self, local: str, name: str) -> None:
        """A local file, straight to its name: one that is interrupted may leave a part of it there."""
        self._fs.put_file(local, self._at(name))

    def replace(self, name: str, data: bytes) -> None:
        """Writes a small file under another name and moves it, so that nobody sees a part of it."""
        temporary = self._at(f".{name}-{uuid.uuid4().hex}")
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, self._at(name))
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what matters
                self._fs.rm_file(temporary)
            raise

    def create(self, name: str, data: bytes) -> None:
        """Writes a small file where none is.

        Raises:
            FileExistsError: one is there.
        """
        try:
            file = self._fs.open(self._at(name), "xb")
        except (NotImplementedError, ValueError):  # a file system that knows the mode of a put only
            self._fs.pipe_file(self._at(name), data, mode="create")
            return
        with file:
            file.write(data)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"
