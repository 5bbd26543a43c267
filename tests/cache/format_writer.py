"""Writes the bytes of a soft-target cache from plain values that are already rounded: golden files and attacks.

Nothing is checked, so that a test can write what the format forbids: ``patch`` of every part, (place, bytes) pairs, is
laid over it before its checksum is taken. Layouts are those of csrc/cache/FORMAT.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from format_parts import align8, crc32c

Patch = Sequence[tuple[int, bytes]]
RECORDS = {"begin": 1, "open": 2, "commit": 3, "finish": 4, "close": 5, "drop": 6}


def u8(value: int) -> bytes:
    return struct.pack("<B", value)


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def f64(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def padded(data: bytes, and_then: int = 0) -> bytes:
    """Zeros after ``data``, so that ``and_then`` bytes more end at a multiple of 8."""
    return data + bytes(align8(len(data) + and_then) - and_then - len(data))


def patched(data: bytes, patch: Patch) -> bytes:
    for at, new in patch:
        data = data[:at] + new + data[at + len(new) :]
    return data


def sealed(data: bytes, patch: Patch = ()) -> bytes:
    data = patched(data, patch)
    return data + u32(crc32c(data))


def bits_of(values: Iterable[tuple[int, int]]) -> bytes:
    """(value, width) pairs, the least significant bit first, end to end."""
    text = "".join(format(value, f"0{width}b")[::-1] for value, width in values if width)
    return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


def header(
    vocab_size: int, temperatures: Sequence[float], *, shift: int = 1, metadata: bytes = b"{}", patch: Patch = ()
) -> bytes:
    n, m = len(temperatures), len(metadata)
    length = align8(32 + 8 * n + m + 4)
    fixed = struct.pack("<8sIIIBBHII", b"KDFCACHE", 1, length, vocab_size, n, shift, 0, m, 0)
    return sealed(padded(fixed + f64(*temperatures) + metadata, 4), patch)


@dataclass(frozen=True)
class Fixed:
    """A token of codec 1: k_eff ids, the deltas between them; a delta of bytes is an escape written as it is."""

    top: float
    ids: Sequence[int]
    deltas: Sequence[int | bytes] = ()
    lse: Sequence[float] = ()
    gold: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A token of codec 3; a value v is the count less 1, or the steps above ``step``."""

    neg_entropy: float
    ids: Sequence[int]
    values: Sequence[int]
    step: float | None = None
    gold: float | None = None


def fixed_block(tokens: Sequence[Fixed], id_bits: int, *, ragged: bool, extra: bytes = b"") -> bytes:
    """A block of codec 1; ``extra`` is put after its sections."""
    out = f32(*(t.top for t in tokens))
    for i in range(len(tokens[0].lse)):
        out += f32(*(t.lse[i] for t in tokens))
    out += f32(*(t.gold for t in tokens if t.gold is not None))
    if ragged:
        out += b"".join(u16(len(t.ids)) for t in tokens)
    out += b"".join(bits_of((i, id_bits) for i in t.ids) for t in tokens)
    escapes = b""
    for t in tokens:
        nibbles = [15 if isinstance(d, bytes) else min(d, 15) for d in t.deltas]
        out += bits_of((n, 4) for n in nibbles)
        for d in t.deltas:
            if isinstance(d, bytes):
                escapes += d
            elif d >= 15:
                escapes += u8(d - 15) if d < 270 else b"\xff" + u32(d)
    return padded(out + escapes + extra)


def _golomb(number: int, order: int) -> list[tuple[int, int]]:
    h = (number >> order) + 1
    b = h.bit_length() - 1
    return [(0, b), (1, 1), (h - (1 << b), b), (number & ((1 << order) - 1), order)]


def drawn_block(
    tokens: Sequence[Drawn], kept: int, *, ragged: bool, gap_order: int, order: int, extra: bytes = b""
) -> bytes:
    """A block of codec 3; ``extra`` is put after its sections."""
    out = f32(*(t.neg_entropy for t in tokens))
    out += f32(*(t.step for t in tokens if t.step is not None))
    out += f32(*(t.gold for t in tokens if t.gold is not None))
    if ragged:
        out += b"".join((u8 if kept <= 255 else u16)(len(t.ids)) for t in tokens)
    stream: list[tuple[int, int]] = []
    for t in tokens:
        last = -1
        for i, v in zip(t.ids, t.values, strict=True):
            gap, last = i - last - 1, i
            stream += [*_golomb(gap, gap_order), (v > 0, 1), *(_golomb(v - 1, order) if v else ())]
    return padded(out + u8(gap_order) + u8(order) + bits_of(stream) + extra)


@dataclass(frozen=True)
class SampleFrame:
    """A frame before it has a place; ``damage`` is laid over it after its checksums."""

    key: str | bytes
    tokens: int
    kept: int
    blocks: Sequence[bytes]
    codec: int = 1
    method: int = 0
    grid: int = 8
    flags: int = 0
    parameter: float = 0.0
    seed: int = 0
    token_hash: bytes = bytes(16)
    block_tokens: int = 64
    model: int = 0
    patch: Patch = ()
    damage: Patch = ()

    def pack(self, offset: int, shard_id: int) -> bytes:
        key = self.key.encode() if isinstance(self.key, str) else self.key
        table = b"".join(u32(len(b)) + u32(crc32c(b)) for b in self.blocks)
        variable = padded(key) + table + u32(len(self.blocks))
        length = 88 + len(variable) + 4
        out = struct.pack("<4sIQQQQd16s", b"KDFR", length, length + sum(map(len, self.blocks)), offset, shard_id,
                          self.seed, self.parameter, self.token_hash)  # fmt: skip
        out += struct.pack("<IHHHBBBBHQ", self.tokens, self.kept, len(key), self.block_tokens, self.codec, self.method,
                           self.grid, self.flags, 0, self.model)  # fmt: skip
        return patched(sealed(out + variable, self.patch) + b"".join(self.blocks), self.damage)


def index(shard_id: int, first: int, frames: Sequence[bytes], patch: Patch = (), extra: bytes = b"") -> bytes:
    """The index of packed frames, the first of which lies at byte ``first``; ``extra`` is put after the keys."""
    entries, keys, at = b"", b"", first
    for frame in frames:
        if frame[:4] == b"KDFM":
            entries += struct.pack("<QQ16sIIHHBBBB", at, len(frame), bytes(16), 56, 0, 0, 0, 2, 0, 0, 0)
            at += len(frame)
            continue
        (length,) = struct.unpack_from("<I", frame, 4)
        tokens, kept, key_bytes = struct.unpack_from("<IHH", frame, 64)
        codec, method, _, flags = frame[74:78]
        entries += struct.pack("<QQ16sIIHHBBBB", at, len(frame), frame[48:64], length, tokens, kept, key_bytes, 1,
                               flags, method, codec)  # fmt: skip
        keys += frame[88 : 88 + key_bytes]
        at += len(frame)
    out = struct.pack("<8sQQQ", b"KDFINDEX", shard_id, len(frames), len(keys)) + entries + keys
    return sealed(padded(out + extra, 4), patch)


def tail(shard_id: int, offset: int, length: int, patch: Patch = ()) -> bytes:
    return sealed(struct.pack("<QQQ", shard_id, offset, length), patch) + b"KDFT"


@dataclass(frozen=True)
class ModelFrame:
    """One copy of a model, the first or the second; patches are as in ``SampleFrame``."""

    payload: bytes
    copy: int = 0
    patch: Patch = ()
    damage: Patch = ()

    def pack(self, offset: int, shard_id: int) -> bytes:
        size = align8(56 + len(self.payload))
        out = struct.pack("<4sIQQQQIII", b"KDFM", len(self.payload), size, offset, shard_id,
                          offset - self.copy * size, crc32c(self.payload), 0, 0)  # fmt: skip
        return patched(padded(sealed(out, self.patch) + self.payload), self.damage)


@dataclass(frozen=True)
class Shard:
    """A shard; ``index``, ``tail`` and ``own`` (of the shard header) are patches, ``beyond`` follows all of it."""

    header: bytes
    shard_id: int
    writer: int
    ordinal: int
    frames: Sequence[SampleFrame | ModelFrame]
    finished: bool = True
    own: Patch = ()
    index: Patch = ()
    tail: Patch = ()
    index_extra: bytes = b""
    beyond: bytes = b""

    @property
    def first(self) -> int:
        return len(self.header) + 32

    def packed(self) -> list[bytes]:
        out, at = [], self.first
        for frame in self.frames:
            out.append(frame.pack(at, self.shard_id))
            at += len(out[-1])
        return out

    def samples(self, frames: int | None = None) -> list[SampleFrame]:
        """Those of the first ``frames`` frames that hold a sample."""
        return [frame for frame in self.frames[:frames] if isinstance(frame, SampleFrame)]

    def ends(self) -> list[int]:
        """Where the headers end, then each frame, then the whole where it is finished."""
        out = [self.first]
        for frame in self.packed():
            out.append(out[-1] + len(frame))
        return [*out, len(self.pack()) - len(self.beyond)] if self.finished else out

    def pack(self) -> bytes:
        frames = self.packed()
        out = self.header + sealed(
            struct.pack("<8sQQI", b"KDFSHARD", self.shard_id, self.writer, self.ordinal), self.own
        )
        at = len(out) + sum(map(len, frames))
        out += b"".join(frames)
        if self.finished:
            its_index = index(self.shard_id, self.first, frames, self.index, self.index_extra)
            out += its_index + tail(self.shard_id, at, len(its_index), self.tail)
        return out + self.beyond

    @property
    def name(self) -> str:
        return f"{self.writer:016x}-{self.ordinal:06d}." + ("shard" if self.finished else "open")


@dataclass(frozen=True)
class Record:
    """A journal record but for its number and writer."""

    kind: str
    ordinal: int = 0
    shard_id: int = 0
    size: int = 0
    samples: int = 0
    time: int = 0
    patch: Patch = ()

    def pack(self, writer: int, number: int) -> bytes:
        return sealed(struct.pack("<4sIQIIQQQQ", b"KDFJ", RECORDS[self.kind], writer, number, self.ordinal,
                                  self.shard_id, self.size, self.samples, self.time), self.patch) + b"KDFE"  # fmt: skip


def journal(writer: int, records: Sequence[Record]) -> bytes:
    return b"".join(record.pack(writer, number) for number, record in enumerate(records))


def manifest(raw_header: bytes, shards: Sequence[dict[str, object]], **totals: object) -> bytes:
    """``manifest.json`` from a cache header and what stands in it of each shard."""
    _, _, _, vocab, n, shift, _, m, _ = struct.unpack("<8sIIIBBHII", raw_header[:32])
    whole = {
        "format": 1,
        "header_crc": struct.unpack("<I", raw_header[-4:])[0],
        "vocab_size": vocab,
        "temperatures": list(struct.unpack_from(f"<{n}d", raw_header, 32)),
        "shift": shift,
        "metadata": json.loads(raw_header[32 + 8 * n : 32 + 8 * n + m]),
        **totals,
        "shards": sorted(shards, key=lambda shard: str(shard["file"])),
    }
    return json.dumps(whole, indent=1).encode()
