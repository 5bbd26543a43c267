"""A local cache to a remote directory: what others need first, and last the manifest, by which it is found."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from kdfast.cache.error import CacheError
from kdfast.cache.manifest import MANIFEST, manifest, manifest_text
from kdfast.cache.remote.files import RemoteFiles
from kdfast.cache.remote.journal import dropped, finished_part
from kdfast.cache.remote.mirror import parse_manifest

_HEADER = "cache.header"
_JOURNAL = re.compile(r"[0-9a-f]{16}\.journal")
_SHARD_HEADER_BYTES = 32
_TAIL_BYTES = 32


class Push(NamedTuple):
    """What a push did."""

    sent: int  # shards
    sent_bytes: int
    there_already: int  # shards
    samples: int  # in the remote cache now


def push(path: str | os.PathLike[str], url: str, *, storage_options: Mapping[str, Any] | None = None) -> Push:
    """Sends the finished shards of a cache to a remote directory, and what makes them a cache there.

    A shard that is there with the length, headers and index (with its checksum) of ours is not sent again, so that a
    push which was interrupted can be run again, and one after more was written sends what is new. A shard that is still
    open goes with the push after it was finished. Every shard is verified before it is sent. The manifest comes last:
    readers see the old state until then. It is put only if what is there is what was read in the beginning: a first
    one by an exclusive put, where the file system has that; another by comparing just before, and reading it after.

    Args:
        path: directory of the cache.
        url: of the directory, as fsspec takes it.
        storage_options: what fsspec is to be told.

    Raises:
        CacheError: the cache is damaged; another one is there, or one with shards that this one has not; or somebody
            has pushed meanwhile.
        ImportError: fsspec, or its package for such URLs, is not installed.
        OSError and others: of the file system.
    """
    from kdfast import _core

    path = os.fspath(path)
    files = RemoteFiles(url, storage_options)
    before = files.read_if_there(MANIFEST)
    with tempfile.TemporaryDirectory(prefix="kdfast-push-") as staged:
        journals = _stage(path, staged)
        content = manifest(staged)  # which verifies header, journals, and headers and index of every shard
        with open(os.path.join(staged, _HEADER), "rb") as file:
            header = file.read()
        _check_remote(files, before, content, header, journals)
        engine = _core.CacheReader(staged, damaged=False)
        numbers = {file: number for number, (file, *_) in enumerate(engine.shards)}
        files.make()
        sent = sent_bytes = 0
        for shard in content["shards"]:
            local = os.path.join(path, shard["file"])
            if _is_there(files, local, shard["file"], shard["bytes"], len(header)):
                continue
            engine.check_shard(numbers[shard["file"]], local, torch.get_num_threads())
            files.send(local, shard["file"])
            if not _is_there(files, local, shard["file"], shard["bytes"], len(header)):
                what = "the shard did not arrive as it was sent"
                raise CacheError(what, "mismatch", files.path(shard["file"]))
            sent += 1
            sent_bytes += shard["bytes"]
        for name, journal in journals.items():
            _put_journal(files, name, journal)
        if files.read_if_there(_HEADER) is None:
            files.replace(_HEADER, header)
        _put_manifest(files, before, manifest_text(content).encode())
    return Push(sent, sent_bytes, len(content["shards"]) - sent, content["samples"])


def _stage(path: str, staged: str) -> dict[str, bytes]:
    """A directory that is the cache without its unfinished shards; gives its journals back."""
    journals = {}
    for name in os.listdir(path):
        if name == _HEADER or name.endswith(".shard"):
            os.symlink(os.path.abspath(os.path.join(path, name)), os.path.join(staged, name))
        elif _JOURNAL.fullmatch(name):
            with open(os.path.join(path, name), "rb") as file:
                journals[name] = finished_part(file.read())
            with open(os.path.join(staged, name), "wb") as file:
                file.write(journals[name])
    return {name: journal for name, journal in journals.items() if journal}


def _check_remote(
    files: RemoteFiles, before: bytes | None, content: dict[str, Any], header: bytes, journals: dict[str, bytes]
) -> None:
    there = files.read_if_there(_HEADER)
    if there is not None and there != header:
        what = "another cache is there: its header differs"
        raise CacheError(what, "mismatch", files.path(_HEADER))
    if before is None:
        return
    old = parse_manifest(before, files.path(MANIFEST))
    if old.get("header_crc") != content["header_crc"]:
        what = "another cache is there: its manifest is of another header"
        raise CacheError(what, "mismatch", files.path(MANIFEST))
    gone = set().union(*(dropped(journal) for journal in journals.values()))
    ours = {(one["file"], one["bytes"], one["shard_id"]) for one in content["shards"]}
    for one in old["shards"]:
        if (one["file"], one["bytes"], one["shard_id"]) not in ours and int(one["shard_id"], 16) not in gone:
            what = "the cache there has a shard that this one has not: merge the two, and push to another place"
            raise CacheError(what, "mismatch", files.path(one["file"]))


def _is_there(files: RemoteFiles, local: str, name: str, size: int, header_bytes: int) -> bool:
    """Whether a remote shard has the length, the headers, and the index and tail, with their checksums, of ours."""
    if files.size(name) != size:
        return False
    with open(local, "rb") as file:
        head = file.read(header_bytes + _SHARD_HEADER_BYTES)
        file.seek(size - _TAIL_BYTES + 8)
        index_at = int.from_bytes(file.read(8), "little")
        file.seek(index_at)
        end = file.read()
    return files.ranges([(name, 0, len(head)), (name, index_at, size)]) == [head, end]


def _put_journal(files: RemoteFiles, name: str, journal: bytes) -> None:
    there = files.read_if_there(name)
    if there is not None and there.startswith(journal):
        return
    if there is not None and not journal.startswith(there):
        what = "a journal of this name is there that says something else"
        raise CacheError(what, "mismatch", files.path(name))
    files.replace(name, journal)


def _put_manifest(files: RemoteFiles, before: bytes | None, text: bytes) -> None:
    what = "somebody has pushed meanwhile: push again"
    path = files.path(MANIFEST)
    if before is None:
        try:
            files.create(MANIFEST, text)
        except FileExistsError as error:
            raise CacheError(what, "mismatch", path) from error
    elif before != text:
        if files.read_if_there(MANIFEST) != before:
            raise CacheError(what, "mismatch", path)
        files.replace(MANIFEST, text)
    if files.read_if_there(MANIFEST) != text:
        raise CacheError(what, "mismatch", path)
