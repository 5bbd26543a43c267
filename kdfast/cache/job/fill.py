"""A share of the samples through a teacher into a cache: what every way of running the job comes down to."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.error import CacheError, JobError
from kdfast.cache.job.samples import Sample
from kdfast.cache.job.teacher import Teacher
from kdfast.cache.reader import Reader
from kdfast.cache.writer import Writer
from kdfast.soft_targets import Method, soft_targets
from kdfast.spec.head import LMHead
from kdfast.spec.problem import Logits
from kdfast.spec.sparse import SAMPLED, SparseTargets

#: Batches whose samples are looked at together and sorted by length.
_WINDOW_BATCHES = 32


@dataclass(frozen=True)
class Capture:
    """What is kept of a teacher's logits: the options of :func:`kdfast.soft_targets`.

    Every sample of a sampled method is drawn with a seed of its own, made from ``seed`` and its key: no draw depends on
    what else stands in a batch.

    Raises:
        JobError: options that cannot be meant.
    """

    k: int = 64
    method: Method = "topk"
    p: float | None = None
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            self._targets(torch.zeros(1, 2), self.seed)
        except (TypeError, ValueError) as error:
            raise JobError(str(error)) from error

    @property
    def drawn(self) -> bool:
        """Whether the targets depend on the seed."""
        return self.method in SAMPLED

    @property
    def captured(self) -> tuple[float, ...]:
        """The temperatures of the targets, as a cache has them: 1 is always exact, but not for those that are drawn."""
        return self.temperatures if self.drawn else tuple(sorted({1.0, *self.temperatures}))

    def metadata(self) -> dict[str, Any]:
        """What a job that goes on must agree with."""
        seed = {"seed": self.seed} if self.drawn else {}
        return {"k": self.k, "method": self.method} | ({} if self.p is None else {"p": self.p}) | seed

    def seed_of(self, key: str) -> int | None:
        """The seed of a sample: 63 bits of BLAKE2b over "seed:key"; None where nothing is drawn."""
        if not self.drawn:
            return None
        digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def __call__(self, logits: Logits, samples: Sequence[Sample]) -> list[SparseTargets]:
        """Targets (S, K) of each sample, whose logits are the first rows of (B, S, V).

        They are on the CPU, where a batch comes in one copy of each field; a writer would copy each sample's.
        """
        made = self._made(logits, samples)
        return [
            one if sample.kept is None else _only(one, torch.from_numpy(sample.kept))
            for one, sample in zip(made, samples, strict=True)
        ]

    def _made(self, logits: Logits, samples: Sequence[Sample]) -> list[SparseTargets]:
        lengths = [len(sample.token_ids) for sample in samples]
        if self.drawn:
            return [
                self._targets(_rows(logits, i, n), self.seed_of(sample.key)).to("cpu")
                for i, (n, sample) in enumerate(zip(lengths, samples, strict=True))
            ]
        if isinstance(logits, LMHead):  # the projection of padding is left out
            real = logits.map_tokens(lambda x: torch.cat([x[i, :n] for i, n in enumerate(lengths)]))
            targets = self._targets(real).to("cpu")
            firsts = torch.tensor([0, *lengths]).cumsum(0).tolist()
            return [targets[first : first + n] for first, n in zip(firsts, lengths, strict=False)]
        targets = self._targets(logits).to("cpu")
        return [targets[i, :n] for i, n in enumerate(lengths)]

    def _targets(self, logits: Logits, seed: int | None = None) -> SparseTargets:
        targets: SparseTargets = soft_targets(
            logits, k=self.k, method=self.method, p=self.p, temperatures=self.temperatures, seed=seed
        )
        return targets


_SUMMED = ("samples", "tokens", "there", "batches", "taken", "committed", "committed_bytes")


@dataclass
class Filled:
    """How far a share has come."""

    samples: int = 0  # written
    tokens: int = 0
    there: int = 0  # samples that were in the cache already
    batches: int = 0
    taken: int = 0  # tokens of samples that were missing, as far as the data are read
    read: float = 0.0  # share of the data read
    started_at: float = 0.0  # share of the data read before the first sample that was missing
    committed: int = 0  # tokens written at the last commit
    committed_bytes: int = 0  # that they take
    finished: bool = False  # False where the job was asked to stop

    @classmethod
    def together(cls, parts: Sequence[Filled]) -> Filled:
        """How far a job has come whose shares are these, read side by side."""
        sums = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
        read, started_at = (
            sum(values) / len(parts) for values in zip(*((p.read, p.started_at) for p in parts), strict=True)
        )
        return cls(**sums, read=read, started_at=started_at, finished=all(part.finished for part in parts))

    @property
    def left(self) -> float | None:
        """Tokens that are left, as the data so far let expect; None before the first batch."""
        gone = self.read - self.started_at
        return self.taken / gone * (1 - self.started_at) - self.tokens if self.batches and gone > 0 else None


def fill(
    writer: Writer,
    teacher: Teacher,
    samples: Iterable[Sample],
    capture: Capture,
    *,
    batch_tokens: int,
    commit_seconds: float = 60.0,
    report: Callable[[Filled], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Filled:
    """Writes the targets of those samples that the cache does not hold yet.

    Samples of a window are sorted by length, the longest first, and padded on the right; a batch has at most
    ``batch_tokens`` tokens, padding included, or one sample. The writer commits every ``commit_seconds`` and at the
    end, and is left open.

    Args:
        writer: of the cache.
        teacher: runs without gradients.
        samples: those of this process.
        capture: what is kept.
        batch_tokens: see above.
        commit_seconds: see above.
        report: called after every batch.
        stop: asked before every batch; True ends the job with what is written.

    Raises:
        JobError: token ids that the teacher does not have, or targets that cannot be stored, such as NaN.
        CacheError: the disk, or a key that is there, or comes again, with other token ids.
    """
    filled = Filled()
    committed = time.monotonic()
    for batch in _batches(_missing(samples, writer.path, filled), batch_tokens):
        if stop():
            break
        targets = _captured(teacher, batch, capture, check=filled.batches == 0)
        for sample, one in zip(batch, targets, strict=True):
            ids = torch.from_numpy(sample.token_ids)
            new = _store(writer.write, sample.key, one, ids, seed=capture.seed_of(sample.key))
            filled.samples += bool(new)
            filled.there += not new
        filled.tokens += sum(len(sample.token_ids) for sample in batch)
        filled.batches += 1
        if time.monotonic() - committed >= commit_seconds:
            _commit(writer, filled)
            committed = time.monotonic()
        report(filled)
    else:
        filled.finished = True
    _commit(writer, filled)
    return filled


def _commit(writer: Writer, filled: Filled) -> None:
    _store(writer.commit)
    filled.committed, filled.committed_bytes = filled.tokens, writer.bytes_written()


def _missing(samples: Iterable[Sample], path: str, filled: Filled) -> Iterator[Sample]:
    """Those that were not in the cache when the job began; of the others, that they are still the same is checked.

    A key that comes twice goes to the teacher twice, and the writer compares.
    """
    there = Reader(path, damaged="skip") if os.path.exists(os.path.join(path, "cache.header")) else None
    met = False
    for sample in samples:
        before, filled.read = filled.read, sample.read
        if there is not None and sample.key in there:
            there.read([(sample.key, slice(0, 0))], [torch.from_numpy(sample.token_ids)])
            filled.there += 1
            continue
        if not met:
            met, filled.started_at = True, before
        filled.taken += len(sample.token_ids)
        yield sample


def _batches(samples: Iterable[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    window: list[Sample] = []
    tokens = 0
    for sample in samples:
        window.append(sample)
        tokens += len(sample.token_ids)
        if tokens >= _WINDOW_BATCHES * batch_tokens:
            yield from _sorted_batches(window, batch_tokens)
            window, tokens = [], 0
    yield from _sorted_batches(window, batch_tokens)


def _sorted_batches(window: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in sorted(window, key=lambda s: -len(s.token_ids)):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _captured(teacher: Teacher, batch: Sequence[Sample], capture: Capture, *, check: bool) -> list[SparseTargets]:
    for sample in batch:
        ids = sample.token_ids
        if len(ids) and not 0 <= ids.min() <= ids.max() < teacher.token_ids:
            bad = ids.max() if ids.min() >= 0 else ids.min()
            msg = f"sample {sample.key!r} holds token id {bad}, the teacher takes 0 to {teacher.token_ids - 1}"
            raise JobError(msg)
    longest = len(batch[0].token_ids)
    if longest == 0:
        return capture(torch.zeros((len(batch), 0, teacher.vocab_size)), batch)
    input_ids = torch.zeros((len(batch), longest), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, sample in enumerate(batch):
        n = len(sample.token_ids)
        input_ids[i, :n] = torch.from_numpy(sample.token_ids)
        mask[i, :n] = 1
    input_ids, mask = input_ids.to(teacher.device), mask.to(teacher.device)
    try:
        if check and teacher.check is not None:
            teacher.check(input_ids, mask)
        return capture(teacher(input_ids, mask), batch)
    except torch.OutOfMemoryError as error:
        msg = f"{tuple(input_ids.shape)} tokens are too many for the memory of {teacher.device}: lower --batch-tokens"
        raise JobError(msg) from error


def _store(call: Callable[..., object], *arguments: object, **options: object) -> object:
    """Targets that cannot be stored are the teacher's fault, or the data's, and end the job with the writer's words."""
    try:
        return call(*arguments, **options)
    except CacheError:
        raise
    except ValueError as error:
        raise JobError(str(error)) from error


def _only(targets: SparseTargets, kept: Tensor) -> SparseTargets:
    """The same targets (S, K), whose rows that are not kept have no entries."""

    def blank(value: Tensor, fill: float) -> Tensor:
        return value.masked_fill(~kept.view(-1, *[1] * (value.dim() - 1)), fill)

    k_eff = targets.valid.sum(-1, dtype=torch.int32) if targets.k_eff is None else targets.k_eff
    values: dict[str, Any] = {"ids": blank(targets.ids, -1), "k_eff": blank(k_eff, 0)}
    for name, fill in (("logprobs", -math.inf), ("mass", 0.0), ("neg_entropy", 0.0)):
        value = getattr(targets, name)
        if value is not None:
            values[name] = blank(value, fill)
    if targets.lse is not None:
        values["lse"] = {t: blank(value, 0.0) for t, value in targets.lse.items()}
    return replace(targets, **values)


def _rows(logits: Logits, row: int, n: int) -> Logits:
    return logits[row, :n] if isinstance(logits, Tensor) else logits.map_tokens(lambda x: x[row, :n])
