"""Telling the system what will be read from local files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdfast import _core


def advise(engine: _core.CacheReader, directory: str, entries: Iterable[_core.CacheEntry], most_bytes: int) -> None:
    """Asks the system to read samples ahead, up to ``most_bytes``, where it can be asked.

    A file that cannot be opened is left to the read, which says what is wrong with it.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    by_shard: dict[int, list[tuple[int, int]]] = {}
    for entry in entries:
        most_bytes -= entry.frame_bytes
        if most_bytes < 0:
            break
        by_shard.setdefault(entry.shard, []).append((entry.offset, entry.frame_bytes))
    files = [file for file, *_ in engine.shards] if by_shard else []
    for shard, frames in by_shard.items():
        try:
            descriptor = os.open(os.path.join(directory, files[shard]), os.O_RDONLY)
        except OSError:
            continue
        try:
            for offset, length in sorted(frames):
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
