"""Writes models and compact blocks (csrc/cache/FORMAT.md, 6.2 and 6.4) from plain values, for golden files and attacks.

As in ``format_writer`` nothing is checked but that there is a code for what shall be written: the symbols that a writer
keeps for whatever comes let a test write most of what the format forbids.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import format_writer as w
from format_parts import COMPACT

PRECISION, ID_PRECISION = 11, 13
UNIT = 2**20  # of the bases of floats
DELTAS = 40
_PLACE_STARTS = (2, 3, 5, 9, 13, 17, 25, 33, 65)


class Symbol(NamedTuple):
    base: int
    raw: int
    frequency: int


Alphabet = Sequence[Symbol]


@dataclass(frozen=True)
class Token(w.Fixed):
    """A token of codec 2; ``deltas`` are numbers."""

    row_class: int = 0


@dataclass(frozen=True)
class Model:
    """The alphabets of a model; ``deltas`` are 40, ``ids`` one for each class."""

    classes: Alphabet
    kept: Alphabet
    top: Alphabet
    gold: Alphabet
    lse: Sequence[Alphabet]
    deltas: Sequence[Alphabet]
    ids: Sequence[Alphabet]
    listed: Sequence[int] = ()

    def payload(self, vocab_size: int) -> bytes:
        width = _width(vocab_size)
        out = w.u8(1) + w.u8(len(self.ids)) + w.u8(len(self.lse)) + number(vocab_size) + number(len(self.listed))
        out += w.bits_of((i, width) for i in self.listed)
        every = [self.classes, self.kept, self.top, self.gold, *self.lse, *self.deltas, *self.ids]
        return out + b"".join(alphabet(one) for one in every)


def number(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += w.u8(value & 127 | 128)
        value >>= 7
    return out + w.u8(value)


def alphabet(symbols: Alphabet) -> bytes:
    out, before = number(len(symbols)), 0
    for base, raw, frequency in symbols:
        out += number(2 * (base - before) + (raw > 0)) + (w.u8(raw) if raw else b"") + number(frequency)
        before = base
    return out


def counted(values: Iterable[int], escape: Symbol | None = None, precision: int = PRECISION) -> list[Symbol]:
    """A symbol for each value, about as frequent as that, and the escape with the frequency that it has."""
    counts = sorted(Counter(values).items())
    slots = (1 << precision) - (escape.frequency if escape else 0)
    spare, total = slots - len(counts), sum(n for _, n in counts)
    symbols = [Symbol(value, 0, 1 + spare * n // total) for value, n in counts]
    symbols += [escape] if escape else []
    rest = (1 << precision) - sum(s.frequency for s in symbols)
    most = max(range(len(symbols)), key=lambda i: symbols[i].frequency)
    symbols[most] = symbols[most]._replace(frequency=symbols[most].frequency + rest)
    return sorted(symbols)


def _width(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def raw_model(vocab_size: int, lse: int, *, listed: Sequence[int] = (), class_bits: int = 0) -> Model:
    """Knows nothing: a value is raw bits, but of an id that is listed; there are 2^class_bits classes."""
    whole = 1 << PRECISION
    floats, delta = [Symbol(0, 32, whole)], [Symbol(0, 24, whole)]
    places = [Symbol(place, 0, 1) for place in range(len(listed))]
    ids = [*places, Symbol(len(places), _width(vocab_size), (1 << ID_PRECISION) - len(places))]
    return Model(
        classes=[Symbol(0, class_bits, whole)],
        kept=[Symbol(0, 16, whole)],
        top=floats,
        gold=floats,
        lse=[floats] * lse,
        deltas=[delta] * DELTAS,
        ids=[ids] * (1 << class_bits),
        listed=listed,
    )


def _float_symbols(values: Iterable[float], escape: int) -> list[Symbol]:
    """Buckets of 2^20 numbers, and an escape."""
    buckets = [struct.unpack("<I", w.f32(value))[0] >> 20 for value in values]
    escaped = Symbol(0, 32, escape)
    return sorted(s if s.raw else s._replace(raw=20) for s in counted(buckets, escaped))


def model_of(tokens: Sequence[Token], vocab_size: int, lse: int, *, listed: int = 0, escape: int = 8) -> Model:
    """A model from the counts of tokens, with the most frequent ids listed and escapes of that frequency."""
    by_count = Counter(i for t in tokens for i in t.ids).most_common(listed)
    ranks = {i: rank for rank, (i, _) in enumerate(by_count)}
    ids: dict[int, list[int]] = defaultdict(list)
    deltas: dict[int, list[int]] = defaultdict(list)
    for t in tokens:
        ids[t.row_class] += [ranks.get(i, len(ranks) + i) for i in t.ids]
        for number_of, delta in _delta_alphabets(t):
            deltas[number_of].append(delta)
    of_ids = Symbol(len(ranks), _width(vocab_size), escape)
    return Model(
        classes=counted(t.row_class for t in tokens),
        kept=counted((len(t.ids) for t in tokens), Symbol(0, 16, escape)),
        top=_float_symbols((t.top for t in tokens), escape),
        gold=_float_symbols((0.0 if t.gold is None else t.gold for t in tokens), escape),
        lse=[_float_symbols((t.lse[i] for t in tokens), escape) for i in range(lse)],
        deltas=[counted(deltas[i], Symbol(0, 24, escape)) for i in range(DELTAS)],
        ids=[counted(ids[c], of_ids, ID_PRECISION) for c in range(1 + max(t.row_class for t in tokens))],
        listed=[i for i, _ in by_count],
    )


def _delta_alphabets(token: Token) -> list[tuple[int, int]]:
    """(number of the alphabet, delta) for each delta."""
    out, before = [], 0
    for i, delta in enumerate(token.deltas, 1):
        assert isinstance(delta, int)
        its_place = sum(i >= start for start in _PLACE_STARTS)
        out.append((4 * its_place + (before if before < 2 else 2 if before < 4 else 3), delta))
        before = delta
    return out


class _Lane:
    """A lane that is written from its end on."""

    def __init__(self, state: int):
        self.state = state
        self.words: list[int] = []

    def _make_room(self, bound: int) -> None:
        if self.state >= bound:
            self.words.insert(0, self.state & 0xFFFFFFFF)
            self.state >>= 32

    def raw(self, bits: int, value: int) -> None:
        if bits > 0:
            self._make_room(1 << 64 - bits)
            self.state = self.state << bits | value

    def symbol(self, symbols: Alphabet, chosen: int, precision: int) -> None:
        frequency, start = symbols[chosen].frequency, sum(s.frequency for s in symbols[:chosen])
        self._make_room(frequency << 64 - precision)
        self.state = (self.state // frequency << precision) + self.state % frequency + start


Choice = Callable[[Sequence[int]], int]


def _codes(symbols: Alphabet, value: int, unit: int) -> list[int]:
    """The symbols that can hold a value, the shortest code first."""
    holding = [i for i, s in enumerate(symbols) if 0 <= value - s.base * unit < 1 << s.raw]
    return sorted(holding, key=lambda i: (1 << symbols[i].raw) / symbols[i].frequency)


def _values(token: Token, model: Model, *, ragged: bool) -> list[tuple[Alphabet, int, int, int]]:
    """(alphabet, precision, unit of its bases, value) in the order in which a reader asks for them."""
    out: list[tuple[Alphabet, int, int, int]] = [(model.classes, PRECISION, 1, token.row_class)]
    if ragged:
        out.append((model.kept, PRECISION, 1, len(token.ids)))
    floats = [(model.top, token.top), *zip(model.lse, token.lse, strict=True)]
    floats += [] if token.gold is None else [(model.gold, token.gold)]
    out += [(symbols, PRECISION, UNIT, struct.unpack("<I", w.f32(value))[0]) for symbols, value in floats]
    ranks = {i: rank for rank, i in enumerate(model.listed)}
    ids = [(model.ids[token.row_class], ID_PRECISION, 1, ranks.get(i, len(ranks) + i)) for i in token.ids]
    out += ids[:1]
    for (number_of, delta), one in zip(_delta_alphabets(token), ids[1:], strict=True):
        out += [(model.deltas[number_of], PRECISION, 1, delta), one]
    return out


def compact_block(
    tokens: Sequence[Token],
    model: Model,
    *,
    ragged: bool,
    choose: Choice = lambda codes: codes[0],
    last_states: Sequence[int] = (2**32,) * 4,
    change: Callable[[list[tuple[int, list[int]]]], None] = lambda lanes: None,
    extra: bytes = b"",
) -> bytes:
    """A block of codec 2; ``change`` is given the (first state, words) of the lanes, ``extra`` is put after them."""
    lanes = []
    for number_of, last in enumerate(last_states):
        lane = _Lane(last)
        for token in reversed(tokens[number_of::4]):
            for symbols, precision, unit, value in reversed(_values(token, model, ragged=ragged)):
                chosen = choose(_codes(symbols, value, unit))
                lane.raw(symbols[chosen].raw, value - symbols[chosen].base * unit)
                lane.symbol(symbols, chosen, precision)
        lanes.append((lane.state, lane.words))
    change(lanes)
    out = b"".join(w.u32(len(words)) for _, words in lanes)
    out += b"".join(w.u64(state) + b"".join(map(w.u32, words)) for state, words in lanes)
    return w.padded(out + extra)


def copies(payload: bytes, **both: w.Patch) -> list[w.SampleFrame | w.ModelFrame]:
    """The two frames of a model; ``patch`` and ``damage`` are those of both."""
    return [w.ModelFrame(payload, copy, **both) for copy in (0, 1)]


def in_place(first: int, frames: Sequence[w.SampleFrame | w.ModelFrame]) -> list[w.SampleFrame | w.ModelFrame]:
    """Frames that begin at byte ``first``, where a compact frame's ``model`` has been the number of a first copy."""
    offsets: list[int] = []
    out: list[w.SampleFrame | w.ModelFrame] = []
    for frame in frames:
        if isinstance(frame, w.ModelFrame) and frame.copy == 0:
            offsets.append(first)
        named = isinstance(frame, w.SampleFrame) and frame.codec == COMPACT
        out.append(replace(frame, model=offsets[frame.model]) if named else frame)
        first += len(frame.pack(first, 0))
    return out
