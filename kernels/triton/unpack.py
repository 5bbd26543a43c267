"""Entries of packed targets: bits to ids and steps, in registers.

A token of k entries lies from a word of 32 bits on (``kdfast.PackedTargets``, ``csrc/cache/FORMAT.md``, section 6.1)::

    k ids of `bits` bits | zeros to a byte | k - 1 deltas of 4 bits | zeros to a byte | escapes of deltas that are 15

An escape is a byte e, for a delta of 15 + e, or 255 and the delta itself in four bytes: where one begins depends on all
before it. Nearly all are one byte long, so each is looked for as if all were, and those behind a longer one once more.
Then lp_i = top - (delta_1 + ... + delta_i) 2^-grid, whose product is exact: rounded once, with or without a fused
multiply-add, as the CPU's decoder does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

NOWHERE = tl.constexpr(2**31 - 1)  # an entry beyond all


class Packed(NamedTuple):
    """The bytes of tokens, and what they mean."""

    words: Any  # (size,) int32
    size: int
    bits: int  # of an id
    step: float  # 2^-grid


def packed_of(data: torch.Tensor, vocab_size: int, grid: int) -> Packed:
    """What the kernels know of packed tokens: data (bytes,) uint8, of a teacher of so many columns."""
    words = data.view(torch.int32)
    return Packed(words, words.numel(), max(1, (vocab_size - 1).bit_length()), 2.0**-grid)


@triton.jit
def _field(words, left, bit, width, wanted):
    """`width` bits, up to 32, from a bit on, of a stream of which `left` words are there; 0 where not wanted."""
    word = bit >> 5
    shift = bit & 31
    low = tl.load(words + word, mask=wanted & (word < left), other=0)
    more = wanted & (shift + width > 32) & (word + 1 < left)
    high = tl.load(words + word + 1, mask=more, other=0)
    both = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    mask = (tl.full([], 1, tl.uint64) << width) - 1
    return ((both >> shift.to(tl.uint64)) & mask).to(tl.int32)


@triton.jit
def _token(packed, offset):
    """(the token's first word, how many there are from it on); of a token that lies elsewhere, none."""
    left = tl.where((offset < 0) | (offset > packed.size), 0, packed.size - offset)
    return packed.words + tl.where(left == 0, 0, offset).to(tl.int64), left


@triton.jit
def unpack_ids(packed, offset, k, i):
    """Ids of entries i of a token of k; -1 from k on."""
    words, left = _token(packed, offset)
    there = i < k
    return tl.where(there, _field(words, left, i * packed.bits, packed.bits, there), -1)


@triton.jit
def escapes_begin(packed, k):
    """The bit of a token of k entries at which its escapes begin."""
    return _deltas_begin(packed, k) + k // 2 * 8


@triton.jit
def _deltas_begin(packed, k):
    return (k * packed.bits + 7) // 8 * 8


@triton.jit
def unpack_steps(packed, offset, k, i, at, steps):
    """Steps of entries i, in a row, of a token of k: (of each, of the last, the bit at which further escapes begin).

    at and steps are those two of the entries before; at first escapes_begin and 0.
    """
    words, left = _token(packed, offset)
    there = (i > 0) & (i < k)
    delta = _field(words, left, _deltas_begin(packed, k) + (i - 1) * 4, 4, there)
    escaped = delta == 15
    number = escaped.to(tl.int32)
    where = at + 8 * (tl.cumsum(number, 0) - number)
    escape = _field(words, left, where, 8, escaped)
    delta += escape
    longer = 0
    long = tl.min(tl.where(escaped & (escape == 255), i, NOWHERE), 0)
    while long < NOWHERE:
        itself = i == long
        delta = tl.where(itself, _field(words, left, where + 8, 32, itself), delta)
        behind = escaped & (i > long)
        where += tl.where(behind, 32, 0)
        escape = _field(words, left, where, 8, behind)
        delta = tl.where(behind, 15 + escape, delta)
        longer += 1
        long = tl.min(tl.where(behind & (escape == 255), i, NOWHERE), 0)
    return steps + tl.cumsum(delta, 0), steps + tl.sum(delta, 0), at + 8 * tl.sum(number, 0) + 32 * longer


@triton.jit
def unpack_kernel(packed, offsets, tops, k_eff, ids, logprobs, kept, BLOCK: tl.constexpr):
    """Packed tokens to ids and log-probabilities (tokens, kept), -1 and -inf from k_eff on; grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    offset, top = tl.load(offsets + token), tl.load(tops + token)
    k = tl.full([], kept, tl.int32)
    if k_eff is not None:
        k = tl.load(k_eff + token)
    at, steps = escapes_begin(packed, k), tl.full([], 0, tl.int32)
    for begin in range(0, kept, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        each, steps, at = unpack_steps(packed, offset, k, i, at, steps)
        logprob = tl.where(i < k, top - each.to(tl.float32) * packed.step, -float("inf"))
        tl.store(ids + token * kept + i, unpack_ids(packed, offset, k, i), mask=i < kept)
        tl.store(logprobs + token * kept + i, logprob, mask=i < kept)
