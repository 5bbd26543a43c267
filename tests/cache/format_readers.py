"""The readers that the format's tests run over: the decoder written from the document, and kdfast's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from format_decoder import Cache
from format_parts import FormatError

from kdfast.cache import CacheError, Reader
from kdfast.spec.sparse import SAMPLED, SparseTargets

Array = np.ndarray[Any, Any]


class Document:
    """The decoder; a reader is made of a folder, and its errors have a ``code``."""

    error = FormatError

    def __init__(self, folder: Path):
        self.cache = Cache.open(folder)

    def about(self) -> dict[str, Any]:
        header = self.cache.header
        return {name: getattr(header, name) for name in ("vocab_size", "shift", "metadata")} | {
            "temperatures": list(header.temperatures)
        }

    def keys(self) -> list[str]:
        return self.cache.keys()

    def fields(self, key: str) -> dict[str, Any]:
        """What a reader gives back of a sample: numbers, and arrays with their rows filled up to K."""
        sample = self.cache[key]
        names = ("method", "parameter", "seed", "grid", "token_hash", "k_eff", "ids", "logprobs", "mass", "lse", "gold")
        return {name: getattr(sample, name) for name in (*names, "neg_entropy")}

    def check_tokens(self, key: str, token_ids: list[int]) -> None:
        self.cache[key].check_tokens(token_ids)


class Engine:
    """kdfast's own reader, as ``Document``."""

    error = CacheError

    def __init__(self, folder: Path):
        self.cache = Reader(folder)

    def about(self) -> dict[str, Any]:
        return {name: getattr(self.cache, name) for name in ("vocab_size", "shift", "metadata")} | {
            "temperatures": list(self.cache.temperatures)
        }

    def keys(self) -> list[str]:
        return list(self.cache)

    def fields(self, key: str) -> dict[str, Any]:
        engine, one = self.cache._engine, self.targets(key)
        entry = engine.find(key)
        parameter, seed, grid, _, _ = engine.details(entry)
        tokens, kept = one.ids.shape

        def array(value: Any) -> Array | None:
            return None if value is None else value.numpy()

        stored = {} if one.method in SAMPLED else {t: array(v) for t, v in (one.lse or {}).items() if t != 1}
        return {
            "method": one.method,
            "parameter": parameter,
            "seed": seed,
            "grid": grid,
            "token_hash": entry.token_hash,
            "k_eff": np.full(tokens, kept, np.int32) if one.k_eff is None else array(one.k_eff),
            "ids": array(one.ids),
            "logprobs": array(one.logprobs),
            "mass": array(one.mass),
            "lse": stored,
            "gold": array(one.gold_logprob),
            "neg_entropy": array(one.neg_entropy),
        }

    def targets(self, key: str) -> SparseTargets:
        return self.cache[key]

    def check_tokens(self, key: str, token_ids: list[int]) -> None:
        self.cache.read([key], [token_ids])


class Packed(Engine):
    """The same by way of packed targets, where a sample can be packed."""

    def targets(self, key: str) -> SparseTargets:
        if self.cache._engine.find(key).tier != "fixed":
            return self.cache[key]
        return self.cache.packed([key])[0].unpack()

    def check_tokens(self, key: str, token_ids: list[int]) -> None:
        self.cache.packed([key], [token_ids])


READERS = {"document": Document, "engine": Engine, "packed": Packed}


def in_use(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as the golden JSON has them: entries in use only, floats that are fp32; the others must be empty."""
    k_eff = fields["k_eff"].tolist()

    def floats(values: Array) -> list[Any]:
        assert values.dtype == np.float32
        return [str(x) if np.isinf(x) else x for x in values.tolist()]

    def rows(values: Array, empty: float, show: Any) -> list[Any]:
        for row, k in zip(values, k_eff, strict=True):
            assert (row[k:] == empty).all()
        return [show(row[:k]) for row, k in zip(values, k_eff, strict=True)]

    out = fields | {
        "token_hash": fields["token_hash"] and fields["token_hash"].hex(),
        "kept": fields["ids"].shape[1],
        "k_eff": k_eff,
        "ids": rows(fields["ids"], -1, np.ndarray.tolist),
        "lse": {str(t): floats(values) for t, values in fields["lse"].items()},
    }
    for name, empty in (("logprobs", -np.inf), ("mass", 0)):
        out[name] = None if fields[name] is None else rows(fields[name], empty, floats)
    return out | {name: None if fields[name] is None else floats(fields[name]) for name in ("gold", "neg_entropy")}


def bits(value: Any) -> Any:
    """A value of ``fields`` that is equal to another's where all bits are."""
    if isinstance(value, dict):
        return tuple((name, bits(one)) for name, one in sorted(value.items()))
    return (value.shape, value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value


def found(reader: Any, folder: Path) -> str | dict[str, Any]:
    """All that a reader finds: the bits of each sample by key, or the code of what is wrong with one, or with all."""
    try:
        cache = reader(folder)
    except reader.error as error:
        return str(error.code)
    out: dict[str, Any] = {}
    keys = cache.keys()
    for key in keys:
        try:
            out[key] = bits(cache.fields(key))
        except reader.error as error:
            out[key] = error.code
    return out
