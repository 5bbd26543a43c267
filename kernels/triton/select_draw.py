"""Draws from rows of logits on a GPU: multinomial counts and threshold sampling, after the scan of ``select``.

The scan left the sum of weights of each chunk of columns. A point of the distribution function is looked for among
their running sums, in fp64, and then within its chunk, which is read again::

    certain  pps: the k largest columns, as topk finds them, and how many of these are there for certain; what their
             chunks weigh without them
    prefix   running sums of chunks
    locate   the column of each point
    order    sorts the columns of a row
    write    one entry for each column that was met

With m columns there for certain and R the weight of all others, l = (k - m) / R, and m is the first number whose next
column has l w < 1. Weights that are left over are summed without those columns, not by difference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton.dense_rows import INF, load, or_zero, row_of
from kdfast.kernels.triton.select import chunk_group, normalise, sorted_keys
from kdfast.kernels.triton.select_rows import (
    ANY_NUMBER,
    COUNTS,
    LN2,
    NOTHING,
    STATE,
    column_of,
    logit_of,
    ordered,
    packed,
    power_of_two,
    reference,
    weight,
)


@triton.jit
def uniform(seed, token, draw):
    """Uniforms in [0, 1) with 53 bits, fp64: Philox4x32-10, as ``kdfast.spec.selection.uniforms`` has them."""
    none = tl.zeros(draw.shape, tl.int32)
    low, high = (token & 0xFFFFFFFF).to(tl.uint32) + none.to(tl.uint32), (token >> 32).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, draw, low, high + none.to(tl.uint32), none)
    return ((a.to(tl.int64) << 21) + (b >> 11).to(tl.int64)).to(tl.float64) * (2.0**-53)


@triton.jit
def _chunk_weights(maxima, chunk_sums, at, there, top, c):
    """Weights of chunks under the row's reference, fp64, and their maxima."""
    chunk_top = tl.load(maxima + at, mask=there, other=-INF).to(tl.float32)
    r, _ = reference(chunk_top, c)
    r_top, _ = reference(top, c)
    s = tl.load(chunk_sums + at, mask=there, other=0.0).to(tl.float64)
    return tl.where(chunk_top == -INF, 0.0, s * power_of_two(r - r_top)), chunk_top


@triton.jit
def _group_weights(row, reached, maxima, first, n, columns, c, limit, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """(chunk numbers, whether there, their maxima, sums of weights of the columns below a key)."""
    chunk, there, offsets, x = chunk_group(row, reached, first, n, columns, GROUP, CHUNK)
    chunk_top = tl.load(maxima + chunk, mask=there, other=-INF).to(tl.float32)
    _, f = reference(chunk_top, c)
    w = tl.where(packed(ordered(x), offsets) < limit, weight(x, chunk_top[:, None], c, f[:, None]), 0.0)
    return chunk, there, chunk_top, tl.sum(w, 1)


@triton.jit
def certain_kernel(
    logits,
    maxima,
    chunk_sums,  # of the chunks that were reached replaced by those without the certain columns
    scales,
    state,
    floors,
    reached,
    counts,  # counts[1], the keys gathered, becomes the number of certain columns
    keys,
    limits,  # (rows) int64: the key of the last certain column
    drawn,  # (rows, most) int32: begins with the certain columns
    columns,
    chunks,
    most,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Which columns threshold sampling takes for certain; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    row = row_of(logits, i)
    reached += i * chunks
    c = scales[0]
    top = tl.load(state + i * STATE).to(tl.float32)
    r_top, f_top = reference(top, c)
    j = tl.arange(0, ROOM)
    key = sorted_keys(keys, counts, i, ROOM)
    of_most = (key > 0) & (j < most)
    limit = tl.min(tl.where(of_most, key, NOTHING), 0)
    w = tl.where(of_most, weight(logit_of(key), top, c, f_top), 0.0).to(tl.float64)

    chunk = tl.arange(0, CHUNKS)
    weights, chunk_top = _chunk_weights(maxima, chunk_sums, i * chunks + chunk, chunk < chunks, top, c)
    others = tl.sum(tl.where(ordered(chunk_top) < tl.load(floors + i).to(tl.uint32), weights, 0.0), 0)
    n = tl.load(counts + i * COUNTS)
    maxima += i * chunks
    for first in range(0, n, GROUP):
        _, there, group_top, s = _group_weights(row, reached, maxima, first, n, columns, c, limit, GROUP, CHUNK)
        r, _ = reference(group_top, c)
        others += tl.sum(tl.where(there, s.to(tl.float64) * power_of_two(r - r_top), 0.0), 0)

    rest = others + tl.cumsum(w, 0, reverse=True)
    meets = (w > 0.0) & (w * (most - j).to(tl.float64) >= rest)
    m = tl.minimum(tl.min(tl.where(meets, ROOM, j), 0), most)
    limit = tl.min(tl.where(j < m, key, NOTHING), 0)
    for first in range(0, n, GROUP):
        again, there, _, s = _group_weights(row, reached, maxima, first, n, columns, c, limit, GROUP, CHUNK)
        tl.store(chunk_sums + i * chunks + again, s, mask=there)
    tl.store(drawn + i * most + j, column_of(key), mask=j < m)
    tl.store(limits + i, limit)
    tl.store(counts + i * COUNTS + 1, m)


@triton.jit
def prefix_kernel(
    maxima,
    tops,
    sums,
    chunk_sums,
    scales,
    lse,
    state,
    counts,
    prefix,  # (rows, chunks) fp64
    chunks,
    tiles,
    CHUNKS: tl.constexpr,
    SYSTEMATIC: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_OF: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Running sums of the weights of chunks, and log-normalisers where nobody has written them; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    c = scales[0]
    if not SYSTEMATIC:
        normalise(tops, sums, scales, lse, state, i, tiles, TILES, SLOTS, SLOT_OF, EXPONENTIAL, FACTOR)
    tile = tl.arange(0, TILES)
    top = or_zero(tl.max(tl.load(tops + i * tiles + tile, mask=tile < tiles, other=-INF), 0))
    chunk = tl.arange(0, CHUNKS)
    weights, _ = _chunk_weights(maxima, chunk_sums, i * chunks + chunk, chunk < chunks, top, c)
    tl.store(prefix + i * chunks + chunk, tl.cumsum(weights, 0), mask=chunk < chunks)
    tl.store(counts + i * COUNTS + 2, tl.max(tl.where(weights > 0.0, chunk, 0), 0))


@triton.jit
def locate_kernel(
    logits,
    maxima,
    scales,
    state,
    counts,
    prefix,
    limits,
    drawn,  # (rows, most) int32: columns, ANY_NUMBER where there is none
    columns,
    chunks,
    most,
    seed,
    first_token,
    POINTS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    SYSTEMATIC: tl.constexpr,
):
    """The column of each point; grid (rows, blocks of points)."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    c = scales[0]
    prefix += i * chunks
    last = tl.load(counts + i * COUNTS + 2)
    total = tl.load(prefix + last)
    before = tl.full([], 0, tl.int32)
    if SYSTEMATIC:
        before = tl.load(counts + i * COUNTS + 1)
        step = total / tl.maximum(most - before, 1).to(tl.float64)
        point = (uniform(seed, first_token + i, tl.zeros([POINTS], tl.int32)) + j.to(tl.float64)) * step
        tl.store(state + i * STATE + 3, step)
    else:
        point = uniform(seed, first_token + i, j) * total

    low, high = tl.zeros([POINTS], tl.int32), tl.zeros([POINTS], tl.int32) + last
    for _ in range(STEPS):
        middle = (low + high) // 2
        past = tl.load(prefix + middle) > point
        low = tl.where(past | (low >= high), low, middle + 1)
        high = tl.where(past, middle, high)
    chunk = tl.minimum(low, last)
    point -= tl.load(prefix + chunk - 1, mask=chunk > 0, other=0.0)

    top = tl.load(state + i * STATE).to(tl.float32)
    chunk_top = tl.load(maxima + i * chunks + chunk).to(tl.float32)
    r, f = reference(chunk_top, c)
    r_top, _ = reference(top, c)
    number = tl.arange(0, CHUNK)
    offsets = chunk[:, None] * CHUNK + number[None, :]
    x = load(row_of(logits, i), offsets, offsets < columns)
    w = weight(x, chunk_top[:, None], c, f[:, None])
    if SYSTEMATIC:
        w = tl.where(packed(ordered(x), offsets) < tl.load(limits + i), w, 0.0)
    passed = tl.cumsum(w, 1).to(tl.float64) * power_of_two(r - r_top)[:, None] <= point[:, None]
    # what rounding leaves over, at the end of a chunk, falls to the last column there that has weight
    heavy = tl.max(tl.where(w > 0.0, number[None, :], 0), 1)
    column = chunk * CHUNK + tl.minimum(tl.sum(passed.to(tl.int32), 1), heavy)
    tl.store(drawn + i * most + before + j, tl.where(total > 0.0, column, ANY_NUMBER), mask=before + j < most)


@triton.jit
def order_kernel(drawn, most, ROOM: tl.constexpr):
    """Sorts the columns of a row; grid (rows,)."""
    at = drawn + tl.program_id(0).to(tl.int64) * most + tl.arange(0, ROOM)
    there = tl.arange(0, ROOM) < most
    tl.store(at, tl.sort(tl.load(at, mask=there, other=ANY_NUMBER)), mask=there)


@triton.jit
def write_kernel(
    logits,
    drawn,
    state,
    limits,
    scales,
    ids,  # (rows, most) int32
    logprobs,  # (rows, most) fp32
    mass,  # (rows, most) fp32
    k_eff,  # (rows) int32
    neg_entropy,  # (rows) fp32
    columns,
    most,
    ROOM: tl.constexpr,
    STEPS: tl.constexpr,
    SYSTEMATIC: tl.constexpr,
):
    """An entry for each column that was met, with its share of the draws or its mass by threshold; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, ROOM)
    drawn += i * most
    top, log_one = tl.load(state + i * STATE), tl.load(state + i * STATE + 1)
    log_sum = tl.load(state + i * STATE + 2)
    good = tl.abs(log_one) < INF  # nothing was met otherwise
    column = tl.where(good, tl.load(drawn + j, mask=j < most, other=ANY_NUMBER), ANY_NUMBER)
    previous = tl.load(drawn + j - 1, mask=(j > 0) & (j < most), other=-1)
    entry = (column != previous) & (column < columns)

    x = tl.load(row_of(logits, i) + column, mask=entry, other=0.0).to(tl.float32)
    c = scales[0]
    log_q = (x.to(tl.float64) - top) * (c.to(tl.float64) * LN2) - log_sum
    if SYSTEMATIC:
        _, f_top = reference(top.to(tl.float32), c)
        step = tl.load(state + i * STATE + 3) * tl.exp2(-f_top.to(tl.float64) - log_sum * (1.0 / LN2))
        certain = packed(ordered(x), column) >= tl.load(limits + i)
        share = tl.where(certain, tl.exp2((log_q * (1.0 / LN2)).to(tl.float32)), step.to(tl.float32))
    else:
        # the draws of a column lie side by side: up to the first that is larger
        low, high = j, tl.zeros([ROOM], tl.int32) + most
        for _ in range(STEPS):
            middle = (low + high) // 2
            past = tl.load(drawn + middle, mask=middle < most, other=ANY_NUMBER) > column
            low = tl.where(past | (low >= high), low, middle + 1)
            high = tl.where(past, middle, high)
        share = (low - j).to(tl.float32) / most  # which has no methods where it is 1, a constant then
    entry = entry & (share > 0)  # a mass below fp32's least is none
    place = tl.cumsum(entry.to(tl.int32), 0) - 1
    n = tl.sum(entry.to(tl.int32), 0)
    nan = float("nan")
    entropy = tl.sum(tl.where(entry, share.to(tl.float64) * log_q, 0.0), 0)
    tl.store(neg_entropy + i, tl.where(good, entropy, nan).to(tl.float32))
    tl.store(ids + i * most + place, column, mask=entry)
    tl.store(logprobs + i * most + place, (x.to(tl.float64) - top - log_one).to(tl.float32), mask=entry)
    tl.store(mass + i * most + place, share, mask=entry)
    # after the last entry; a row without a distribution has columns 0, 1, ... and no numbers
    there = tl.where(good, n, tl.minimum(columns, most))
    tl.store(k_eff + i, there)
    rest = (j >= n) & (j < most)
    tl.store(ids + i * most + j, tl.where(j < there, j, -1), mask=rest)
    tl.store(logprobs + i * most + j, tl.where(good, -INF, nan), mask=rest)
    tl.store(mass + i * most + j, tl.where(good, 0.0, nan), mask=rest)
