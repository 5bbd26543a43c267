"""The catalogue of a remote cache in a local directory, without the samples.

The engine reads of a finished shard its headers, its index and its tail when it opens a cache. A mirror has the shards
as sparse files with just these in place: they take the disk space of the indices, and what is a hole fails its checks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kdfast.cache.error import CacheError
from kdfast.cache.manifest import MANIFEST, locked, manifest
from kdfast.cache.remote.files import RemoteFiles
from kdfast.cache.remote.journal import finished_part

_HEADER = "cache.header"
_FILE = re.compile(r"[0-9a-f]{16}-[0-9]{6}\.(shard|open)")
_SHARD_HEADER_BYTES = 32
_MOST_SHARD_BYTES = 1 << 48
_USUAL_BYTES = 1 << 36  # a file system may refuse to look for the end of what is larger, if it is not there
_LEAST_SAMPLE = 104  # bytes of a frame header
_TAIL = struct.Struct("<QQQI4s")
_INDEX_HEAD = struct.Struct("<8sQQQ")
_INDEX_ENTRY = np.dtype(
    [
        ("offset", "<u8"),
        ("frame_bytes", "<u8"),
        ("token_hash", "V16"),
        ("header_bytes", "<u4"),
        ("tokens", "<u4"),
        ("kept", "<u2"),
        ("key_bytes", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("method", "u1"),
        ("codec", "u1"),
    ]
)
_SAMPLE, _HASHED = 1, 4
_TOGETHER = 64  # shards whose ends are asked for, and in memory, at once
_END_BYTES = 1 << 20  # of a shard's end that are asked for unseen
_PIECE_BYTES, _PIECES = 4 << 20, 16  # of the rest: in one request, and at once
_UNUSED_SECONDS = 30 * 24 * 3600


class RemoteShard(NamedTuple):
    """A shard as the manifest has it."""

    file: str
    bytes: int
    samples: int
    shard_id: str


def parse_manifest(text: bytes, path: str) -> dict[str, Any]:
    """The manifest at ``path``, of which everything that is followed has been checked.

    Raises:
        CacheError: it is not one.
    """

    def refuse(why: str, code: str = "corrupt") -> NoReturn:
        what = f"the manifest {why}"
        raise CacheError(what, code, path)

    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(f"is not JSON: {error}")
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        refuse("is not that of a cache")
    if content.get("format") != 1:
        refuse(f"has format {content.get('format')!r}", "version")
    for shard in content["shards"]:
        if not isinstance(shard, dict) or not all(
            isinstance(shard.get(name), kind)
            for name, kind in (("file", str), ("bytes", int), ("samples", int), ("shard_id", str))
        ):
            refuse("has a shard without its fields")
        if not _FILE.fullmatch(shard["file"]) or not re.fullmatch("[0-9a-f]{16}", shard["shard_id"]):
            refuse("names a shard as none is named")
        if not 0 < shard["bytes"] <= _MOST_SHARD_BYTES or not 0 <= shard["samples"] * _LEAST_SAMPLE <= shard["bytes"]:
            refuse("has a shard of an impossible size")
        if shard["file"].endswith(".open"):
            what = f"{shard['file']} is not finished: close its writer, or repair the cache, then push it"
            raise CacheError(what, "mismatch", path)
    for name in ("samples", "bytes"):
        total = sum(shard[name] for shard in content["shards"])
        if content.get(name) != total:
            refuse(f"says {content.get(name)!r} {name}, its list of shards {total}", "mismatch")
    return content


def mirror(files: RemoteFiles, folder: str, digest: str | None = None) -> tuple[str, str]:
    """The directory in ``folder`` that mirrors a remote cache, made where there is none; and its digest.

    Costs one request for the manifest, where the mirror is there already; else one for the header, one a writer for
    the journals, and two to three ranged ones a shard, of about 48 bytes and a key a sample.

    Args:
        files: of the cache.
        folder: for mirrors, of any caches.
        digest: of the state that has to be mirrored; None: whatever is there now.

    Raises:
        CacheError: the cache is not there, is damaged, has unfinished shards, or is another than ``digest`` says.
    """
    if digest is not None and os.path.isdir(directory := os.path.join(folder, digest)):
        return directory, digest
    text = files.read_if_there(MANIFEST)
    if text is None:
        what = "no cache is there: a remote one is found by its manifest"
        raise CacheError(what, "missing", files.path(MANIFEST))
    found = hashlib.sha256(files.url.encode() + b"\0" + text).hexdigest()[:32]
    if digest is not None and found != digest:
        what = "the remote cache has changed since this reader was opened"
        raise CacheError(what, "mismatch", files.path(MANIFEST))
    os.makedirs(folder, exist_ok=True)
    directory = os.path.join(folder, found)
    with locked(folder):
        if os.path.isdir(directory):
            os.utime(directory)
            return directory, found
        _remove_unused(folder)
        temporary = tempfile.mkdtemp(dir=folder, prefix=".")
        try:
            _fill(temporary, files, parse_manifest(text, files.path(MANIFEST)))
            os.rename(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return directory, found


def _remove_unused(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir() and entry.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(entry.path, ignore_errors=True)


def _fill(directory: str, files: RemoteFiles, expected: dict[str, Any]) -> None:
    shards = [RemoteShard(*(one[name] for name in RemoteShard._fields)) for one in expected["shards"]]
    of_writer: dict[str, set[int]] = {}
    for shard in shards:
        of_writer.setdefault(shard.file[:16], set()).add(int(shard.shard_id, 16))
    header, *journals = files.whole([_HEADER, *(f"{writer}.journal" for writer in of_writer)])
    _write(directory, _HEADER, header)
    for (writer, ids), journal in zip(of_writer.items(), journals, strict=True):
        _write(directory, f"{writer}.journal", finished_part(journal, ids))
    for first in range(0, len(shards), _TOGETHER):
        _fill_shards(directory, files, shards[first : first + _TOGETHER], len(header) + _SHARD_HEADER_BYTES)
    found = manifest(directory)
    if any(found[name] != expected.get(name) for name in ("header_crc", "samples", "tokens", "bytes", "shards")):
        what = "manifest and journals do not say the same of the cache: it is being changed, or was changed by hand"
        raise CacheError(what, "mismatch", files.path(MANIFEST))
    if found["samples"] > _distinct(directory):
        _fill_duplicates(directory, files, shards)


def _fill_shards(directory: str, files: RemoteFiles, shards: list[RemoteShard], head: int) -> None:
    for shard in shards:
        if shard.bytes > _USUAL_BYTES and (there := files.size(shard.file)) != shard.bytes:
            what = f"the shard has {there} bytes, the manifest says {shard.bytes}"
            raise CacheError(what, "mismatch", files.path(shard.file))
    ends = [min(s.bytes, 96 * s.samples + 4096, _END_BYTES) for s in shards]
    wanted = [(s.file, 0, min(head, s.bytes)) for s in shards]
    wanted += [(s.file, s.bytes - n, s.bytes) for s, n in zip(shards, ends, strict=True)]
    parts = files.ranges(wanted)
    sizes = {shard.file: shard.bytes for shard in shards}

    def write(some: list[tuple[str, int, int]], parts: list[bytes]) -> None:
        for (name, start, _), part in zip(some, parts, strict=True):
            _write(directory, name, part, start, sizes[name])

    write(wanted, parts)
    # Of an index that is longer the rest: how long it is its tail says, which was really there, not the manifest.
    pieces = (
        (shard.file, start, min(start + _PIECE_BYTES, shard.bytes - n))
        for shard, n, end in zip(shards, ends, parts[len(shards) :], strict=True)
        if len(end) >= _TAIL.size
        for start in range(_TAIL.unpack(end[-_TAIL.size :])[1], shard.bytes - n, _PIECE_BYTES)
    )
    while some := list(itertools.islice(pieces, _PIECES)):
        write(some, files.ranges(some))


def _write(directory: str, name: str, part: bytes, at: int = 0, size: int | None = None) -> None:
    descriptor = os.open(os.path.join(directory, name), os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        if size is not None:
            file.truncate(size)
        file.seek(at)
        file.write(part)


def _distinct(directory: str) -> int:
    from kdfast import _core

    return len(_core.CacheReader(directory, damaged=False))


def _fill_duplicates(directory: str, files: RemoteFiles, shards: list[RemoteShard]) -> None:
    """The headers of frames of one key that have no token hash: the engine compares these (FORMAT.md, section 7)."""
    entries = [(shard.file, key, entry) for shard in shards for key, entry in _unhashed(directory, shard)]
    times = Counter(key for _, key, _ in entries)
    wanted = [
        (file, int(e["offset"]), int(e["offset"]) + int(e["header_bytes"]))
        for file, key, e in entries
        if times[key] > 1
    ]
    for first in range(0, len(wanted), _TOGETHER):
        some = wanted[first : first + _TOGETHER]
        for (name, start, _), part in zip(some, files.ranges(some), strict=True):
            _write(directory, name, part, start)


def _unhashed(directory: str, shard: RemoteShard) -> Iterator[tuple[bytes, Any]]:
    """Keys and entries of an index that the engine has verified."""
    with open(os.path.join(directory, shard.file), "rb") as file:
        file.seek(-_TAIL.size, os.SEEK_END)
        _, at, length, _, _ = _TAIL.unpack(file.read(_TAIL.size))
        file.seek(at)
        index = file.read(length)
    count = _INDEX_HEAD.unpack_from(index)[2]
    entries = np.frombuffer(index, _INDEX_ENTRY, count, _INDEX_HEAD.size)
    key_at = _INDEX_HEAD.size + entries.nbytes
    for entry in entries:
        key = index[key_at : key_at + int(entry["key_bytes"])]
        key_at += len(key)
        if entry["kind"] == _SAMPLE and not entry["flags"] & _HASHED:
            yield key, entry
