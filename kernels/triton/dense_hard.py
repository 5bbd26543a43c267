"""The gradient of cross-entropy and z-loss, a tile or a handful of columns at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton.dense_rows import INF, LOG2E, TAU_OTHER, TAU_TWO


@triton.jit
def of_softmax(z, p, c_one, one_at, one_log2, one_from_p, TAU: tl.constexpr, TRUNCATED: tl.constexpr):
    """c_one softmax(z); from p where that is possible, and c_one is in one_from_p then."""
    if TRUNCATED or TAU == TAU_OTHER:
        return c_one * tl.exp2((z - one_at) * LOG2E - one_log2)
    elif TAU == TAU_TWO:
        return p * (p * one_from_p)
    else:
        return p * one_from_p


@triton.jit
def less_target(g, z, offsets, label, c_hard, smoothed, present, SMOOTH: tl.constexpr):
    """Takes the hard target away: the label's column, and its smoothed share of every column that is there."""
    if SMOOTH:
        g -= tl.where(z > -INF, smoothed / present, 0.0)
    return g - tl.where(offsets == label, c_hard - smoothed, 0.0)
