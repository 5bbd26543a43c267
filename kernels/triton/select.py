"""The k largest columns and the log-normalisers of rows of logits on a GPU, in one read of them.

Four kernels, each with a program or more for a row::

    scan    reads the row by tiles: maxima of chunks of columns, and sums of 2^(x c) for each temperature
    floor   the logsumexps; a floor, the k-th largest of the chunk maxima; and the chunks that reach it
    gather  reads those chunks again, about k of them: the columns that reach the floor, a few more than k
    keep    sorts these, and keeps k, or as many as it takes to reach a mass

The k-th largest maximum of disjoint sets of columns is no larger than the k-th largest column, so that none of the k
largest is below the floor. Where more columns reach it than there is room for (many are equal, or lie in few chunks)
`gather` searches for the k-th largest itself, by bisection over the chunks that it holds.

Each tile is summed without one column that has its maximum, which has a weight of its own, so that the row's sum beside
its maximum is at hand: what a sure teacher leaves to the others would not survive a difference.

Bytes of a column: its own size; twice that over the columns of a chunk, for the maximum that is written and read; and
its own size again in about k chunks. No sum depends on how many rows or processors there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton.dense_rows import INF, load, or_zero, row_of
from kdfast.kernels.triton.select_rows import (
    ANY_NUMBER,
    COUNTS,
    LN2,
    PRESENT,
    STATE,
    column_of,
    log1p,
    logit_of,
    ordered,
    packed,
    power_of_two,
    reference,
    weight,
)


@triton.jit
def scan_kernel(
    logits,
    maxima,  # (rows, chunks) like logits
    tops,  # (rows, tiles) fp32
    sums,  # (rows, tiles, slots) fp32, without one column that has the tile's maximum, relative to its references
    chunk_sums,  # (rows, chunks) fp32 of the first exponential, relative to the chunk's reference; or None
    scales,  # (exponentials) c
    columns,
    chunks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOT: tl.constexpr,  # (exponentials) slot of its sum
    SQUARED: tl.constexpr,  # (exponentials) whether the next slot is for the sum of the squares
    SLOTS: tl.constexpr,
):
    """One tile of a row; grid (rows, tiles)."""
    i, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_tile: tl.constexpr = BLOCK // CHUNK
    chunk = tile * of_tile + tl.arange(0, of_tile)
    offsets = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = load(row_of(logits, i), offsets, offsets < columns)
    chunk_top = tl.max(x, 1)
    top = tl.max(chunk_top, 0)
    at = i * chunks + chunk
    there = chunk < chunks
    tl.store(maxima + at, chunk_top.to(maxima.dtype.element_ty), mask=there)
    index = i * tl.num_programs(1) + tile
    tl.store(tops + index, top)
    is_top = x == top
    tied = tl.sum(is_top.to(tl.int32), 1)
    ties = tl.sum(tied, 0) - 1
    x = tl.where(is_top, -INF, x)
    for e in tl.static_range(len(SLOT)):
        c = scales[e]
        r, f = reference(chunk_top, c)
        w = weight(x, chunk_top[:, None], c, f[:, None])
        s = tl.sum(w, 1)
        if chunk_sums is not None and e == 0:
            tl.store(chunk_sums + at, s + tl.where(chunk_top == -INF, 0.0, tied * tl.exp2(f)), mask=there)
        r_tile, f_tile = reference(top, c)
        shrink = tl.where(chunk_top == -INF, 0.0, tl.exp2(r - r_tile))
        largest = tl.where(top == -INF, 0.0, tl.exp2(f_tile))
        tl.store(sums + index * SLOTS + SLOT[e], tl.sum(s * shrink, 0) + ties * largest)
        if SQUARED[e]:
            squares = tl.sum(tl.sum(w * w, 1) * (shrink * shrink), 0)
            tl.store(sums + index * SLOTS + SLOT[e] + 1, squares + ties * (largest * largest))


@triton.jit
def _log_sum(tops, sums, index, there, top, first, c, FACTOR: tl.constexpr):
    """Natural logarithm of sum 2^((x - top) FACTOR c), fp64, of which `top` has 1, in tile number `first`.

    As log1p of the sum of the others: all digits of what a sure teacher leaves to them.
    """
    r, f = reference(tops, c)
    r_top, f_top = reference(top, c)
    s = tl.load(sums + index, mask=there, other=0.0).to(tl.float64)
    tile = tl.arange(0, tops.shape[0])
    s += tl.where(tile == first, 0.0, tl.exp2(f.to(tl.float64) * FACTOR))
    shrink = tl.where(tops == -INF, 0.0, power_of_two((r - r_top) * FACTOR))
    return log1p(tl.sum(s * shrink, 0) * tl.exp2(-f_top.to(tl.float64) * FACTOR))


@triton.jit
def normalise(
    tops,
    sums,
    scales,
    lse,  # (temperatures, rows) fp32
    state,  # (rows, STATE) fp64
    i,
    tiles,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_OF: tl.constexpr,  # (temperatures and 1) slot of each
    EXPONENTIAL: tl.constexpr,  # (temperatures and 1) exponential of each
    FACTOR: tl.constexpr,  # (temperatures and 1) 1, or 2 for squares
):
    """The row's logsumexps, and its state; NaN where it has no distribution: nothing but -inf, or +inf or NaN."""
    t = tl.arange(0, TILES)
    there = t < tiles
    tile_tops = tl.load(tops + i * tiles + t, mask=there, other=-INF)
    top = tl.max(tile_tops, 0)
    first = tl.min(tl.where(tile_tops == top, t, TILES), 0)
    # neither nothing nor +inf; a NaN is in the sums
    has_top = (top > -INF) & (top < INF)
    top = or_zero(top)
    at = (i * tiles + t) * SLOTS
    n_one: tl.constexpr = len(SLOT_OF) - 1
    c = scales[EXPONENTIAL[n_one]]
    log_one = _log_sum(tile_tops, sums, at + SLOT_OF[n_one], there, top, first, c, FACTOR[n_one])
    good = has_top & (tl.abs(log_one) < INF)
    for n in tl.static_range(n_one):
        c = scales[EXPONENTIAL[n]]
        log_sum = _log_sum(tile_tops, sums, at + SLOT_OF[n], there, top, first, c, FACTOR[n])
        # 1 / T as the weights have it, rounded with c
        relative = log_sum - log_one * (c.to(tl.float64) * LN2 * FACTOR[n])
        tl.store(lse + n * tl.num_programs(0).to(tl.int64) + i, tl.where(good, relative, float("nan")).to(tl.float32))
        if n == 0:
            tl.store(state + i * STATE + 2, log_sum)
    tl.store(state + i * STATE, top.to(tl.float64))
    tl.store(state + i * STATE + 1, tl.where(good, log_one, float("nan")))


@triton.jit
def floor_kernel(
    maxima,
    tops,
    sums,
    scales,
    lse,
    state,
    floors,  # (rows) int64
    reached,  # (rows, chunks) int16: the first counts[0] are the chunks with a column that reaches the floor, ascending
    counts,  # (rows, COUNTS) int32
    chunks,
    tiles,
    k,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOT_OF: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    FACTOR: tl.constexpr,
    BITS: tl.constexpr,  # of the order that tell maxima apart, or as many as are worth a reduction each
):
    """Log-normalisers, the floor and the chunks that reach it; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    normalise(tops, sums, scales, lse, state, i, tiles, TILES, SLOTS, SLOT_OF, EXPONENTIAL, FACTOR)
    c = tl.arange(0, CHUNKS)
    top = tl.load(maxima + i * chunks + c, mask=c < chunks, other=-INF).to(tl.float32)
    order = ordered(top)
    floor, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << 31, tl.uint32)
    for _ in range(BITS):
        floor = tl.where(tl.sum((order >= (floor | bit)).to(tl.int32), 0) >= k, floor | bit, floor)
        bit = bit >> 1
    floor = tl.maximum(floor, tl.full([], PRESENT, tl.uint32))
    reaches = (order >= floor) & (c < chunks)
    place = tl.cumsum(reaches.to(tl.int32), 0) - 1
    tl.store(reached + i * chunks + place, c.to(tl.int16), mask=reaches)
    tl.store(counts + i * COUNTS, tl.sum(reaches.to(tl.int32), 0))
    tl.store(floors + i, floor.to(tl.int64))


# --- The columns that reach the floor ---------------------------------------------------------------------------------


@triton.jit
def chunk_group(row, reached, first, n, columns, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks number first to first + GROUP of those reached: (chunk numbers, whether there, columns, logits)."""
    g = first + tl.arange(0, GROUP)
    chunk = tl.load(reached + g, mask=g < n, other=0).to(tl.int32)
    offsets = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = (g < n)[:, None] & (offsets < columns)
    return chunk, g < n, offsets, load(row, offsets, mask)


@triton.jit
def _places(taken, CHUNK: tl.constexpr):
    """The number of each column among those taken, by chunk and then by column; and how many there are."""
    ones = taken.to(tl.int32)
    of_chunk = tl.sum(ones, 1)
    before = tl.cumsum(of_chunk, 0) - of_chunk
    return before[:, None] + tl.cumsum(ones, 1) - ones, tl.sum(of_chunk, 0)


@triton.jit
def _gather(
    row, reached, n, columns, floor, equals, keys, GROUP: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes keys of the columns that reach the floor, with EXACT no more than `equals` at it; returns how many."""
    count, seen = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, n, GROUP):
        _, _, offsets, x = chunk_group(row, reached, first, n, columns, GROUP, CHUNK)
        order = ordered(x)
        taken = order >= floor
        if EXACT:
            number, more = _places(order == floor, CHUNK)
            taken = taken & ((order > floor) | (seen + number < equals))
            seen += more
        place, more = _places(taken, CHUNK)
        place += count
        tl.store(keys + place, packed(order, offsets), mask=taken & (place < ROOM))
        count += more
    return count


@triton.jit
def _reach(row, reached, n, columns, floor, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """How many columns reach a floor."""
    count = tl.full([], 0, tl.int32)
    for first in range(0, n, GROUP):
        _, _, _, x = chunk_group(row, reached, first, n, columns, GROUP, CHUNK)
        count += tl.sum(tl.sum((ordered(x) >= floor).to(tl.int32), 1), 0)
    return count


@triton.jit
def gather_kernel(
    logits,
    state,
    floors,
    reached,
    counts,
    keys,  # (rows, ROOM) int64: packed keys of counts[1] columns that hold the k largest, in no order
    columns,
    chunks,
    k,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The columns among which the k largest are; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    row = row_of(logits, i)
    reached += i * chunks
    keys += i * ROOM
    n = tl.load(counts + i * COUNTS)
    low = tl.load(floors + i)
    floor = low.to(tl.uint32)
    count = _gather(row, reached, n, columns, floor, ANY_NUMBER, keys, GROUP, CHUNK, ROOM, False)
    if count > ROOM:
        high = ordered(tl.load(state + i * STATE).to(tl.float32)).to(tl.int64)
        while low < high:
            middle = low + ((high - low + 1) >> 1)
            if _reach(row, reached, n, columns, middle.to(tl.uint32), GROUP, CHUNK) >= k:
                low = middle
            else:
                high = middle - 1
        equals = k - _reach(row, reached, n, columns, (low + 1).to(tl.uint32), GROUP, CHUNK)
        floor = low.to(tl.uint32)
        tl.debug_barrier()  # keys are written over
        count = _gather(row, reached, n, columns, floor, equals, keys, GROUP, CHUNK, ROOM, True)
    tl.store(counts + i * COUNTS + 1, tl.minimum(count, ROOM))


@triton.jit
def sorted_keys(keys, counts, i, ROOM: tl.constexpr):
    """The gathered keys of a row, descending, 0 after the last."""
    j = tl.arange(0, ROOM)
    found = tl.load(counts + i * COUNTS + 1)
    return tl.sort(tl.load(keys + i * ROOM + j, mask=j < found, other=0), descending=True)


@triton.jit
def keep_kernel(
    keys,
    counts,
    state,
    ids,  # (rows, most) int32
    logprobs,  # (rows, most) fp32
    k_eff,  # (rows) int32
    columns,
    most,
    least,
    p,
    ROOM: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Entries of topk, or with BY_MASS of topp, whose mass to reach is p[0] + p[1]; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    key = sorted_keys(keys, counts, i, ROOM)
    j = tl.arange(0, ROOM)
    top, log_one = tl.load(state + i * STATE), tl.load(state + i * STATE + 1)
    logprob = logit_of(key).to(tl.float64) - top - log_one
    kept = (key > 0) & (j < most)
    if BY_MASS:
        q = tl.where(kept, tl.exp2((logprob * (1.0 / LN2)).to(tl.float32)), 0.0).to(tl.float64)
        high = p[0]
        low = p[1]
        kept = kept & ((tl.cumsum(q, 0) - q < high.to(tl.float64) + low.to(tl.float64)) | (j < least))
    n = tl.sum(kept.to(tl.int32), 0)
    good = tl.abs(log_one) < INF
    there = tl.minimum(columns, most)
    n = tl.where(good, n, there)
    column = tl.where(good, column_of(key), j)
    tl.store(ids + i * most + j, tl.where(j < n, column, -1), mask=j < most)
    logprob = tl.where(good, tl.where(j < n, logprob.to(tl.float32), -INF), float("nan"))
    tl.store(logprobs + i * most + j, logprob, mask=j < most)
    tl.store(k_eff + i, n)
