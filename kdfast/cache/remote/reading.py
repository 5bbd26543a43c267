"""Samples of a remote cache, by way of whole shards in a local folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from kdfast.cache.error import CacheError
from kdfast.cache.remote.background import Background
from kdfast.cache.remote.files import RemoteFiles
from kdfast.cache.remote.mirror import mirror
from kdfast.cache.remote.store import Held, ShardStore

if TYPE_CHECKING:
    from kdfast import _core

_PIECE_BYTES, _PIECES = 8 << 20, 4  # of a download: in one request, and at once
_HELD_AT_ONCE = 64
_DAMAGE = {"checksum", "corrupt", "truncated", "mismatch"}


class RemoteOptions(NamedTuple):
    """How a remote cache is read; the fields are arguments of :class:`kdfast.cache.Reader`."""

    local_cache: str | None
    local_bytes: int
    storage_options: dict[str, Any] | None


def default_folder() -> str:
    """``kdfast`` in the user's cache folder: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kdfast")


class RemoteShards:
    """The shards of one state of a remote cache; a pickled one is of the same state, or raises.

    Raises:
        CacheError, ImportError: as :func:`mirror` and :class:`RemoteFiles` say.
    """

    def __init__(self, url: str, options: RemoteOptions, digest: str | None = None) -> None:
        if options.local_bytes <= 0:
            msg = f"local_bytes must be positive, got {options.local_bytes}"
            raise ValueError(msg)
        self._url = url
        self._options = options
        folder = options.local_cache or default_folder()
        self.directory, self._digest = mirror(self._files(), os.path.join(folder, "catalogues"), digest)
        self._store = ShardStore(os.path.join(folder, "shards"), options.local_bytes)
        self._process = 0
        self._prefetching: Background | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteShards, (self._url, self._options, self._digest)

    def open(self, engine: _core.CacheReader) -> None:
        """Fetches for an engine that was opened in :attr:`directory`."""
        self._engine = engine
        self._shards = [(file, size, f"{shard_id:016x}") for file, size, _, _, shard_id, _ in engine.shards]

    def serve(self, shards: Iterable[int], use: Callable[[dict[int, str]], None]) -> None:
        """Calls ``use`` with the files of shards, some of them at a time; fetches those that are not here.

        While it fetches it holds no shard, so that readers which need each other's room do not wait for ever.
        """
        pending = set(shards)
        while pending:
            held = self._held(itertools.islice(sorted(pending), _HELD_AT_ONCE))
            if not held:
                first, *others = sorted(pending)
                background = self._background()
                background.ask(self._fitting(others), keep=True)
                background.wait(first)
                held = {first: self._fetch(first)}
            try:
                use({shard: one.path for shard, one in held.items()})
                pending -= held.keys()
            except CacheError as error:
                for shard, one in held.items():
                    if error.path == one.path and error.code in _DAMAGE and not self._is_as_fetched(shard, one.path):
                        self._store.remove(self._shards[shard][2])
                raise
            finally:
                for one in held.values():
                    one.close()

    def _is_as_fetched(self, shard: int, path: str) -> bool:
        """Whether its checksums are right: what a copy has that was wrong there as well would come again."""
        try:
            self._engine.check_shard(shard, path, 1)
        except CacheError:
            return False
        return True

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetches shards that will be read, the first first, of half of ``local_bytes`` at most."""
        self._background().ask(self._fitting(shards), keep=False)

    def _fitting(self, shards: Iterable[int]) -> list[int]:
        room = self._options.local_bytes // 2
        out = []
        for shard in shards:
            room -= self._shards[shard][1]
            if room < 0:
                break
            out.append(shard)
        return out

    def _held(self, shards: Iterable[int]) -> dict[int, Held]:
        held = {}
        for shard in shards:
            _, size, shard_id = self._shards[shard]
            one = self._store.open(shard_id, size)
            if one is not None:
                held[shard] = one
        return held

    def _background(self) -> Background:
        if self._prefetching is None or self._process != os.getpid():  # threads do not survive a fork
            self._process = os.getpid()
            self._prefetching = Background(lambda shard: self._fetch(shard).close())
        return self._prefetching

    def _fetch(self, shard: int) -> Held:
        file, size, shard_id = self._shards[shard]

        def download(descriptor: int) -> None:
            files = self._files()
            for first in range(0, size, _PIECE_BYTES * _PIECES):
                last = min(size, first + _PIECE_BYTES * _PIECES)
                pieces = [(file, at, min(last, at + _PIECE_BYTES)) for at in range(first, last, _PIECE_BYTES)]
                for (_, start, _), piece in zip(pieces, files.ranges(pieces), strict=True):
                    _write_at(descriptor, piece, start)

        def check(path: str) -> None:
            try:
                self._engine.check_shard(shard, path, 1)
            except CacheError as error:
                what = f"what was fetched is damaged, or the remote cache has changed: {error.args[0]}"
                raise CacheError(
                    what, error.code, f"{self._url.rstrip('/')}/{file}", error.key, error.offset
                ) from error

        return self._store.fetch(shard_id, size, download, check)

    def _files(self) -> RemoteFiles:
        options: Mapping[str, Any] | None = self._options.storage_options
        return RemoteFiles(self._url, options)


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        n = os.pwrite(descriptor, left, at)
        left, at = left[n:], at + n
