"""Soft targets as Parquet, out of a cache and into one.

A row is a sample. An entry is a column of the vocabulary that was kept for a token.

============== ======================= ============================================================================
column         type                    what
============== ======================= ============================================================================
key            string                  of the sample; import: any integer type too, and its number where missing
ids            list<list<int32>>       by token: the ids of its entries
logprobs       list<list<float32>>     by token: their log-probabilities, nats, over the full vocabulary at T = 1
method         string                  "topk", "topp", "sample" or "pps"; import: "topk" where missing
width          int32                   K of the sample; import: the most entries of a token where missing
lse_<T>        list<float32>           by token: logsumexp over the vocabulary of (log-probabilities / T), for T != 1
gold_logprob   list<float32>           by token, or null
mass           list<list<float32>>     of sampled targets, in place of logprobs
neg_entropy    list<float32>           of sampled targets
token_hash     fixed_size_binary[16]   of the token ids that the targets were made from (FORMAT.md), or null
token_ids      list<int64>             import only, in place of token_hash
seed           uint64                  of sampled targets, or null
============== ======================= ============================================================================

The file's metadata hold under ``kdfast`` a JSON object of vocab_size, temperatures, shift and the cache's metadata.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kdfast.cache.duplicates import OnDuplicate
from kdfast.cache.error import CacheError, JobError
from kdfast.cache.grid import Grid
from kdfast.cache.keys import key_text, token_hash
from kdfast.cache.metadata import NAMED
from kdfast.cache.reader import Reader
from kdfast.cache.writer import Tier, Writer
from kdfast.spec.sparse import SAMPLED, SparseTargets

#: What the mass of a token may exceed 1 by: that of fp32 log-probabilities that were rounded, not computed in bf16.
MASS_ROUNDING = 1e-5

_ENTRIES_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 64
_LSE = "lse_"


class Exported(NamedTuple):
    """What an export wrote."""

    samples: int
    tokens: int


class Imported(NamedTuple):
    """What an import wrote."""

    samples: int
    tokens: int
    there: int  # samples that were in the cache already, with the same token ids


# --- Out of a cache ---------------------------------------------------------------------------------------------------


def export_parquet(reader: Reader, path: str | os.PathLike[str]) -> Exported:
    """Writes all samples of a cache to a file, which appears whole or not at all.

    Raises:
        CacheError: damage in the cache.
        OSError: the disk.
    """
    described = {
        "vocab_size": reader.vocab_size,
        "temperatures": reader.temperatures,
        "shift": reader.shift,
        "metadata": reader.metadata,
    }
    schema = _schema(reader.temperatures).with_metadata({"kdfast": json.dumps(described, sort_keys=True)})
    partial = f"{os.fspath(path)}.partial"
    samples = tokens = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for keys in _portions(reader):
                rows = [_row(reader, key) for key in keys]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                samples += len(rows)
                tokens += sum(reader.tokens(key) for key in keys)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    return Exported(samples, tokens)


def _schema(temperatures: tuple[float, ...]) -> pa.Schema:
    per_token, per_entry = pa.list_(pa.float32()), pa.list_(pa.list_(pa.float32()))
    fields = {
        "key": pa.string(),
        "ids": pa.list_(pa.list_(pa.int32())),
        "logprobs": per_entry,
        "method": pa.string(),
        "width": pa.int32(),
        **{f"{_LSE}{t!r}": per_token for t in temperatures if t != 1.0},
        "gold_logprob": per_token,
        "mass": per_entry,
        "neg_entropy": per_token,
        "token_hash": pa.binary(16),
        "seed": pa.uint64(),
    }
    return pa.schema(list(fields.items()))


def _portions(reader: Reader) -> Iterator[list[str]]:
    portion: list[str] = []
    entries = 0
    for key in reader:
        entry = reader._engine.find(key)
        portion.append(key)
        entries += entry.tokens * entry.kept
        if entries >= _ENTRIES_AT_ONCE:
            yield portion
            portion, entries = [], 0
    if portion:
        yield portion


def _row(reader: Reader, key: str) -> dict[str, Any]:
    entry = reader._engine.find(key)
    drawn = entry.method in SAMPLED
    row: dict[str, Any] = {
        "key": key,
        "ids": [],
        "logprobs": None if drawn else [],
        "method": entry.method,
        "width": entry.kept,
        "gold_logprob": [] if entry.gold else None,
        "mass": [] if drawn else None,
        "neg_entropy": [] if drawn else None,
        "token_hash": entry.token_hash,
        "seed": reader._details(entry)[1] if drawn else None,
    }
    lse = {} if drawn else {t: f"{_LSE}{t!r}" for t in reader.temperatures if t != 1.0}
    row |= {name: [] for name in lse.values()}
    for targets in reader._pieces(key):
        kept = targets.valid.sum(-1).numpy()
        for name in ("ids", "logprobs", "mass"):
            if row[name] is not None:
                row[name] += _nested(getattr(targets, name), kept)
        for name in ("gold_logprob", "neg_entropy"):
            if row[name] is not None:
                row[name] += getattr(targets, name).tolist()
        for t, name in lse.items():
            row[name] += targets.lse[t].tolist()  # type: ignore[index]  # what is no sample has them
    return row


def _nested(values: Tensor, kept: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
    """Of each row what is in use, without the memory of the rest."""
    return [row[:n].copy() for row, n in zip(values.numpy(), kept, strict=True)]


# --- Into a cache -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns where they are not those of an export."""

    key: str = "key"
    ids: str = "ids"
    logprobs: str = "logprobs"
    token_ids: str = "token_ids"


def import_parquet(
    path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    columns: Columns | None = None,
    renormalise: bool = False,
    shift: int | None = None,
    metadata: Mapping[str, str] | None = None,
    tier: Tier = "fixed",
    grid: Grid = "auto",
    on_duplicate: OnDuplicate = "error",
) -> Imported:
    """Writes the rows of a file into a cache, as they are.

    Log-probabilities are taken to be over the full vocabulary: what the entries of a token leave of 1 is its tail. Its
    entries may exceed 1 by rounding (1e-5); by more they are an error. Row i of a sample is the distribution of its
    token i + 1, unless ``shift`` is 0.

    Args:
        path: the file; see the table of this module.
        destination: directory of the cache; made where there is none.
        vocab_size: V; may be left out where the file has it.
        columns: their names.
        renormalise: divides the masses of each token by their sum, so that the tail is 0, and says so in the cache's
            metadata ("renormalised"); ``lse`` is made anew for it.
        shift: of the cache; None: what the file says, or 1.
        metadata: teacher, tokenizer, revision and licences, over what the file says.
        tier: of the writer.
        grid: of the writer.
        on_duplicate: of the writer.

    Raises:
        JobError: a file that cannot be read so; it names the sample and the token.
        CacheError: of the writer, as for a key that is there with other token ids or targets.
    """
    names = columns or Columns()
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        msg = f"{os.fspath(path)} is no Parquet file: {error}"
        raise JobError(msg) from error
    with file:
        header = _header(file)
        v = header.get("vocab_size") if vocab_size is None else vocab_size
        if v is None:
            msg = "the file does not say the size of the vocabulary: pass --vocab-size"
            raise JobError(msg)
        given = file.schema_arrow.names
        if names.ids not in given:
            msg = f"the file has no column {names.ids!r}, it has {', '.join(given)}: pass --ids-column"
            raise JobError(msg)
        temperatures = tuple(header.get("temperatures") or sorted({1.0, *_captured(given)}))
        described = {**header.get("metadata", {}), **(metadata or {})} | ({"renormalised": True} if renormalise else {})
        rows = _Rows(names, v, temperatures, renormalise)
        samples = tokens = there = 0
        with (
            _stated(),
            Writer(
                destination,
                vocab_size=v,
                temperatures=temperatures,
                shift=header.get("shift", 1) if shift is None else shift,
                metadata={k: x for k, x in described.items() if k not in NAMED},
                tier=tier,
                grid=grid,
                on_duplicate=on_duplicate,
                **{k: described[k] for k in NAMED if k in described},
            ) as writer,
        ):
            for number, row in enumerate(_rows_of(file)):
                key, targets, hashed = rows.sample(number, row)
                writer._check(key, targets)
                new = writer._write(key, targets, hashed, row.get("seed"))
                samples, tokens, there = samples + new, tokens + new * len(targets.ids), there + (not new)
    return Imported(samples, tokens, there)


@contextlib.contextmanager
def _stated() -> Iterator[None]:
    """What the writer refuses is the file's fault, or an option's."""
    try:
        yield
    except (CacheError, JobError):
        raise
    except ValueError as error:
        raise JobError(str(error)) from error


def _header(file: pq.ParquetFile) -> dict[str, Any]:
    """What an export says of its cache; nothing where the file is another's."""
    text = (file.schema_arrow.metadata or {}).get(b"kdfast")
    if text is None:
        return {}
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError as error:
        msg = f"the file's metadata under 'kdfast' are no JSON: {error}"
        raise JobError(msg) from error
    return header


def _captured(columns: list[str]) -> Iterator[float]:
    for name in columns:
        if name.startswith(_LSE):
            try:
                yield float(name.removeprefix(_LSE))
            except ValueError as error:
                msg = f"column {name!r} must end in a temperature, as lse_2.0"
                raise JobError(msg) from error


def _rows_of(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    """Each row by column: scalars as Python's, lists as Arrow's."""
    number = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
        for i in range(batch.num_rows):
            yield {name: _value(batch.column(name)[i], name, number) for name in batch.schema.names}
            number += 1


def _value(x: Any, column: str, row: int) -> Any:
    if hasattr(x, "values"):
        return x.values
    try:
        return x.as_py()
    except UnicodeDecodeError as error:  # Arrow takes any bytes for text
        msg = f"row {row}, column {column!r}: no UTF-8: {error.reason} at byte {error.start}"
        raise JobError(msg) from error


@dataclass(frozen=True)
class _Rows:
    """Turns rows into targets."""

    columns: Columns
    vocab_size: int
    temperatures: tuple[float, ...]
    renormalise: bool

    def sample(self, number: int, row: Mapping[str, Any]) -> tuple[str, SparseTargets, bytes | None]:
        try:
            key = key_text(row.get(self.columns.key, number))
        except (TypeError, ValueError) as error:
            msg = f"row {number}: {error}"
            raise JobError(msg) from error
        try:
            targets = self._targets(key, row)
            hashed = row.get("token_hash")
            if row.get(self.columns.token_ids) is not None:
                ids = row[self.columns.token_ids].to_numpy(zero_copy_only=False)
                hashed = token_hash(torch.from_numpy(np.array(ids)), len(targets.ids), key)
        except JobError:
            raise
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
            msg = f"sample {key!r}: {error}"
            raise JobError(msg) from error
        return key, targets, hashed

    def _targets(self, key: str, row: Mapping[str, Any]) -> SparseTargets:
        method = row.get("method") or "topk"
        drawn = method in SAMPLED
        ids, kept = _entries(key, row, self.columns.ids, pa.int64())
        weights, others = _entries(key, row, "mass" if drawn else self.columns.logprobs, pa.float64())
        if not np.array_equal(kept, others):
            at = int(np.argmax(kept != others)) if len(kept) == len(others) else min(len(kept), len(others))
            msg = f"sample {key!r}, token {at}: as many ids as log-probabilities are needed"
            raise JobError(msg)
        most = max([1, *kept])
        if most > int(row.get("width") or most):
            msg = f"sample {key!r}: a token has {most} entries, and its width is {row['width']}"
            raise JobError(msg)
        place = _Place(kept, int(row.get("width") or most))
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            msg = f"sample {key!r}, token {place.tokens[at]}: id {ids[at]} is not in 0 to {self.vocab_size - 1}"
            raise JobError(msg)
        if self.renormalise and (drawn or row.get("gold_logprob") is not None):
            what = "drawn" if drawn else "with gold_logprob, which would be that of another distribution"
            msg = f"sample {key!r} is {what}: it cannot be renormalised"
            raise JobError(msg)
        n = len(kept)
        lse = {t: torch.zeros(n) for t in self.temperatures}  # of drawn targets only the temperature is kept
        if not drawn:
            weights = self._checked(key, weights, place)
            for t in (t for t in self.temperatures if t != 1.0):
                made = self.renormalise
                lse[t] = place.logsumexp(weights / t).float() if made else _per_token(key, row, f"{_LSE}{t!r}", n)
        return SparseTargets(
            torch.from_numpy(place.filled(ids, -1).astype(np.int32)),
            None if drawn else torch.from_numpy(place.filled(weights, -np.inf).astype(np.float32)),
            vocab_size=self.vocab_size,
            lse=lse,
            k_eff=None if (kept == place.width).all() else torch.from_numpy(kept.astype(np.int32)),
            method=method,
            mass=torch.from_numpy(place.filled(weights, 0.0).astype(np.float32)) if drawn else None,
            neg_entropy=_per_token(key, row, "neg_entropy", n) if drawn else None,
            gold_logprob=None if row.get("gold_logprob") is None else _per_token(key, row, "gold_logprob", n),
        )

    def _checked(self, key: str, logprobs: npt.NDArray[np.float64], place: _Place) -> npt.NDArray[np.float64]:
        """The log-probabilities, at most 0; renormalised where that was asked for."""
        if not np.isfinite(logprobs).all():
            at = int(np.argmax(~np.isfinite(logprobs)))
            msg = f"sample {key!r}, token {place.tokens[at]}: log-probability {logprobs[at]} is not finite"
            raise JobError(msg)
        if self.renormalise:
            logprobs = logprobs - place.logsumexp(logprobs).numpy()[place.tokens]
        with np.errstate(over="ignore"):
            mass = np.bincount(place.tokens, np.exp(logprobs), len(place.kept))
        over = mass > 1 + MASS_ROUNDING
        if over.any():
            at = int(np.argmax(over))
            msg = (
                f"sample {key!r}, token {at}: the probabilities of its {place.kept[at]} entries sum to {mass[at]:.6f}, "
                "more than 1: they are not over the full vocabulary; pass --renormalise to divide by the sum"
            )
            raise JobError(msg)
        return np.minimum(logprobs, 0.0)


class _Place:
    """Where the entries of a sample, end to end, stand in (S, width)."""

    def __init__(self, kept: npt.NDArray[np.int64], width: int) -> None:
        self.kept = kept  # (S,), entries of each token
        self.width = width
        self.tokens = np.repeat(np.arange(len(kept)), kept)  # of each entry
        self._columns = np.arange(len(self.tokens)) - np.repeat(np.cumsum(kept) - kept, kept)

    def filled(self, values: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
        out = np.full((len(self.kept), self.width), fill, dtype=values.dtype)
        out[self.tokens, self._columns] = values
        return out

    def logsumexp(self, values: npt.NDArray[np.float64]) -> Tensor:
        """(S,) fp64; 0 for a token without entries."""
        by_token = torch.from_numpy(self.filled(values, -np.inf)).logsumexp(-1)
        return torch.where(torch.from_numpy(self.kept > 0), by_token, 0.0)


def _entries(
    key: str, row: Mapping[str, Any], column: str, kind: pa.DataType
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of a column, end to end, and how many each token has."""
    lists = row.get(column)
    if lists is None:
        msg = f"sample {key!r} has no {column!r}"
        raise JobError(msg)
    if not isinstance(lists, pa.Array):
        msg = f"sample {key!r}: {column!r} must be a list for each token, got {type(lists).__name__}"
        raise JobError(msg)
    lists = lists.cast(pa.list_(kind))
    if lists.null_count:
        at = int(np.argmax(lists.is_null().to_numpy(zero_copy_only=False)))
        msg = (
            f"sample {key!r}, token {at}: {column!r} is null: leave that token out, and its token id "
            "(vLLM's prompt_logprobs begin with one)"
        )
        raise JobError(msg)
    values = lists.flatten()
    if values.null_count:
        msg = f"sample {key!r}: {column!r} holds a null"
        raise JobError(msg)
    kept = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return values.to_numpy(zero_copy_only=False), kept


def _per_token(key: str, row: Mapping[str, Any], column: str, n: int) -> Tensor:
    values = row.get(column)
    if values is None or len(values) != n or values.null_count:
        msg = f"sample {key!r}: {column!r} must be a list of {n} numbers, one for each token"
        raise JobError(msg)
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32))
