"""Checking a remote cache, shard by shard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from kdfast.cache.error import CacheError
from kdfast.cache.reader import LOCAL_BYTES, Reader
from kdfast.cache.remote.reading import default_folder


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
        shards, faults = reader.shards(), []
        for key in reader:
            try:
                reader._engine.find(key)
            except CacheError as error:
                if error.code == "duplicate":  # a damaged header is found with its shard
                    faults.append(error)
        for number, shard in enumerate(shards):
            found: list[CacheError] = []

            def look(files: dict[int, str], number: int = number, found: list[CacheError] = found) -> None:
                found += reader._engine.verify_shard(number, files[number], torch.get_num_threads())

            try:
                reader._serve([number], look)
            except CacheError as error:
                if error.code == "system":  # of this machine: nothing is wrong with the shard
                    raise
                faults.append(error)
            at = f"{url.rstrip('/')}/{shard.file}"
            faults += [CacheError(e.args[0], e.code, at, e.key, e.offset) for e in found]
    return sum(s.samples for s in shards), sum(s.tokens for s in shards), sum(s.bytes for s in shards), faults
