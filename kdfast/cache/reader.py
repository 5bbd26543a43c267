"""Soft targets from disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from kdfast.cache.batch import Batch, fitting
from kdfast.cache.error import CacheError
from kdfast.cache.keys import Key, TokenIds, key_text, token_hash
from kdfast.cache.metadata import metadata
from kdfast.cache.packing import packed
from kdfast.cache.prefetch import advise
from kdfast.cache.remote.files import is_url
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets

if TYPE_CHECKING:
    from kdfast import _core
    from kdfast.cache.remote.reading import RemoteShards

#: What the shards of remote caches take in the local folder at most.
LOCAL_BYTES = 32 << 30
#: Files that a reader has open at most.
OPEN_FILES = 64
#: What the entries that one call gives back take at most, unless they are stored in a 64th of that.
READ_BYTES = 1 << 30
#: What to read: a sample, or some of its tokens.
Selector: TypeAlias = Key | tuple[Key, slice]

_KEYS_AT_ONCE = 4096
_ADVISED_BYTES = 256 << 20
_MOST_OPEN_FILES = 1 << 16
_PIECE_ENTRIES = 1 << 20
_MOST_EXPANSION = 64  # of stored bytes in memory, beyond which read_bytes counts: full rows take at most half of it


class Shard(NamedTuple):
    """A file of a cache, as far as it is committed."""

    file: str
    bytes: int
    samples: int
    tokens: int
    finished: bool


class Sample(NamedTuple):
    """What the index says of a sample."""

    tokens: int
    kept: int  # K
    method: str
    tier: str  # "fixed", "compact" or "drawn"


class Reader:
    """Gives stored soft targets back, by key; a wrong or missing value is always an error.

    Opening reads header and journals and, of the shards that the index of the directory has not, such as those of a
    writer that is at work, their indices; not the samples. What the index has takes no memory: a key is looked up in
    it, and what is found is held against the sample. Every block is verified against its checksum when it is read. A
    reader may be used by many threads, in processes forked from its own (the workers of a DataLoader), and may be
    pickled. It sees what was committed when it was opened; of samples that a repair has moved since, the copies. Up to
    64 MiB of memory that targets have left is kept for the next.

    What the entries of a token are to each other (no id twice, no mass above 1) is verified when a block is first read,
    and remembered of the last million blocks.

    A remote cache is opened by its indices; a shard is fetched whole when it is first read, verified, and kept in a
    local folder that any number of processes and caches share. What its manifest said then is what the reader sees.

    Args:
        path: directory of the cache, or a URL of one as fsspec takes it (``s3://bucket/dir``).
        damaged: what to do about damage that hides keys, as of a shard that is gone: "raise", or, in a directory,
            "skip" to read the rest; :attr:`damage` then lists it.
        local_cache: for a URL, the folder; None: ``kdfast`` in the user's cache folder.
        local_bytes: for a URL, what the shards in that folder take at most; those used longest ago leave.
        storage_options: for a URL, what fsspec is to be told.
        open_files: shards that are kept open at most; the one used longest ago is closed for the next. Where all are
            being read a thread more has one more open, while it reads.
        read_bytes: what the entries that one call gives back may take, or 64 times what they take on disk, if that is
            more: rows of 65535 places may be stored in six bytes each, where none of them is in use.

    Raises:
        CacheError: no cache is there, or it is damaged.
        ImportError: a URL without fsspec, or without its package for such URLs.
        OSError and others: of the remote file system, here and in reads.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        damaged: Literal["raise", "skip"] = "raise",
        local_cache: str | os.PathLike[str] | None = None,
        local_bytes: int = LOCAL_BYTES,
        storage_options: Mapping[str, Any] | None = None,
        open_files: int = OPEN_FILES,
        read_bytes: int = READ_BYTES,
    ) -> None:
        if damaged not in ("raise", "skip"):
            msg = f'damaged must be "raise" or "skip", got {damaged!r}'
            raise ValueError(msg)
        for name, value, most in (("open_files", open_files, _MOST_OPEN_FILES), ("read_bytes", read_bytes, 1 << 62)):
            if not isinstance(value, int) or not 1 <= value <= most:
                msg = f"{name} must be a whole number from 1 to {most}, got {value!r}"
                raise ValueError(msg)
        path = os.fspath(path)
        remote = None
        if is_url(path):
            if damaged == "skip":
                msg = f'damaged="skip" is for a directory, {path} is a URL'
                raise ValueError(msg)
            from kdfast.cache.remote.reading import RemoteOptions, RemoteShards

            folder = None if local_cache is None else os.fspath(local_cache)
            options = RemoteOptions(folder, local_bytes, None if storage_options is None else dict(storage_options))
            remote = RemoteShards(path, options)
        self._open(path, damaged, remote, open_files, read_bytes)

    def _open(
        self,
        path: str,
        damaged: Literal["raise", "skip"],
        remote: RemoteShards | None,
        open_files: int,
        read_bytes: int,
    ) -> None:
        from kdfast import _core

        self.path = path
        self._options = damaged, remote, open_files, read_bytes
        self._remote = remote
        self._read_bytes = read_bytes
        directory = path if remote is None else remote.directory
        self._engine = _core.CacheReader(directory, damaged=damaged == "skip", open_files=open_files)
        if remote is not None:
            remote.open(self._engine)
        header = self._engine.header
        #: V of every sample.
        self.vocab_size: int = header["vocab_size"]
        #: Temperatures at which every sample is exact.
        self.temperatures: tuple[float, ...] = tuple(header["temperatures"])
        #: 1: row i of a sample is the distribution of token i + 1; 0: of item i itself.
        self.shift: int = header["shift"]
        #: What the writer said of teacher and tokenizer.
        self.metadata = metadata(header["metadata"], self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, *self._options)

    def shards(self) -> list[Shard]:
        """The files that hold samples."""
        return [
            Shard(file, size, samples, tokens, finished)
            for file, size, samples, tokens, _, finished in self._engine.shards
        ]

    @property
    def indexed_shards(self) -> int:
        """Shards whose samples are found by the index of the directory; of the others every key is in memory."""
        return self._engine.indexed_shards

    @property
    def damage(self) -> list[CacheError]:
        """What could not be read, with ``damaged="skip"``."""
        return self._engine.damage

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._engine)

    def keys(self) -> Iterator[str]:
        """The keys, in the order in which their samples lie on disk."""
        keys = self._engine.keys()
        while some := keys.next(_KEYS_AT_ONCE):
            yield from some

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return key_text(key) in self._engine

    def tokens(self, key: Key) -> int:
        """S, the number of tokens of a sample."""
        return self._engine.find(key_text(key)).tokens

    def describe(self, key: Key) -> Sample:
        """A sample's number of tokens S, its K, method and tier, without reading it.

        Raises:
            CacheError: a key that is not there, or whose frames differ.
        """
        entry = self._engine.find(key_text(key))
        return Sample(entry.tokens, entry.kept, entry.method, entry.tier)

    def __getitem__(self, selector: Selector) -> SparseTargets:
        """``reader[key]``, or ``reader[key, start:stop]`` for some tokens, without the rest of the sample."""
        return self.read([selector])[0]

    def _pieces(self, key: Key) -> Iterator[SparseTargets]:
        """A sample from its first token on, in as many tokens at a time as are small: at least one piece."""
        entry = self._engine.find(key_text(key))
        at_once = max(1, _PIECE_ENTRIES // entry.kept)
        for first in range(0, max(1, entry.tokens), at_once):
            yield self[key, first : first + at_once]

    def read(
        self,
        keys: Iterable[Selector],
        token_ids: Sequence[TokenIds | None] | None = None,
        *,
        out: list[SparseTargets] | None = None,
    ) -> list[SparseTargets]:
        """Samples, or ranges of them, in the order asked for; read in the order of the disk, on torch's threads.

        Args:
            keys: of samples; (key, slice) for some of the tokens of one.
            token_ids: for each key the token ids (S,) of the whole sample as the caller has it, or None: that they are
                those the targets were made from is then checked.
            out: what an earlier call gave back, for as many keys, one by one of as many tokens and the same fields: its
                tensors are filled anew, which saves fresh memory and objects. Where the call raises they hold anything.

        Returns:
            For each key targets (S, K), or (stop - start, K): a list, which is ``out`` where that is given.

        Raises:
            CacheError: a key that is not there, data that are damaged, or token ids that are others.
            IndexError: a slice with a step.
            ValueError: targets that would take more than ``read_bytes``, or do not fit ``out``.
        """
        selection = self._select(keys, token_ids)
        given, stored = selection.bytes
        if given > max(self._read_bytes, _MOST_EXPANSION * stored):
            msg = (
                f"the targets of {len(selection)} selections would take {given} bytes, of {stored} that are stored: "
                f"read fewer of them, or ranges, or pass read_bytes={given} to the reader"
            )
            raise ValueError(msg)
        batch = Batch(selection.groups, self.vocab_size, self.temperatures) if out is None else fitting(out, selection)
        self._serve(selection.shards, lambda files: selection.read(batch.addresses, torch.get_num_threads(), files))
        return batch

    def packed(
        self, keys: Iterable[Selector], token_ids: Sequence[TokenIds | None] | None = None
    ) -> list[PackedTargets]:
        """What :meth:`read` gives, still packed: for a GPU, which unpacks it where the loss needs it.

        Checksums and values are verified here as :meth:`read` does.

        Args:
            keys: as for :meth:`read`.
            token_ids: as for :meth:`read`.

        Returns:
            For each key :class:`kdfast.PackedTargets` (S, K), or (stop - start, K), on the CPU.

        Raises:
            CacheError: as :meth:`read`.
            IndexError: as :meth:`read`.
            ValueError: a sample that is not of the fixed tier.
        """
        return packed(self._select(keys, token_ids), self._serve, self.vocab_size, self.temperatures)

    def prefetch(self, keys: Iterable[Selector]) -> None:
        """Says what will be read, the soonest first, so that it is on its way before it is asked for.

        Of a remote cache threads fetch the shards of these keys, up to half of ``local_bytes``; a shard that could not
        be fetched is an error of the read that needs it. Another call takes the place of what has not begun. In a
        directory the system is advised to read the samples, up to 256 MiB of them, where it takes advice.

        Raises:
            CacheError: a key that is not there.
        """
        selection = self._engine.select(keys, key_text)
        entries = [selection.entry(i) for i in range(len(selection))]
        if self._remote is None:
            advise(self._engine, self.path, entries, _ADVISED_BYTES)
        else:
            self._remote.prefetch(dict.fromkeys(entry.shard for entry in entries))

    def _select(self, keys: Iterable[Selector], token_ids: Sequence[TokenIds | None] | None) -> _core.CacheSelection:
        selection = self._engine.select(keys, key_text)
        if token_ids is not None:
            if len(token_ids) != len(selection):
                msg = f"token_ids of {len(token_ids)} samples for {len(selection)} keys"
                raise ValueError(msg)
            for i, ids in enumerate(token_ids):
                if ids is not None:
                    self._check_tokens(selection.key(i), selection.entry(i), ids)
        return selection

    def _serve(self, shards: Iterable[int], use: Callable[[dict[int, str]], None]) -> None:
        """Calls ``use`` with the files of shards that lie elsewhere, some of them at a time; else once, with none."""
        if self._remote is None:
            use({})
        else:
            self._remote.serve(shards, use)

    def _details(self, entry: _core.CacheEntry) -> tuple[float, int | None, int, int, int]:
        found = []
        self._serve([entry.shard], lambda files: found.append(self._engine.details(entry, files)))
        return found[0]

    def _check_tokens(self, key: str, entry: _core.CacheEntry, token_ids: TokenIds) -> None:
        stored = entry.token_hash
        if stored is None:
            what = "the sample was written without token_ids, so that these cannot be checked"
            raise CacheError(what, "misaligned", self.path, key)
        length = len(token_ids)
        if length != entry.tokens:
            what = f"the data set has {length} tokens, the targets were made from {entry.tokens}"
            raise CacheError(what, "misaligned", self.path, key)
        if token_hash(token_ids, entry.tokens, key) != stored:
            what = "the token ids are not those that the targets were made from"
            raise CacheError(what, "misaligned", self.path, key)


def _reopened(
    path: str,
    damaged: Literal["raise", "skip"],
    remote: RemoteShards | None,
    open_files: int = OPEN_FILES,
    read_bytes: int = READ_BYTES,
) -> Reader:
    reader = Reader.__new__(Reader)
    reader._open(path, damaged, remote, open_files, read_bytes)
    return reader
