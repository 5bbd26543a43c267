"""What lies in the blocks of codecs 1 and 3 of a soft-target cache (csrc/cache/FORMAT.md, 6.1 and 6.3)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from format_parts import GOLD, METHODS, RAGGED, FrameHeader, Header, Part, align8


@dataclass(frozen=True)
class Token:
    """One token of a block; ``weights`` are log-probabilities (codecs 1 and 2) or masses (codec 3), k_eff of them."""

    ids: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]


class Block:
    """Takes a checked block [6] apart, section by section."""

    def __init__(self, part: Part, frame: FrameHeader, header: Header, n: int):
        self.part, self.frame, self.header, self.n, self.used = part, frame, header, n, 0
        self.tokens: list[Token] = []
        self.columns: dict[str, np.ndarray[Any, Any]] = {}

    def take(self, length: int) -> bytes:
        self.part.check(self.used + length <= len(self.part.data), "a block ends before its sections do")
        self.used += length
        return self.part.data[self.used - length : self.used]

    def floats(self) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.take(4 * self.n), "<f4")

    def gold(self) -> None:
        if self.frame.flags & GOLD:
            self.columns["gold"] = self.floats()
            self.part.check(bool((self.columns["gold"] <= 0).all()), "gold is not a log-probability")

    def k_eff(self, width: str) -> list[int]:
        values = [self.frame.kept] * self.n
        if self.frame.flags & RAGGED:
            values = np.frombuffer(self.take(np.dtype(width).itemsize * self.n), width).tolist()
        self.part.check(max(values) <= self.frame.kept, "k_eff is above the frame's kept")
        return values

    def prove(self) -> None:
        """What the entries of its tokens are to each other."""
        check = self.part.check
        for i, token in enumerate(self.tokens):
            check(len(set(token.ids.tolist())) == len(token.ids), "an id is twice in a token")
            for t in (1.0, *self.header.other_temperatures) if len(token.ids) else ():
                lse = 0.0 if t == 1 else float(self.columns[f"lse {t!r}"][i])
                q = [math.exp(min(700.0, float(x) / t - lse)) for x in token.weights]
                slack = 2.0**-21 * (1 + abs(float(token.weights[0])) / t + abs(lse))
                check(math.fsum(q) <= 1 + 1e-5 + slack, f"a mass above 1 at temperature {t}")

    def end(self) -> None:
        self.part.check(align8(self.used) == len(self.part.data), "a block is longer than its sections")
        self.part.zero(self.used, len(self.part.data), "padding of a block")


def decode_fixed(block: Block) -> None:
    """6.1"""
    check, bits = block.part.check, block.header.id_bits
    top = block.floats()
    for t in block.header.other_temperatures:
        lse = block.columns[f"lse {t!r}"] = block.floats()
        check(bool(np.isfinite(lse).all()), "lse is not finite")
    block.gold()
    k_eff = block.k_eff("<u2")
    ids = []
    for k in k_eff:
        stream = np.unpackbits(np.frombuffer(block.take(-(-k * bits // 8)), np.uint8), bitorder="little")
        check(not stream[k * bits :].any(), "bits after the last id")
        ids.append(stream[: k * bits].reshape(k, bits) @ (1 << np.arange(bits)))
        check(not (ids[-1] >= block.header.vocab_size).any(), "an id beyond the vocabulary")
    nibbles = [block.take(max(0, k) // 2) for k in k_eff]
    for i, k in enumerate(k_eff):
        check(bool(np.isfinite(top[i])) and top[i] <= 0, "top is not a log-probability")
        check(k > 0 or top[i].tobytes() == bytes(4), "top of a token without entries")
        steps, total = [0] * min(k, 1), 0
        for j in range(k - 1):
            delta = nibbles[i][j // 2] >> 4 * (j % 2) & 15
            if delta == 15:
                (escape,) = block.take(1)
                delta = 15 + escape
                if escape == 255:
                    (delta,) = struct.unpack("<I", block.take(4))
                    check(delta >= 270, "a long escape for a short delta")
            total += delta
            check(total < 2**24, "steps of 2^24 or more")
            steps.append(total)
        check(k == 0 or k % 2 == 1 or nibbles[i][-1] >> 4 == 0, "a nibble after the last delta")
        below = np.array(steps, np.float32) * np.float32(2.0**-block.frame.grid)
        block.tokens.append(Token(ids[i], top[i] - below))
    block.prove()


def decode_drawn(block: Block) -> None:
    """6.3"""
    check, frame = block.part.check, block.frame
    pps = METHODS[frame.method] == "pps"
    entropy = block.columns["neg_entropy"] = block.floats()
    check(bool((np.isfinite(entropy) & (entropy <= 0)).all()), "neg_entropy")
    if pps:
        block.columns["step"] = block.floats()
    block.gold()
    k_eff = block.k_eff("u1" if frame.kept <= 255 else "<u2")
    r, s = block.take(2)
    check(r <= 23 and s <= 23, "parameter of a code")
    start = block.used
    stream = np.unpackbits(np.frombuffer(block.part.data[start:], np.uint8), bitorder="little").tobytes()
    at = 0

    def number(width: int) -> int:
        nonlocal at
        at += width
        check(at <= len(stream), "the stream ends inside a code")
        return sum(bit << i for i, bit in enumerate(stream[at - width : at]))

    def golomb(order: int) -> int:
        nonlocal at
        one = stream.find(1, at)
        check(one >= 0, "the stream ends inside a code")
        b, at = one - at, one + 1
        check(b <= 24, "a number of more than 24 bits")
        return (1 << b | number(b)) - 1 << order | number(order)

    for i, k in enumerate(k_eff):
        ids, masses, last, draws = [], [], -1, 0
        for _ in range(k):
            last += 1 + golomb(r)
            check(last < block.header.vocab_size, "an id beyond the vocabulary")
            ids.append(last)
            v = 1 + golomb(s) if number(1) else 0
            check(v < 2**24, "a value of 2^24 or more")
            if pps:
                check(v * 2.0**-frame.grid <= 104, "a value of more than 104 nats")
                step = float(block.columns["step"][i])
                masses.append(step * math.exp(v * 2.0**-frame.grid) if v else step)
            else:
                draws += v + 1
                check(draws <= frame.parameter, "more draws than there were")
                masses.append((v + 1) / frame.parameter)
        if pps:
            step = block.columns["step"][i]
            check(bool(np.isfinite(step)) and (step > 0 if k else step.tobytes() == bytes(4)), "step")
        with np.errstate(over="ignore"):
            rounded = np.array(masses, np.float64).astype(np.float32)
        check(bool(np.isfinite(rounded).all()), "a mass is not finite")
        block.tokens.append(Token(np.array(ids, np.int64), rounded))
    block.used = start + -(-at // 8)
    check(not any(stream[at : 8 * -(-at // 8)]), "bits after the last code")
