"""Looking after a cache: checking it, saving what can be saved, several into one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kdfast.cache.duplicates import OnDuplicate, keeps_duplicates
from kdfast.cache.error import CacheError
from kdfast.cache.manifest import locked, write_manifest
from kdfast.cache.reader import LOCAL_BYTES
from kdfast.cache.remote.files import is_url


class Verification(NamedTuple):
    """What was looked at, and what was wrong with it."""

    samples: int
    tokens: int
    bytes: int  # of all shards
    faults: list[CacheError]


class Repair(NamedTuple):
    """What a repair did."""

    kept: int  # samples copied out of damaged or unfinished files
    lost: list[CacheError]  # what could not be saved, and why
    done: list[str]  # in words
    in_use: list[str]  # journals of writers that are alive, left as they are


class Merge(NamedTuple):
    """What a merge did."""

    samples: int  # copied
    there_already: int  # left, as their keys were there


def verify(
    path: str | os.PathLike[str],
    *,
    local_cache: str | os.PathLike[str] | None = None,
    local_bytes: int = LOCAL_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> Verification:
    """Checks every checksum and every value of a cache, on torch's threads.

    Of a remote cache every shard is fetched, also where a reader has kept it: the copy says nothing of what is there
    now. Of a shard there whose checksums are wrong the first fault is told.

    Args:
        path: directory of the cache, or a URL of one as :class:`Reader` takes it.
        local_cache: for a URL, where the shards go while they are checked; as for :class:`Reader`.
        local_bytes: for a URL, what they take there at most.
        storage_options: for a URL, what fsspec is to be told.

    Raises:
        CacheError: no cache is there, or its header cannot be read; at a URL, or its journals or indices.
        ImportError: a URL without fsspec, or without its package for such URLs.
        OSError and others: of the remote file system.
    """
    from kdfast import _core

    if is_url(os.fspath(path)):
        from kdfast.cache.remote.verification import verify_remote

        return Verification(*verify_remote(os.fspath(path), local_cache, local_bytes, storage_options))
    return Verification(*_core.cache_verify(os.fspath(path), torch.get_num_threads()))


def repair(path: str | os.PathLike[str]) -> Repair:
    """Copies the good samples of damaged or unfinished files to a new one and gives the old ones up.

    What was never committed is not looked for. Writers that are alive are left alone. A repair that is interrupted can
    be run again. An index of the directory that is damaged, or of what is given up, is made anew.

    Raises:
        CacheError: no cache is there, or neither its header nor a shard's copy of it can be read.
        ValueError: a URL.
    """
    from kdfast import _core

    if is_url(os.fspath(path)):
        msg = f"repair is for a directory, {path} is a URL: repair the cache that it was pushed from, and push again"
        raise ValueError(msg)
    # A writer that ends meanwhile makes an index, whose beginnings would be taken for what a crash has left.
    with locked(os.fspath(path)) if os.path.isdir(path) else contextlib.nullcontext():
        done = Repair(*_core.cache_repair(os.fspath(path)))
    write_manifest(os.fspath(path))
    return done


def merge(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    shard_bytes: int = 1 << 30,
    on_duplicate: OnDuplicate = "error",
) -> Merge:
    """Copies the samples of some caches, byte for byte, into another, which is made where there is none.

    All caches are looked at before anything is copied or made, as far as their indices tell: that they are caches with
    the same header, and no key with different token ids in two of them; samples of one key and the same token ids are
    compared. Every sample is verified as it is copied.

    Args:
        sources: directories of caches.
        destination: directory of the cache that they go to, whose own samples come first.
        shard_bytes: a file that has as many is finished, and the next begun.
        on_duplicate: where samples of one key and the same token ids have other targets, as those on another grid do:
            "error", or "keep" the first.

    Raises:
        CacheError: caches whose headers differ, damage in a source, or samples of one key in two of them that differ.
        ValueError: no source, a URL, or an unknown ``on_duplicate``.
    """
    from kdfast import _core

    if not sources:
        msg = "merge needs at least one source"
        raise ValueError(msg)
    paths = [os.fspath(source) for source in sources]
    for url in filter(is_url, [*paths, os.fspath(destination)]):
        msg = f"merge is for directories, {url} is a URL: copy its files to a directory, merge there, push the result"
        raise ValueError(msg)
    keep = keeps_duplicates(on_duplicate)
    merged = Merge(*_core.cache_merge(paths, os.fspath(destination), shard_bytes, keep))
    write_manifest(os.fspath(destination))
    return merged
