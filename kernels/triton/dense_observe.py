"""What metrics are made of: the column of a row's largest logit, and the entropy of its softmax.

Pass 1 knows the largest logit and the tile that had it first; that tile is read once more for the column. With e the
exponentials under the maximum and u their exponents, the entropy in bits is log2 sum e - sum e u / sum e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton.dense_rows import INF, logits, or_zero, row_of, teacher_tile
from kdfast.kernels.triton.divergences import LN2

# Floats of a split that observes, behind its sums: the first tile of the student's largest logit, the sum of e u; the
# tile among the columns beyond the taught ones; the teacher's tile and sum.
OBSERVED_SUMS = tl.constexpr(5)
# Numbers of a row, see kdfast.spec.reduction.Observed; what stands there for the teacher of a row without one.
OBSERVED = tl.constexpr(5)
NO_TOP = tl.constexpr(-1.0)
NO_TOP_OF_TEACHER = tl.constexpr(-2.0)


@triton.jit
def no_tile():
    """The number of a tile, for a variable that a loop changes."""
    return tl.full([], 0, tl.int32)


@triton.jit
def first_tile(tile, j, top, before):
    """The tile of the largest so far, once tile j has brought that from `before` to `top`."""
    return tl.where(top > before, j, tile)


@triton.jit
def add_spread(spread, total, e, u, moved, shrink):
    """Sum of e u by lane under a new maximum: `total` is the sum of e before, `moved` the change of its exponents."""
    return (spread + total * moved) * shrink + tl.where(e == 0.0, 0.0, e * u)


@triton.jit
def entropy(total, spread):
    """Nats; its rounding may have left it below 0."""
    nats = (tl.log2(total) - spread / total) * LN2
    return tl.where(nats < 0.0, 0.0, nats)


@triton.jit
def column_of(x, offsets, top, total, none: tl.constexpr):
    """The first offset at which a tile has its row's largest logit, where that is finite."""
    first = tl.min(tl.where(x == top, offsets, 2147483647), 0).to(tl.float64)
    return tl.where((top > -INF) & (total < INF), first, none)


@triton.jit
def finish_observed(
    student,
    teachers,
    given,
    wanted,
    i,
    z_top,
    z_tile,
    at_tau,
    z_spread,
    rest_top,
    rest_tile,
    rest_sum,
    t_top,
    t_tile,
    t_sum,
    t_spread,
    BLOCK: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
    MIX: tl.constexpr,
    TRUNCATED: tl.constexpr,
):
    """Writes what was observed of a row; of several distributions the mixture is for `observe_mixture_kernel`."""
    out = wanted.observed + i * OBSERVED
    row = row_of(student, i)
    offsets = z_tile * BLOCK + tl.arange(0, BLOCK)
    taught = column_of(logits(student, row, offsets, offsets < given.columns), offsets, z_top, at_tau, NO_TOP)
    tl.store(out + 1, taught)
    if TRUNCATED:
        offsets = given.columns + rest_tile * BLOCK + tl.arange(0, BLOCK)
        rest = column_of(logits(student, row, offsets, offsets < given.vocab), offsets, rest_top, rest_sum, NO_TOP)
        whole = tl.where((at_tau < INF) & (rest_sum < INF), tl.where(rest_top > z_top, rest, taught), NO_TOP)
        tl.store(out, whole)
    else:
        tl.store(out, taught)
    tl.store(out + 2, entropy(at_tau, z_spread).to(tl.float64))
    if DISTRIBUTIONS == 1:
        offsets = t_tile * BLOCK + tl.arange(0, BLOCK)
        t = teacher_tile(teachers, given, i, offsets, offsets < given.columns, 0, MIX)
        tl.store(out + 3, column_of(t, offsets, t_top, t_sum, NO_TOP_OF_TEACHER))
        tl.store(out + 4, entropy(t_sum, t_spread).to(tl.float64))
    else:
        tl.store(out + 3, tl.full([], NO_TOP_OF_TEACHER, tl.float64))
        tl.store(out + 4, tl.full([], 0.0, tl.float64))


@triton.jit
def combined_spread(tops, top, totals, spreads, factor):
    """Sums of e u of splits, each under its own maximum, under that of all."""
    apart = (or_zero(tops) - or_zero(top)) * factor
    return tl.sum((spreads + totals * apart) * tl.exp2((tops - or_zero(top)) * factor), 0)


@triton.jit
def combined_tile(tops, top, tiles):
    """The first tile of the largest logit of all splits; any of a row that has none."""
    tile = tl.min(tl.where(tops == top, tiles, INF), 0)
    return tl.where(tile < INF, tile, 0.0).to(tl.int32)
