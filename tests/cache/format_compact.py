"""Blocks of codec 2 (csrc/cache/FORMAT.md, 6.2): range asymmetric numeral systems in four lanes."""

from __future__ import annotations

import math
import struct

import numpy as np
from format_blocks import Block, Token
from format_model import Alphabet, Model
from format_parts import GOLD, RAGGED, Part

LANES = 4
LEAST = 2**32  # state of a lane
_PLACES = (1, 2, 4, 8, 12, 16, 24, 32, 64)  # the last i of each place of delta_i but that of the last


def place(i: int) -> int:
    """Of delta_i, i >= 1."""
    return sum(i > last for last in _PLACES)


def history(delta: int) -> int:
    """Of the delta before; 0 where there is none."""
    return 3 if delta > 3 else 2 if delta > 1 else delta


class Lane:
    """A lane of a block, read from its first state on."""

    def __init__(self, part: Part, state: int, words: tuple[int, ...]):
        self.part, self.state, self.words, self.used = part, state, words, 0
        part.check(state >= LEAST, "first state of a lane below 2^32")

    def _refill(self) -> None:
        if self.state < LEAST:
            self.part.check(self.used < len(self.words), "a lane ends before its tokens do")
            self.state = self.state << 32 | self.words[self.used]
            self.used += 1

    def raw(self, bits: int) -> int:
        value = self.state & (1 << bits) - 1
        self.state >>= bits
        self._refill()
        return value

    def value(self, alphabet: Alphabet, unit: int = 1) -> int:
        slot = self.state & (1 << alphabet.precision) - 1
        symbol = alphabet.at(slot)
        self.state = symbol.frequency * (self.state >> alphabet.precision) + slot - symbol.start
        self._refill()
        return symbol.base * unit + self.raw(symbol.raw)

    def float(self, alphabet: Alphabet) -> np.float32:
        return np.float32(np.frombuffer(struct.pack("<I", self.value(alphabet, 2**20)), "<f4")[0])

    def end(self) -> None:
        self.part.check(self.state == LEAST, "last state of a lane")
        self.part.check(self.used == len(self.words), "a lane has words left")


def _token(block: Block, model: Model, lane: Lane, columns: dict[str, list[np.float32]]) -> Token:
    check, flags, kept = block.part.check, block.frame.flags, block.frame.kept
    alphabet = model.ids[lane.value(model.classes)]
    k = lane.value(model.kept) if flags & RAGGED else kept
    check(k <= kept, "k_eff is above the frame's kept")
    top = lane.float(model.top)
    check(math.isfinite(top) and top <= 0, "top is not a log-probability")
    check(k > 0 or top.tobytes() == bytes(4), "top of a token without entries")
    for t, its in zip(block.header.other_temperatures, model.lse, strict=True):
        lse = lane.float(its)
        check(math.isfinite(lse), "lse is not finite")
        columns[f"lse {t!r}"].append(lse)
    if flags & GOLD:
        gold = lane.float(model.gold)
        check(bool(gold <= 0), "gold is not a log-probability")
        columns["gold"].append(gold)
    ids: list[int] = []
    steps: list[int] = []
    delta = total = 0
    for i in range(k):
        if i > 0:
            delta = lane.value(model.deltas[4 * place(i) + history(delta)])
            total += delta
            check(total < 2**24, "steps of 2^24 or more")
        number = lane.value(alphabet)
        listed = number < len(model.listed)
        ids.append(model.listed[number] if listed else number - len(model.listed))
        check(ids[-1] < block.header.vocab_size, "an id beyond the vocabulary")
        steps.append(total)
    below = np.array(steps, np.float32) * np.float32(2.0**-block.frame.grid)
    return Token(np.array(ids, np.int64), top - below)


def decode_compact(block: Block, model: Model, wanted: int | None = None) -> None:
    """All tokens of a block, or as many as are ``wanted`` from its beginning on."""
    counts = struct.unpack("<4I", block.take(4 * LANES))
    lanes = []
    for count in counts:
        (state,) = struct.unpack("<Q", block.take(8))
        lanes.append(Lane(block.part, state, struct.unpack(f"<{count}I", block.take(4 * count))))
    columns: dict[str, list[np.float32]] = {f"lse {t!r}": [] for t in block.header.other_temperatures}
    if block.frame.flags & GOLD:
        columns["gold"] = []
    for j in range(block.n if wanted is None else wanted):
        block.tokens.append(_token(block, model, lanes[j % LANES], columns))
    if wanted is None:
        for lane in lanes:
            lane.end()
    block.columns = {name: np.array(values, np.float32) for name, values in columns.items()}
    block.prove()
