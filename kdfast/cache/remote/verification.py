"""Checking a remote cache, shard by shard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdfast.cache.error import CacheError
from kdfast.cache.reader import LOCAL_BYTES, Reader
from kdfast.cache.remote.reading import default_folder

_KEYS_AT_ONCE = 16


def verify_remote(
    url: str,
    local_cache: str | os.PathLike[str] | None = None,
    local_bytes: int = LOCAL_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[int, int, int, list[CacheError]]:
    """Samples, tokens and bytes of a remote cache, and its faults: of a shard's checksums the first.

    What a reader has kept says nothing of what is there now, so all is fetched again, to a folder of its own in
    ``local_cache``, which is gone afterwards. The arguments are those of :class:`kdfast.cache.Reader`.

    Raises:
        CacheError: no cache is there, or header, journals or indices are damaged.
        ImportError, OSError and others: as of a reader.
    """
    folder = default_folder() if local_cache is None else os.fspath(local_cache)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="verify-") as fresh:
        reader = Reader(url, local_cache=fresh, local_bytes=local_bytes, storage_options=storage_options)
        shards = reader.shards()
        of_shard: list[list[str]] = [[] for _ in shards]
        faults = []
        for key in reader:
            try:
                of_shard[reader._engine.find(key).shard].append(key)
            except CacheError as error:
                if error.code == "duplicate":  # a damaged header is found with its shard
                    faults.append(error)
        for number, keys in enumerate(of_shard):
            try:
                reader._serve([number], lambda _: None)
            except CacheError as error:
                if error.code == "system":  # of this machine: nothing is wrong with the shard
                    raise
                faults.append(error)
                continue
            at = f"{url.rstrip('/')}/{shards[number].file}"
            for first in range(0, len(keys), _KEYS_AT_ONCE):
                faults += _unreadable(reader, keys[first : first + _KEYS_AT_ONCE], at)
    return sum(s.samples for s in shards), sum(s.tokens for s in shards), sum(s.bytes for s in shards), faults


def _unreadable(reader: Reader, keys: Sequence[str], path: str) -> Iterator[CacheError]:
    """What a checksum cannot tell: values that the format forbids."""
    try:
        reader.read(keys)
    except CacheError as error:
        if len(keys) == 1:
            yield CacheError(error.args[0], error.code, path, error.key, error.offset)
            return
        for key in keys:
            yield from _unreadable(reader, [key], path)
