"""The models of compact frames (csrc/cache/FORMAT.md, 6.4): their frames, the two copies of each, and the payload."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from format_parts import FormatError, Header, Part, align8, crc32c, cut

HEADER = 56
MAX_PAYLOAD = 2**24
PLACES, HISTORIES = 10, 4


@dataclass(frozen=True)
class ModelHeader:
    """The header of a model frame; ``first`` is where the first copy of the model lies."""

    offset: int
    size: int
    payload_bytes: int
    payload_crc: int
    first: int


def read_model_header(file: str, data: bytes, at: int, end: int, shard_id: int) -> ModelHeader:
    """The header of the model frame at byte ``at``, of which nothing lies at ``end`` or beyond."""
    magic = cut(file, data, at, 4, "model header", end)
    magic.check(magic.data == b"KDFM", "magic of the model frame")
    part = cut(file, data, at, HEADER, "model header", end)
    _, payload_bytes, size, offset, its_shard, first, payload_crc, zero44, zero48, _ = struct.unpack(
        "<4sIQQQQIIII", part.data
    )
    part.check(1 <= payload_bytes <= MAX_PAYLOAD, "payload_bytes")
    part.check(size == align8(HEADER + payload_bytes), "frame_bytes of a model")
    cut(file, data, at, size, "model frame", end)
    part.sealed(HEADER)
    part.check(zero44 == zero48 == 0, "zero field of a model frame")
    part.check(first in (offset, offset - size), "a model that is neither copy of one")
    part.check(offset == at and its_shard == shard_id, "the model frame belongs elsewhere", "mismatch")
    return ModelHeader(at, size, payload_bytes, payload_crc, first)


class Symbol(NamedTuple):
    start: int
    frequency: int
    base: int
    raw: int


class Alphabet:
    """Symbols whose slots tile 0 to 2^precision - 1."""

    def __init__(self, precision: int, symbols: list[Symbol]):
        self.precision, self.symbols = precision, symbols
        self._starts = [symbol.start for symbol in symbols]

    def at(self, slot: int) -> Symbol:
        return self.symbols[bisect_right(self._starts, slot) - 1]


@dataclass(frozen=True)
class Model:
    """``deltas[4 p + h]`` is the alphabet of place p and history h, ``ids`` has one for each class."""

    listed: list[int]
    classes: Alphabet
    kept: Alphabet
    top: Alphabet
    gold: Alphabet
    lse: list[Alphabet]
    deltas: list[Alphabet]
    ids: list[Alphabet]


class _Payload:
    """Takes a payload apart from its beginning on."""

    def __init__(self, part: Part):
        self.part, self.used = part, 0

    def take(self, length: int) -> bytes:
        self.part.check(self.used + length <= len(self.part.data), "a model ends before its fields do")
        self.used += length
        return self.part.data[self.used - length : self.used]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        value = 0
        for group in range(5):
            byte = self.byte()
            value |= (byte & 127) << 7 * group
            if byte < 128:
                self.part.check(byte > 0 or group == 0, "a number in more bytes than it needs")
                return value
        raise FormatError("corrupt", "a number of more than 5 bytes", self.part.file, self.part.at)

    def alphabet(self, limit: int, *, precision: int = 11, most: int | None = None, unit: int = 1) -> Alphabet:
        check = self.part.check
        n = self.number()
        check(1 <= n <= (most or 1 << precision), "number of symbols")
        symbols, base, start = [], 0, 0
        for _ in range(n):
            step = self.number()
            base += step >> 1
            raw = self.byte() if step & 1 else 0
            check(1 <= raw <= 32 if step & 1 else raw == 0, "raw bits of a symbol")
            frequency = self.number()
            check(frequency >= 1, "a symbol without slots")
            check(base * unit + (1 << raw) <= limit, "a value that an alphabet must not have")
            symbols.append(Symbol(start, frequency, base, raw))
            start += frequency
        check(start == 1 << precision, "sum of frequencies")
        return Alphabet(precision, symbols)

    def ids(self, count: int, bits: int, vocab_size: int) -> list[int]:
        stream = int.from_bytes(self.take(-(-count * bits // 8)), "little")
        ids = [stream >> i * bits & (1 << bits) - 1 for i in range(count)]
        self.part.check(stream >> count * bits == 0, "bits after the last id")
        self.part.check(all(i < vocab_size for i in ids), "an id beyond the vocabulary")
        self.part.check(len(set(ids)) == count, "an id is listed twice")
        return ids


def read_payload(part: Part, header: Header) -> Model:
    """The model in a payload whose checksum is right."""
    payload, others = _Payload(part), len(header.other_temperatures)
    part.check(payload.byte() == 1, "layout of a model", "version")
    classes = payload.byte()
    part.check(1 <= classes <= 64, "number of classes")
    part.check(payload.byte() == others, "a model of other temperatures", "mismatch")
    part.check(payload.number() == header.vocab_size, "a model of another vocabulary", "mismatch")
    count = payload.number()
    part.check(count <= min(header.vocab_size, 65535), "number of ids listed")
    model = Model(
        listed=payload.ids(count, header.id_bits, header.vocab_size),
        classes=payload.alphabet(classes),
        kept=payload.alphabet(2**16),
        top=payload.alphabet(2**32, unit=2**20),
        gold=payload.alphabet(2**32, unit=2**20),
        lse=[payload.alphabet(2**32, unit=2**20) for _ in range(others)],
        deltas=[payload.alphabet(2**24, most=256) for _ in range(PLACES * HISTORIES)],
        ids=[payload.alphabet(count + (1 << header.id_bits), precision=13) for _ in range(classes)],
    )
    part.check(payload.used == len(part.data), "something follows a model")
    return model


def _payload(file: str, data: bytes, frame: ModelHeader) -> Part:
    at = frame.offset + HEADER
    part = Part(file, at, data[at : at + frame.payload_bytes])
    part.check(crc32c(part.data) == frame.payload_crc, "CRC of a model's payload", "checksum")
    rest = data[at + frame.payload_bytes : frame.offset + frame.size]
    part.check(not any(rest), "padding of a model is not zero")
    return part


def read_model(file: str, data: bytes, at: int, end: int, shard_id: int, header: Header) -> Model:
    """The model whose first copy is at byte ``at``, or was; both copies lie before ``end``.

    Where neither is sound the fault is that of the first. What stands in a sound one is not looked for in the other.
    """
    places: Iterable[int] = range(at + 8, min(at + 2**25, end), 8)
    try:
        first = read_model_header(file, data, at, end, shard_id)
        Part(file, at, b"").check(first.first == at, "a frame names the second copy of its model", "mismatch")
        places = (at + first.size,)
        payload = _payload(file, data, first)
    except FormatError as fault:
        damage = fault
    else:
        return read_payload(payload, header)
    for place in places:
        if data[place : place + 4] == b"KDFM":
            try:
                second = read_model_header(file, data, place, end, shard_id)
                payload = _payload(file, data, second)
            except FormatError:
                continue
            if second.first == at:
                return read_payload(payload, header)
    raise damage
