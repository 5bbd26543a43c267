"""Whole shards in a local folder of bounded size, shared by the processes of a machine.

A shard is fetched into ``<id>.part`` by whoever holds the lock of that file; the others wait for the lock and find the
shard there. Under its own name it is whole and verified. A shard that is being read is locked too, and is not removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable

from kdfast.cache.error import CacheError
from kdfast.cache.manifest import locked

_SHARD, _PART = ".shard", ".part"
_WAIT_SECONDS = 0.05


class Held:
    """A shard that stays in the folder until it is closed."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        self._descriptor = descriptor

    def close(self) -> None:
        """Lets it go."""
        _release(self._descriptor)


class ShardStore:
    """The folder.

    Args:
        folder: made where it is not there.
        most_bytes: what its shards take at most, those that are being fetched included.
    """

    def __init__(self, folder: str, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        os.makedirs(folder, exist_ok=True)

    def open(self, shard_id: str, size: int) -> Held | None:
        """The shard, if it is here; it counts as used now."""
        path = self._path(shard_id, _SHARD)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, path):
                if os.fstat(descriptor).st_size == size:
                    os.utime(descriptor)
                    return Held(descriptor, path)
                os.unlink(path)
        except BaseException:
            _release(descriptor)
            raise
        _release(descriptor)
        return None

    def fetch(self, shard_id: str, size: int, download: Callable[[int], None], check: Callable[[str], None]) -> Held:
        """The shard, fetched by one process alone where it is not here.

        Args:
            shard_id: its name in the folder.
            size: of all of it.
            download: writes it to a descriptor.
            check: raises where the file at a path is not the shard.

        Raises:
            CacheError: it is larger than the folder may be.
            Exception: of ``download`` and ``check``; nothing is left of it then.
        """
        if size > self.most_bytes:
            what = f"a shard of {size} bytes does not fit into local_bytes={self.most_bytes}"
            raise CacheError(what, "system", self.folder)
        path, part = self._path(shard_id, _SHARD), self._path(shard_id, _PART)
        while True:
            held = self.open(shard_id, size)
            if held is not None:
                return held
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_at(descriptor, part):
                    self._fill(descriptor, part, path, size, download, check)
                    # Whoever makes room may come between the two locks.
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    if _is_at(descriptor, path):
                        return Held(descriptor, path)
            except BaseException:
                _release(descriptor)
                raise
            _release(descriptor)

    def remove(self, shard_id: str) -> None:
        """Takes a shard out, as one that was found damaged; the next read fetches it again."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(shard_id, _SHARD))

    def _path(self, shard_id: str, suffix: str) -> str:
        return os.path.join(self.folder, shard_id + suffix)

    def _fill(
        self,
        descriptor: int,
        part: str,
        path: str,
        size: int,
        download: Callable[[int], None],
        check: Callable[[str], None],
    ) -> None:
        try:
            if os.path.exists(path):  # somebody was done between our look and our lock
                os.unlink(part)
                return
            os.ftruncate(descriptor, 0)  # what a process that was killed has left
            self._reserve(descriptor, size)
            download(descriptor)
            check(part)
            os.fsync(descriptor)
            with locked(self.folder):  # so that whoever adds up what is here sees it under one name
                os.rename(part, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise

    def _reserve(self, descriptor: int, size: int) -> None:
        """Gives the file its size as soon as there is room, which it makes: the shards used longest ago leave."""
        while True:
            with locked(self.folder):
                if self._make_room(size):
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(_WAIT_SECONDS)  # all that is here is being read, or fetched: that ends

    def _make_room(self, size: int) -> bool:
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith((_SHARD, _PART)):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((entry.name.endswith(_SHARD), status.st_mtime_ns, status.st_size, entry.path))
        used = sum(status_size for _, _, status_size, _ in found)
        for _, _, old_size, path in sorted(found):  # what a killed process has left of a shard goes first
            if used + size <= self.most_bytes:
                return True
            if old_size and _remove_unused(path):
                used -= old_size
        return used + size <= self.most_bytes


def _remove_unused(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):
            return False
        os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        _release(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _release(descriptor: int) -> None:
    # Not by closing alone: a process forked meanwhile has a copy of the descriptor, and the lock with it.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
