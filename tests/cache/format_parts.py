"""The parts of a soft-target cache, each judged by itself (csrc/cache/FORMAT.md, 3 to 5 and 7).

A part is judged in this order: magic and version, its lengths, its checksum, its fields; then by what other parts say
of it. Numbers in brackets are the document's sections.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

RAGGED, GOLD, HASHED, SEEDED = 1, 2, 4, 8
METHODS = ("topk", "topp", "sample", "pps")
FIXED, COMPACT, DRAWN = 1, 2, 3
BEGIN, OPEN, COMMIT, FINISH, CLOSE, DROP = 1, 2, 3, 4, 5, 6
MAX_METADATA = 2**20 - 1024


class FormatError(ValueError):
    """What is wrong with a cache: ``code`` is a word of section 10, ``file`` and ``offset`` say where."""

    def __init__(self, code: str, what: str, file: str, offset: int = 0):
        super().__init__(f"{code}: {what} ({file}, byte {offset})")
        self.code, self.file, self.offset = code, file, offset


def align8(n: int) -> int:
    return -(-n // 8) * 8


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


@functools.lru_cache(4096)  # of a damaged cache all parts but one have been seen before
def crc32c(data: bytes) -> int:
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True)
class Part:
    """A part of a file that has been found whole: ``data`` begins at byte ``at`` of ``file``."""

    file: str
    at: int
    data: bytes

    def check(self, holds: bool, what: str, code: str = "corrupt") -> None:
        if not holds:
            raise FormatError(code, what, self.file, self.at)

    def zero(self, start: int, end: int, what: str) -> None:
        self.check(not any(self.data[start:end]), f"{what} is not zero")

    def sealed(self, end: int) -> None:
        """The checksum in the four bytes before ``end`` covers all of the part before them."""
        (stored,) = struct.unpack_from("<I", self.data, end - 4)
        self.check(crc32c(self.data[: end - 4]) == stored, "CRC of the part", "checksum")


def cut(file: str, data: bytes, at: int, length: int, what: str, end: int | None = None) -> Part:
    """``length`` bytes of a file from ``at`` on, all of them before ``end``."""
    if at + length > (len(data) if end is None else end):
        raise FormatError("truncated", f"{what} of {length} bytes is cut off", file, at)
    return Part(file, at, data[at : at + length])


def _text(part: Part, raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError("corrupt", f"{what} is not UTF-8", part.file, part.at) from error


def _key(part: Part, raw: bytes) -> str:
    part.check(1 <= len(raw) <= 4096 and 0 not in raw, "key of 1 to 4096 bytes without NUL")
    return _text(part, raw, "key")


@dataclass(frozen=True)
class Header:
    """The cache header [3]."""

    raw: bytes
    vocab_size: int
    temperatures: tuple[float, ...]
    shift: int
    metadata: dict[str, Any]

    @property
    def crc(self) -> int:
        return int(struct.unpack("<I", self.raw[-4:])[0])

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def other_temperatures(self) -> tuple[float, ...]:
        """Those whose lse is stored."""
        return tuple(t for t in self.temperatures if t != 1.0)


def _metadata(part: Part, raw: bytes) -> dict[str, Any]:
    def constant(name: str) -> None:
        part.check(False, f"metadata holds {name}, which is not JSON")

    text = _text(part, raw, "metadata")
    try:
        value = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormatError("corrupt", f"metadata is not JSON: {error}", part.file, part.at) from error
    part.check(isinstance(value, dict), "metadata is not a JSON object")
    return dict(value)


def read_header(file: str, data: bytes) -> Header:
    """The cache header at the beginning of ``data``, which may go on after it."""
    magic = cut(file, data, 0, 8, "cache header")
    magic.check(magic.data == b"KDFCACHE", "magic of the cache header")
    (version,) = struct.unpack("<I", cut(file, data, 8, 4, "cache header").data)
    magic.check(version == 1, f"version {version}", "version")
    fixed = cut(file, data, 0, 32, "cache header")
    _, _, length, vocab, n, shift, zero16, m, zero32 = struct.unpack("<8sIIIBBHII", fixed.data)
    fixed.check(length % 8 == 0 and 40 <= length <= align8(36 + 8 * 16 + MAX_METADATA), "header_bytes")
    part = cut(file, data, 0, length, "cache header")
    part.sealed(length)
    part.check(1 <= vocab <= 2**24, "vocab_size")
    part.check(1 <= n <= 16, "number of temperatures")
    part.check(shift in (0, 1), "shift")
    part.check(zero16 == 0 and zero32 == 0, "zero field of the cache header")
    part.check(m <= MAX_METADATA and length == align8(36 + 8 * n + m), "header_bytes, metadata_bytes")
    temperatures = struct.unpack_from(f"<{n}d", part.data, 32)
    part.check(all(0 < t < math.inf for t in temperatures), "temperature")
    part.check(list(temperatures) == sorted(set(temperatures)), "temperatures are not strictly ascending")
    end = 32 + 8 * n + m
    part.zero(end, length - 4, "padding of the cache header")
    return Header(part.data, vocab, temperatures, shift, _metadata(part, part.data[32 + 8 * n : end]))


@dataclass
class Claim:
    """What a journal says of one shard: (bytes, samples, time) of its records of type 2, 3 and 4."""

    writer: int
    ordinal: int
    shard_id: int
    records: list[tuple[int, int, int]]
    finished: bool = False
    dropped: bool = False

    @property
    def done(self) -> bool:
        return self.finished or self.dropped

    @property
    def name(self) -> str:
        return f"{self.writer:016x}-{self.ordinal:06d}"


def read_journal(file: str, data: bytes, header: Header) -> list[Claim]:
    """The shards that a journal names [7]; a torn last record is left out."""
    claims: list[Claim] = []
    writer = int(file[:16], 16)
    closed = False
    whole = len(data) - (1 if data[-1:] == b"\0" else 0)
    for number in range(whole // 64):
        part = Part(file, 64 * number, data[64 * number : 64 * number + 64])
        magic, kind, who, count, ordinal, shard_id, size, samples, time, _, end = struct.unpack(
            "<4sIQIIQQQQI4s", part.data
        )
        part.check(magic == b"KDFJ" and end == b"KDFE", "magic of a record")
        part.sealed(60)
        part.check(BEGIN <= kind <= DROP, f"record of type {kind}")
        part.check(count == number, "number of a record")
        part.check((kind == BEGIN) == (number == 0), "begin is not first")
        part.check(kind == DROP or not closed, "a journal goes on after close")
        part.check(size <= 2**48 and size % 8 == 0, "bytes of a record")
        part.check(who == writer, "writer id of a record is not that of the journal's name", "mismatch")
        if kind == BEGIN:
            part.check(ordinal == size == samples == 0, "zero field of begin")
            part.check(shard_id == header.crc, "begin names another cache header", "mismatch")
        elif kind == CLOSE:
            part.check(ordinal == shard_id == size == 0, "zero field of close")
            part.check(samples == sum(c.records[-1][1] for c in claims), "samples of close")
            part.check(all(c.done for c in claims), "close before a shard was finished")
            closed = True
        elif kind == OPEN:
            part.check(all(c.done for c in claims), "a shard is opened before the last was finished")
            part.check(ordinal == len(claims) and ordinal <= 999999, "shards are not opened in order")
            part.check(shard_id != 0 and samples == 0, "shard_id or samples of open")
            part.check(size == len(header.raw) + 32, "open: bytes are not those of both headers", "mismatch")
            claims.append(Claim(writer, ordinal, shard_id, [(size, 0, time)]))
        else:
            part.check(ordinal < len(claims), "record of a shard that was not opened")
            claim = claims[ordinal]
            part.check(shard_id == claim.shard_id, "shard_id of a record")
            part.check(not claim.dropped, "record of a shard that was dropped")
            if kind == DROP:
                part.check(size == samples == 0, "zero field of drop")
                claim.dropped = True
                continue
            part.check(not claim.finished, "record of a shard that was finished")
            part.check(size >= claim.records[-1][0] and samples >= claim.records[-1][1], "a commit goes back")
            claim.records.append((size, samples, time))
            claim.finished = kind == FINISH
    return claims


@dataclass(frozen=True)
class Frame:
    """The header of a sample frame [5], or what the index of its shard repeats of it."""

    key: str
    offset: int
    size: int
    header_bytes: int
    token_hash: bytes
    tokens: int
    kept: int
    flags: int
    method: int
    codec: int


@dataclass(frozen=True)
class FrameHeader(Frame):
    """All of a frame's header; ``blocks`` are (length, CRC), ``content`` is what does not say where the frame lies."""

    seed: int
    parameter: float
    block_tokens: int
    grid: int
    model: int
    blocks: list[tuple[int, int]]
    content: bytes


def _limits(part: Part, header_bytes: int, tokens: int, kept: int) -> None:
    part.check(header_bytes <= 96 + 4096 + 8 * 2**14, "header_bytes of a frame")
    part.check(tokens <= 2**20 and kept >= 1 and tokens * kept <= 2**28, "tokens or kept of a frame")


def read_frame_header(file: str, data: bytes, at: int, end: int, shard_id: int) -> FrameHeader:
    """The header of the frame at byte ``at``, of which nothing lies at ``end`` or beyond."""
    magic = cut(file, data, at, 4, "frame header", end)
    magic.check(magic.data == b"KDFR", "magic of the frame")
    (length, size) = struct.unpack("<IQ", cut(file, data, at, 16, "frame header", end).data[4:])
    magic.check(104 <= length <= 96 + 4096 + 8 * 2**14 and length % 8 == 0, "header_bytes of the frame")
    magic.check(length <= size <= 2**48 and size % 8 == 0, "frame_bytes")
    cut(file, data, at, size, "frame", end)
    part = cut(file, data, at, length, "frame header", end)
    part.sealed(length)
    (_, _, _, offset, its_shard, seed, parameter, token_hash, tokens, kept, key_bytes, block_tokens, codec,
     method, grid, flags, zero16, model) = struct.unpack("<4sIQQQQd16sIHHHBBBBHQ", part.data[:88])  # fmt: skip
    _limits(part, length, tokens, kept)
    part.check(block_tokens in (64, 128, 256), "block_tokens")
    part.check(2 <= grid <= 10, "grid")
    methods = {FIXED: (0, 1), COMPACT: (0, 1), DRAWN: (2, 3)}.get(codec, ())
    part.check(method in methods, f"codec {codec} with method {method}")
    part.check(flags < 16 and not (flags & SEEDED and codec != DRAWN), "flags")
    part.check(bool(flags & HASHED) or not any(token_hash), "token_hash without its flag")
    part.check(bool(flags & SEEDED) or seed == 0, "seed without its flag")
    part.check(zero16 == 0 and (model == 0 or codec == COMPACT), "zero field of the frame")
    part.check(codec != COMPACT or (0 < model < offset and model % 8 == 0), "model of the frame")
    if METHODS[method] == "topp":
        part.check(0 <= parameter <= 1, "mass aimed at")
    elif METHODS[method] == "sample":
        part.check(1 <= parameter <= 2**24 and parameter == int(parameter), "number of draws")
    else:
        part.zero(40, 48, "parameter")
    count = -(-tokens // block_tokens)
    table = 88 + align8(key_bytes)
    part.check(length == table + 8 * count + 8, "header_bytes of the frame")
    part.check(struct.unpack_from("<I", part.data, length - 8) == (count,), "number of blocks")
    key = _key(part, part.data[88 : 88 + key_bytes])
    part.zero(88 + key_bytes, table, "padding of the key")
    blocks = [struct.unpack_from("<II", part.data, table + 8 * i) for i in range(count)]
    most = [256 + min(block_tokens, tokens - i * block_tokens) * (128 + 20 * kept) for i in range(count)]
    part.check(all(b % 8 == 0 and b <= limit for (b, _), limit in zip(blocks, most, strict=True)), "length of a block")
    part.check(length + sum(b for b, _ in blocks) == size, "frame_bytes")
    part.check(offset == at and its_shard == shard_id, "the frame belongs elsewhere", "mismatch")
    said = (key, at, size, length, token_hash, tokens, kept, flags, method, codec)
    content = part.data[:16] + part.data[32 : length - 4]
    return FrameHeader(*said, seed, parameter, block_tokens, grid, model, blocks, content)


def read_index(file: str, data: bytes, shard_id: int, first: int) -> tuple[list[Frame], set[int]]:
    """The sample frames of a finished shard [4], whose frames begin at byte ``first``; and where frames end."""
    tail = cut(file, data, max(first, len(data) - 32), 32, "tail")
    tail.check(tail.data[28:] == b"KDFT", "magic of the tail")
    its_shard, at, length, crc = struct.unpack("<QQQI", tail.data[:28])
    tail.check(crc32c(tail.data[:24]) == crc, "CRC of the tail", "checksum")
    tail.check(its_shard == shard_id, "the tail is another shard's", "mismatch")
    tail.check(first <= at <= tail.at and at + length == tail.at, "place of the index")
    tail.check(length >= 40 and length % 8 == 0, "length of the index")
    part = cut(file, data, at, length, "index")
    magic, its_shard, n, key_bytes = struct.unpack("<8sQQQ", part.data[:32])
    part.check(magic == b"KDFINDEX", "magic of the index")
    part.sealed(length)
    part.check(its_shard == shard_id, "the index is another shard's", "mismatch")
    part.check(length == align8(36 + 48 * n + key_bytes), "length of the index")
    part.zero(32 + 48 * n + key_bytes, length - 4, "padding of the index")
    frames, ends, keys, reached = [], set(), 32 + 48 * n, first
    for i in range(n):
        entry = struct.unpack_from("<QQ16sIIHHBBBB", part.data, 32 + 48 * i)
        offset, size, token_hash, header_bytes, tokens, kept, key_length, kind, flags, method, codec = entry
        part.check(offset == reached and header_bytes <= size and size % 8 == 0, "frames do not tile the shard")
        part.check(kind in (1, 2), f"frame of kind {kind}")
        reached += size
        ends.add(reached)
        if kind == 2:
            part.check(not any((*token_hash, tokens, kept, key_length, flags, method, codec)), "fields of a model")
            part.check(header_bytes == 56, "header_bytes of a model")
            continue
        part.check(keys + key_length <= 32 + 48 * n + key_bytes, "keys of the index")
        key = _key(part, part.data[keys : keys + key_length])
        keys += key_length
        _limits(part, header_bytes, tokens, kept)
        part.check(flags < 16 and method < len(METHODS) and codec in (FIXED, COMPACT, DRAWN), "fields of an entry")
        frames.append(Frame(key, offset, size, header_bytes, token_hash, tokens, kept, flags, method, codec))
    part.check(keys == 32 + 48 * n + key_bytes, "keys of the index")
    part.check(reached == at, "frames do not tile the shard")
    return frames, ends
