"""The summary of a cache, for people and for readers who cannot list a directory."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from kdfast.cache.error import CacheError
from kdfast.cache.metadata import metadata

MANIFEST = "manifest.json"


def manifest(path: str) -> dict[str, Any]:
    """What ``manifest.json`` should hold, from header, journals and shards (FORMAT.md, section 8)."""
    from kdfast import _core

    reader = _core.CacheReader(path, damaged=False)
    header = reader.header
    shards = [
        {"file": file, "bytes": size, "samples": samples, "tokens": tokens, "shard_id": f"{shard_id:016x}"}
        for file, size, samples, tokens, shard_id, _ in sorted(reader.shards)
    ]
    return {
        "format": 1,
        "header_crc": header["crc"],
        "vocab_size": header["vocab_size"],
        "temperatures": header["temperatures"],
        "shift": header["shift"],
        "metadata": metadata(header["metadata"], path),
        **{name: sum(shard[name] for shard in shards) for name in ("samples", "tokens", "bytes")},
        "shards": shards,
    }


def manifest_text(content: dict[str, Any]) -> str:
    """As it stands in the file."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_manifest(path: str) -> None:
    """Brings the index of the directory up to date, and makes ``manifest.json`` anew, whole or not at all.

    Raises:
        CacheError: the cache cannot be read, or the system refuses.
    """
    from kdfast import _core

    try:
        with locked(path):
            _core.cache_update_index(path)
            _replace(path, manifest_text(manifest(path)))
    except OSError as error:
        what = f"cannot write the manifest: {error.strerror}"
        raise CacheError(what, "system", os.path.join(path, MANIFEST)) from error


def _replace(path: str, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path, prefix=".manifest-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, os.path.join(path, MANIFEST))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Alone among the processes that lock this directory: of manifests, the last one made has then seen the most."""
    try:
        import fcntl
    except ModuleNotFoundError:  # no such locks on this system
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would leave it to a process that was forked meanwhile
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
