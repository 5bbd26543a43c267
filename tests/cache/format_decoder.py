"""Reads a soft-target cache in plain Python: a second implementation, written from csrc/cache/FORMAT.md alone.

It is slow and short on purpose: where it and the C++ reader disagree, the document says which of them is wrong.
``format_parts`` takes files apart, ``format_blocks`` and ``format_compact`` the blocks of a frame, ``format_model``
the models of compact ones; here they become samples under keys.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from format_blocks import Block, Token, decode_drawn, decode_fixed
from format_compact import decode_compact
from format_model import read_model, read_model_header
from format_parts import (
    COMPACT,
    DRAWN,
    FIXED,
    GOLD,
    HASHED,
    METHODS,
    SEEDED,
    Claim,
    FormatError,
    Frame,
    FrameHeader,
    Header,
    Part,
    crc32c,
    cut,
    read_frame_header,
    read_header,
    read_index,
    read_journal,
)


@dataclass(frozen=True)
class Sample:
    """A sample as the document gives it back: S tokens, K columns, of which ``k_eff`` are in use.

    ids are (S, K) int32, -1 beyond k_eff; logprobs (S, K) fp32, -inf there; mass (S, K) fp32, 0 there; lse maps each
    captured temperature other than 1 to (S,) fp32, but not of drawn samples; gold, neg_entropy and step are (S,) fp32.
    """

    key: str
    method: str
    codec: int
    grid: int
    parameter: float
    seed: int | None
    token_hash: bytes | None
    k_eff: np.ndarray[Any, Any]
    ids: np.ndarray[Any, Any]
    logprobs: np.ndarray[Any, Any] | None
    mass: np.ndarray[Any, Any] | None
    lse: dict[float, np.ndarray[Any, Any]]
    gold: np.ndarray[Any, Any] | None
    neg_entropy: np.ndarray[Any, Any] | None
    step: np.ndarray[Any, Any] | None

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises ``misaligned`` unless the targets were made from these tokens."""
        if len(token_ids) != len(self.k_eff) or self.token_hash != hash_of(token_ids):
            raise FormatError("misaligned", f"nothing says that {self.key!r} was made from these tokens", self.key)


def hash_of(token_ids: Sequence[int]) -> bytes:
    """token_hash [5]"""
    return hashlib.blake2b(struct.pack(f"<{len(token_ids)}q", *token_ids), digest_size=16).digest()


def _decoder(file: str, data: bytes, frame: FrameHeader, shard_id: int, header: Header) -> Callable[[Block], None]:
    """Of the frame's blocks, with the model that they need."""
    if frame.codec != COMPACT or not frame.blocks:
        return {FIXED: decode_fixed, COMPACT: decode_fixed, DRAWN: decode_drawn}[frame.codec]
    model = read_model(file, data, frame.model, frame.offset, shard_id, header)
    return lambda block: decode_compact(block, model)


def read_frame(file: str, data: bytes, frame: FrameHeader, shard_id: int, header: Header) -> Sample:
    """The sample in a frame of ``data``."""
    if frame.codec == DRAWN and len(header.temperatures) != 1:
        raise FormatError("corrupt", "a drawn frame in a cache of several temperatures", file, frame.offset)
    decode = _decoder(file, data, frame, shard_id, header)
    tokens: list[Token] = []
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    at = frame.offset + frame.header_bytes
    for i, (length, crc) in enumerate(frame.blocks):
        part = Part(file, at, data[at : at + length])
        part.check(crc32c(part.data) == crc, f"CRC of block {i} of {frame.key!r}", "checksum")
        block = Block(part, frame, header, min(frame.block_tokens, frame.tokens - i * frame.block_tokens))
        decode(block)
        block.end()
        tokens += block.tokens
        parts.append(block.columns)
        at += length

    def rows(of: Callable[[Token], np.ndarray[Any, Any]], fill: float, dtype: type) -> np.ndarray[Any, Any]:
        out: np.ndarray[Any, Any] = np.full((frame.tokens, frame.kept), fill, dtype)
        for row, token in zip(out, tokens, strict=True):
            row[: len(of(token))] = of(token)
        return out

    def column(name: str, there: bool = True) -> np.ndarray[Any, Any] | None:
        return np.concatenate([np.zeros(0, np.float32), *(p[name] for p in parts)]) if there else None

    drawn = frame.codec == DRAWN
    method = METHODS[frame.method]
    return Sample(
        key=frame.key,
        method=method,
        codec=frame.codec,
        grid=frame.grid,
        parameter=frame.parameter,
        seed=frame.seed if frame.flags & SEEDED else None,
        token_hash=frame.token_hash if frame.flags & HASHED else None,
        k_eff=np.array([len(t.ids) for t in tokens], np.int32),
        ids=rows(lambda t: t.ids, -1, np.int32),
        logprobs=None if drawn else rows(lambda t: t.weights, -np.inf, np.float32),
        mass=rows(lambda t: t.weights, 0, np.float32) if drawn else None,
        lse={t: values for t in header.other_temperatures if (values := column(f"lse {t!r}", not drawn)) is not None},
        gold=column("gold", bool(frame.flags & GOLD)),
        neg_entropy=column("neg_entropy", drawn),
        step=column("step", method == "pps"),
    )


@dataclass(frozen=True)
class Found:
    """Where a frame lies, and when it was committed."""

    time: int
    writer: int
    ordinal: int
    shard_id: int
    file: str
    frame: Frame


class Cache:
    """A cache in memory: a mapping of keys to samples. A fault of one frame is raised where its key is read."""

    def __init__(self, files: Mapping[str, bytes]):
        if "cache.header" not in files:
            raise FormatError("missing", "no cache header", "cache.header")
        self.files = files
        self.header = read_header("cache.header", files["cache.header"])
        if len(files["cache.header"]) != len(self.header.raw):
            raise FormatError("corrupt", "something follows the header", "cache.header", len(self.header.raw))
        self._found: dict[str, list[Found]] = {}
        for name in sorted(files):
            if re.fullmatch(r"[0-9a-f]{16}\.journal", name):
                for claim in read_journal(name, files[name], self.header):
                    if not claim.dropped:
                        self._open_shard(claim)

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        return cls({p.name: p.read_bytes() for p in Path(path).glob("*") if p.is_file()})

    def _open_shard(self, claim: Claim) -> None:
        names = [claim.name + ".shard"] + ([] if claim.finished else [claim.name + ".open"])
        file = next((name for name in names if name in self.files), None)
        if file is None:
            raise FormatError("missing", "the journal names this shard", claim.name)
        data, (committed, samples, _) = self.files[file], claim.records[-1]
        first = len(self.header.raw) + 32
        cut(file, data, 0, committed, "what is committed")
        if data[: first - 32] != self.header.raw:
            read_header(file, data)
            raise FormatError("mismatch", "the shard has another cache header", file)
        part = Part(file, first - 32, data[first - 32 : first])
        part.check(part.data[:8] == b"KDFSHARD", "magic of the shard header")
        part.sealed(32)
        ids = struct.unpack_from("<QQI", part.data, 8)
        part.check(ids[0] != 0, "shard_id of the shard header")
        part.check(ids == (claim.shard_id, claim.writer, claim.ordinal), "shard header and journal differ", "mismatch")
        frames: list[Frame] = []
        if claim.finished:
            part.check(len(data) == committed, "something follows the tail")
            frames, ends = read_index(file, data, claim.shard_id, first)
        else:
            ends = set()
            while (at := max(ends, default=first)) < committed:
                if data[at : at + 4] == b"KDFM":
                    ends.add(at + read_model_header(file, data, at, committed, claim.shard_id).size)
                    continue
                frames.append(read_frame_header(file, data, at, committed, claim.shard_id))
                ends.add(at + frames[-1].size)
        for record in claim.records:
            size, samples, _ = record
            whole = size in ends | {first} or (claim.finished and record is claim.records[-1])
            covered = sum(f.offset + f.size <= size for f in frames)
            part.check(whole and samples == covered, "a record does not end with a frame", "mismatch")
        for frame in frames:
            time = next(time for size, _, time in claim.records if frame.offset + frame.size <= size)
            found = Found(time, claim.writer, claim.ordinal, claim.shard_id, file, frame)
            self._found.setdefault(frame.key, []).append(found)

    def keys(self) -> list[str]:
        return list(self._found)

    def __getitem__(self, key: str) -> Sample:
        if key not in self._found:
            raise FormatError("missing", f"no sample {key!r}", "cache.header")
        found = sorted(self._found[key], key=lambda f: (f.time, f.writer, f.ordinal, f.frame.offset))
        first = found[0]
        if len(found) > 1:
            hashed = {bool(f.frame.flags & HASHED) for f in found}
            # Read only where none is hashed: a damaged header has the key refused for that.
            contents = {f.frame.token_hash if True in hashed else self._frame_header(f).content for f in found}
            if len(hashed) > 1 or len(contents) > 1:
                raise FormatError("duplicate", f"different contents of {key!r}", first.file, first.frame.offset)
        frame = self._frame_header(first)
        return read_frame(first.file, self.files[first.file], frame, first.shard_id, self.header)

    def _frame_header(self, found: Found) -> FrameHeader:
        """The header of a frame; the index, where that named the frame, repeats it."""
        said, data = found.frame, self.files[found.file]
        if isinstance(said, FrameHeader):
            return said
        frame = read_frame_header(found.file, data, said.offset, said.offset + said.size, found.shard_id)
        if any(getattr(frame, f.name) != getattr(said, f.name) for f in fields(Frame)):
            raise FormatError("mismatch", f"index and frame of {said.key!r} differ", found.file, said.offset)
        return frame
