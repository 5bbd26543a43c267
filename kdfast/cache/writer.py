"""Soft targets to disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from kdfast.cache.duplicates import OnDuplicate, keeps_duplicates
from kdfast.cache.error import CacheError
from kdfast.cache.grid import Grid, grid_for
from kdfast.cache.keys import Key, TokenIds, key_text, token_hash
from kdfast.cache.manifest import write_manifest
from kdfast.cache.metadata import metadata_text
from kdfast.cache.staging import Staging
from kdfast.cache.tensors import cache_tensors
from kdfast.spec.sparse import SAMPLED, SparseTargets

if TYPE_CHECKING:
    from kdfast import _core

Tier: TypeAlias = Literal["fixed", "compact"]

_MOST_DRAWS = 65536


class Writer:
    r"""Stores a teacher's soft targets under keys; many writers may fill one cache at once.

    A sample is copied and comes back from :meth:`write` at once; threads behind it encode and write, and the caller
    waits only where ``queue_bytes`` of samples are on their way already. What goes wrong there, as a full disk, is
    raised by the next call, and by :meth:`close`; targets that cannot be stored are refused by ``write`` itself, and
    cost nothing else. Samples are durable after :meth:`commit`, after ``close``, and every ``commit_bytes`` unasked:
    neither a kill nor a power cut loses them then. What was not committed is not there afterwards; to resume, open
    another writer and write what is :meth:`missing`.

    As a context manager it closes, and so commits, on exit, also when the block raised.

    Log-probabilities are rounded to a grid of 2^-``grid`` nats below each token's largest, which is then moved, and so
    is each ``lse``, so that the mass of the kept entries and of the tail is as it was at every captured temperature.
    The mean KL divergence of what is stored from what was given is below 1e-4 nats at every captured temperature where
    a step is at most a sixteenth of the lowest, which is what the grid "auto" sees to: 4 for T >= 1, one more for every
    half of that, up to 10, which is right for 1/64.

    Args:
        path: directory of the cache; made where there is none.
        vocab_size: V of every sample's targets, at most 2^24.
        tier: "fixed": fastest to read and to write. "compact": the same numbers in two thirds of the bytes, decoded at
            about a twentieth of the speed. Its frequencies are learned from the first 32768 tokens, which wait in
            memory for that unless there is a commit. Sampled targets have a form of their own in both.
        teacher: name or path of the teacher; kept in the cache.
        tokenizer: its fingerprint; kept in the cache.
        revision: of the teacher; kept in the cache.
        dtype: of the teacher's logits; kept in the cache.
        teacher_license: of the teacher, whose outputs these are, as an SPDX identifier or in words; kept in the cache,
            and in its manifest.
        data_license: the same of the data.
        metadata: more of that kind, JSON.
        temperatures: those that every sample's targets were captured at; None: those of the first sample.
        shift: 1: row i of a sample is the distribution of token i + 1 (language models); 0: of item i itself.
        grid: see above, 2 to 10, or "auto".
        block_tokens: tokens under one checksum, 64, 128 or 256: the least that a range is read in. None: 64, or 128 in
            the compact tier, each of whose blocks ends with the state of its coder.
        shard_bytes: a file that has as many is finished, and the next begun.
        commit_bytes: as many bytes written are committed unasked.
        queue_bytes: bytes of samples that may wait.
        threads: that encode; None: half of torch's, one at least.
        on_duplicate: of a sample whose key and token ids are there already, with other targets: "error", or "keep" the
            first, as a sampler that pads writes some samples twice, computed in other batches. Other writers' samples
            count as soon as they were committed when this one was opened.

    A part of the cache that is damaged is warned of, and its samples are missing; what the system refuses to open (no
    permission, no descriptor left, an error of the disk) is no damage, and raises.

    Raises:
        CacheError: the directory holds another cache, or one that cannot be read.
        TypeError, ValueError: an argument that cannot be meant.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        tier: Tier = "fixed",
        teacher: str | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        teacher_license: str | None = None,
        data_license: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        temperatures: Sequence[float] | None = None,
        shift: int = 1,
        grid: Grid = "auto",
        block_tokens: int | None = None,
        shard_bytes: int = 1 << 30,
        commit_bytes: int = 64 << 20,
        queue_bytes: int = 256 << 20,
        threads: int | None = None,
        on_duplicate: OnDuplicate = "error",
    ) -> None:
        self.path = os.fspath(path)
        named = {
            "teacher": teacher,
            "tokenizer": tokenizer,
            "revision": revision,
            "dtype": dtype,
            "teacher_license": teacher_license,
            "data_license": data_license,
        }
        for name in ("teacher_license", "data_license"):
            if not isinstance(named[name], (str, type(None))):
                msg = f"{name} must be text, got {type(named[name]).__name__}"
                raise TypeError(msg)
        clash = sorted(set(named) & set(metadata or {}))
        if clash:
            msg = f"metadata may not hold {', '.join(clash)}: pass {clash[0]}= itself"
            raise ValueError(msg)
        described = {k: v for k, v in named.items() if v is not None} | dict(metadata or {})
        grid_for(grid, (1.0,))  # which raises for one that cannot be meant
        self._grid = grid
        encoders = max(1, torch.get_num_threads() // 2) if threads is None else threads
        self._make = functools.partial(
            _new_engine,
            path=self.path,
            vocab_size=vocab_size,
            shift=shift,
            metadata=metadata_text(described),
            tier=tier,
            block_tokens=(128 if tier == "compact" else 64) if block_tokens is None else block_tokens,
            shard_bytes=shard_bytes,
            commit_bytes=commit_bytes,
            queue_bytes=queue_bytes,
            threads=encoders,
            keep_duplicates=keeps_duplicates(on_duplicate),
        )
        self._vocab_size = vocab_size
        self._temperatures: tuple[float, ...] | None = None
        self._engine: _core.CacheWriter | None = None
        self._closed = False
        self._opening = threading.Lock()
        self._staging = Staging()
        if temperatures is not None:
            self._open(tuple(sorted(float(t) for t in temperatures)))
        elif os.path.exists(os.path.join(self.path, "cache.header")):
            from kdfast import _core

            self._open(tuple(_core.CacheReader(self.path, damaged=True).header["temperatures"]))

    def _open(self, temperatures: tuple[float, ...]) -> _core.CacheWriter:
        with self._opening:  # of threads that come at once the first: another engine would lose what this one was given
            return self._engine or self._opened(temperatures)

    def _opened(self, temperatures: tuple[float, ...]) -> _core.CacheWriter:
        self._engine = self._make(temperatures=temperatures, grid=grid_for(self._grid, temperatures))
        self._temperatures = temperatures
        for fault in self._engine.damage:
            msg = f"a part of the cache is damaged, and what it held counts as missing until a repair: {fault}"
            warnings.warn(msg, stacklevel=4)
        return self._engine

    def write(
        self, key: Key, targets: SparseTargets, token_ids: TokenIds | None = None, *, seed: int | None = None
    ) -> bool:
        """Stores targets (S, K) of a sample of S tokens.

        Args:
            key: name of the sample, at most 4096 bytes of UTF-8; an int is its decimal string.
            targets: of one sample, on any device, with ``lse`` at the cache's temperatures.
            token_ids: (S,) integers, the tokens that the targets were made from. Only their hash is kept: with it a
                reader tells a data set that does not fit, and two samples of one key can be compared.
            seed: that sampled targets were drawn with, in [0, 2^63); kept for the record.

        Targets on a CUDA device are copied to the host while the device goes on: up to eight samples are on their way,
        and an error that is found when one arrives is raised by a later call, at the latest by :meth:`commit` or
        :meth:`close`; it names the sample.

        Returns:
            Whether the sample is new. One whose key is there already, with equal token ids and targets, is left as it
            was.

        Raises:
            CacheError: the key is there with other token ids, with other targets unless ``on_duplicate`` is "keep",
                damaged so that they cannot be compared or, without token ids, at all; or an error of an earlier sample.
            TypeError, ValueError: targets that do not fit the cache.
        """
        name = key_text(key)
        self._check(name, targets)
        if targets.ids.is_cuda:
            if self._engine is None:  # so that the temperatures of what follows are held against these
                self._open(_captured(targets))
            new = name not in self
            self._staging.put(name, targets, token_ids, seed)
            self._receive()
            return new
        self._receive(everything=True)  # samples stay in order
        return self._hand_over(name, targets, token_ids, seed)

    def _receive(self, *, everything: bool = False) -> None:
        """Hands over what has come from a GPU; the first error is raised once nothing is left behind."""
        first: Exception | None = None
        for staged in self._staging.arrived(everything=everything):
            try:
                self._hand_over(staged.key, staged.targets, staged.token_ids, staged.seed)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    def _hand_over(self, name: str, targets: SparseTargets, token_ids: TokenIds | None, seed: int | None) -> bool:
        hashed = None if token_ids is None else token_hash(token_ids, targets.ids.shape[0], name)
        return self._write(name, targets, hashed, seed)

    def _write(self, name: str, targets: SparseTargets, hashed: bytes | None, seed: int | None) -> bool:
        engine = self._engine
        if engine is None:
            engine = self._open(_captured(targets))
            self._check(name, targets)  # against the temperatures of another thread's sample, if that was first
        tensors = self._tensors(targets)
        return engine.write(
            key=name,
            method=targets.method,
            parameter=float(_draws(name, targets)) if targets.method == "sample" else 0.0,
            seed=seed if targets.method in SAMPLED else None,
            token_hash=hashed,
            tensors=cache_tensors(tensors),
            temperatures=len(tensors.get("lse", ())),
        )

    def _check(self, key: str, targets: SparseTargets) -> None:
        if self._closed:
            msg = "the writer is closed"
            raise ValueError(msg)
        if not isinstance(targets, SparseTargets):
            msg = f"sample {key!r}: targets must be SparseTargets, got {type(targets).__name__}"
            raise TypeError(msg)
        if targets.ids.dim() != 2:
            msg = f"sample {key!r}: targets must be (S, K), one sample's, got {tuple(targets.ids.shape)}"
            raise ValueError(msg)
        if targets.vocab_size != self._vocab_size:
            msg = f"sample {key!r}: targets of {targets.vocab_size} columns in a cache of {self._vocab_size}"
            raise ValueError(msg)
        captured = _captured(targets)
        held = self._temperatures
        if held is not None and targets.method not in SAMPLED:
            held = tuple(sorted({1.0, *held}))  # which all but sampled targets are captured at anyway
        if held is not None and captured != held:
            msg = (
                f"sample {key!r}: targets captured at temperatures {_listed(captured)}, the cache holds "
                f"{_listed(held)}: pass temperatures= to the writer or to soft_targets"
            )
            raise ValueError(msg)

    def _tensors(self, targets: SparseTargets) -> dict[str, Tensor]:
        """What is stored, contiguous and on the CPU."""
        sampled = targets.method in SAMPLED
        captured = {} if sampled or targets.lse is None else targets.lse
        lse = [captured[t] for t in sorted(captured) if t != 1.0]
        fields = {
            "ids": targets.ids,
            "logprobs": None if sampled else targets.logprobs,
            "mass": targets.mass if sampled else None,
            "lse": torch.stack(lse) if lse else None,
            "k_eff": _k_eff(targets),
            "gold": targets.gold_logprob,
            "neg_entropy": targets.neg_entropy if sampled else None,
        }

        def host(name: str, value: Tensor) -> Tensor:
            dtype = torch.int32 if name in ("ids", "k_eff") else torch.float32
            return value.detach().to("cpu", dtype).contiguous()

        return {name: host(name, value) for name, value in fields.items() if value is not None}

    def __contains__(self, key: Key) -> bool:
        """Whether a sample is in the cache already, or on its way."""
        name = key_text(key)
        return name in self._staging or (self._engine is not None and name in self._engine)

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of ``keys`` that are not in the cache yet, in their order: what a job that resumes has to write."""
        if self._engine is None:
            return [key for key in keys if key not in self]
        missing = self._engine.missing(keys, key_text)
        return [key for key in missing if key_text(key) not in self._staging] if self._staging else missing

    def bytes_written(self) -> int:
        """Bytes of this writer's shards so far; samples that wait are not among them."""
        if self._engine is None:
            return 0
        size = 0
        for name in os.listdir(self.path):
            if name.startswith(f"{self._engine.id:016x}-") and name.endswith((".open", ".shard")):
                with contextlib.suppress(FileNotFoundError):  # finished, and so renamed, meanwhile
                    size += os.stat(os.path.join(self.path, name)).st_size
        return size

    def commit(self) -> int:
        """Makes everything written so far durable; returns how many samples of this writer are.

        Raises:
            CacheError, ValueError: an error of a sample written before, or of the disk.
        """
        self._receive(everything=True)
        return 0 if self._engine is None else self._engine.commit()

    def close(self) -> None:
        """Commits, finishes the file and ends the journal; a second call does nothing.

        A writer that was given no sample and no temperatures leaves no cache behind.

        Raises:
            CacheError, ValueError: an error of a sample written before, or of the disk.
        """
        if self._closed:
            return
        try:
            self._receive(everything=True)
        finally:
            if self._engine is not None:
                self._describe(self._engine.close())
            self._closed = True

    def _describe(self, written: int) -> None:
        """The manifest made anew: of a damaged cache by its repair alone."""
        assert self._engine is not None
        if self._engine.damage:
            return
        try:
            write_manifest(self.path)
        except CacheError as error:
            # Who had nothing to write may close in a folder that cannot be written, whose manifest is as it was.
            if written or getattr(error.__cause__, "errno", None) not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except (CacheError, ValueError) as mine:
            if error is None or str(mine) != str(error):
                raise


def _new_engine(**options: Any) -> _core.CacheWriter:
    from kdfast import _core

    return _core.CacheWriter(**options)


def _captured(targets: SparseTargets) -> tuple[float, ...]:
    """The temperatures of targets: drawn ones have the one that they were drawn at."""
    if targets.method in SAMPLED:
        return tuple(targets.lse) if targets.lse else (1.0,)
    return targets.temperatures


def _k_eff(targets: SparseTargets) -> Tensor | None:
    """Entries of each token, where they may differ; entries in use stand first in every row."""
    if targets.k_eff is not None:
        return targets.k_eff
    return targets.valid.sum(-1) if bool((targets.ids < 0).any()) else None


def _draws(key: str, targets: SparseTargets) -> int:
    """N, of which every mass is a multiple of 1 / N: the width of the rows, as soft_targets leaves it, or the least."""
    mass = torch.where(targets.valid, targets.mass.double(), 0.0)  # type: ignore[union-attr]
    for n in (targets.ids.shape[-1], *range(1, _MOST_DRAWS + 1)):
        counts = mass * n
        if bool(((counts - counts.round()).abs() <= 1e-6 * n).all()) and bool((counts[targets.valid] > 0.5).all()):
            return int(n)
    msg = f"sample {key!r}: masses are no counts over a number of draws up to {_MOST_DRAWS}"
    raise ValueError(msg)


def _listed(temperatures: Iterable[float]) -> str:
    return ", ".join(f"{t!r}" for t in temperatures)
