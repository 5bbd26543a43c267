"""Pass 1 of the dense loss: maxima and sums of exponentials of a row, and what follows from them alone."""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton import divergences
from kdfast.kernels.triton.dense_kept import first_kept, less_kept
from kdfast.kernels.triton.dense_observe import add_spread, first_tile, no_tile
from kdfast.kernels.triton.dense_rows import (
    INF,
    LOG2E,
    NO_LABEL,
    TAU_ONE,
    TAU_OTHER,
    TAU_TWO,
    logits,
    or_zero,
    row_of,
    scalar,
    teacher_tile,
    tiles_of,
)
from kdfast.kernels.triton.divergences import LN2


@triton.jit
def sum_taught(
    student,
    teachers,
    given,
    i,
    split,
    c,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TAU: tl.constexpr,
    MIX: tl.constexpr,
    CROSS: tl.constexpr,
    SMOOTH: tl.constexpr,
    WITH_TEACHER: tl.constexpr,
    TAIL: tl.constexpr,
    OBSERVE: tl.constexpr,
):
    """Sums over the taught columns: (max z, at tau, at 1, cross, sum z - max, present, max t, sum t, observed).

    With OBSERVE that is the first tile of max z and the sum of e u (``dense_observe.py``), and so of t.

    Cross is sum 2^((z - max z) c) ((z - max z) - (t - max t)), the reverse KL before normalisation: of distances to the
    maxima, as what sets z and t apart may be small beside a level that all of a row have. With TAIL, which is the
    padded number of kept columns, it is the sum at tau over the others. Sums are kept by lane, and brought under a
    tile's new maximum as a whole, so that a tile costs one reduction for each maximum.
    """
    row = row_of(student, i)
    z_top, t_top, smooth, present = scalar(float("-inf")), scalar(float("-inf")), scalar(0.0), scalar(0.0)
    at_tau = tl.zeros([BLOCK], tl.float32)
    at_one = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    z_tile, t_tile = no_tile(), no_tile()
    z_spread = tl.zeros([BLOCK], tl.float32)
    t_spread = tl.zeros([BLOCK], tl.float32)
    first, last = tiles_of(given.columns, split, BLOCK, SPLITS)
    if TAIL > 0:
        kept_at, kept, kept_ids = first_kept(given, i, first * BLOCK, TAIL)
    for j in range(first, last):
        offsets = j * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < given.columns
        z = logits(student, row, offsets, mask)
        top = tl.maximum(z_top, tl.max(z, 0))
        at = or_zero(top)
        e = tl.exp2((z - at) * c)
        shrink = tl.exp2((z_top - at) * c)
        before = at_tau
        if OBSERVE:
            z_tile = first_tile(z_tile, j, top, z_top)
            z_spread = add_spread(z_spread, before, e, (z - at) * c, (or_zero(z_top) - at) * c, shrink)
        at_tau = at_tau * shrink + e
        if TAU == TAU_TWO:
            at_one = at_one * (shrink * shrink) + e * e
        if TAU == TAU_OTHER:
            at_one = at_one * tl.exp2((z_top - at) * LOG2E) + tl.exp2((z - at) * LOG2E)
        if TAIL > 0:
            end = (j + 1) * BLOCK
            beside, kept_at, kept = less_kept(e, given, i, offsets, end, kept_at, kept, kept_ids)
            cross = cross * shrink + beside
        if SMOOTH:
            there = z > -INF
            smooth += tl.where(present > 0.0, present * (z_top - at), 0.0) + tl.sum(tl.where(there, z - at, 0.0), 0)
            present += tl.sum(there.to(tl.float32), 0)
        if WITH_TEACHER:
            t = teacher_tile(teachers, given, i, offsets, mask, 0, MIX)
            new = tl.maximum(t_top, tl.max(t, 0))
            t_at = or_zero(new)
            if CROSS:
                moved = (t_at - or_zero(t_top)) - (at - or_zero(z_top))
                cross = (cross + before * moved) * shrink + tl.where(e == 0.0, 0.0, e * ((z - at) - (t - t_at)))
            t_e, t_shrink = tl.exp2((t - t_at) * c), tl.exp2((t_top - t_at) * c)
            if OBSERVE:
                t_tile = first_tile(t_tile, j, new, t_top)
                t_spread = add_spread(t_spread, t_sum, t_e, (t - t_at) * c, (or_zero(t_top) - t_at) * c, t_shrink)
            t_sum = t_sum * t_shrink + t_e
            t_top = new
        z_top = top
    sum_at_tau = tl.sum(at_tau, 0)
    sum_at_one = sum_at_tau
    if TAU != TAU_ONE:
        sum_at_one = tl.sum(at_one, 0)
    return (
        z_top, sum_at_tau, sum_at_one, tl.sum(cross, 0), smooth, present, t_top, tl.sum(t_sum, 0),
        z_tile, tl.sum(z_spread, 0), t_tile, tl.sum(t_spread, 0),
    )  # fmt: skip


@triton.jit
def sum_rest(student, given, i, split, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SMOOTH: tl.constexpr):
    """The student's columns beyond the taught ones: (max z, sum at 1, sum z - max, present, first tile of max z)."""
    row = row_of(student, i) + given.columns
    top, smooth, present, tile = scalar(float("-inf")), scalar(0.0), scalar(0.0), no_tile()
    total = tl.zeros([BLOCK], tl.float32)
    first, last = tiles_of(given.vocab - given.columns, split, BLOCK, SPLITS)
    for j in range(first, last):
        offsets = j * BLOCK + tl.arange(0, BLOCK)
        z = logits(student, row, offsets, offsets < given.vocab - given.columns)
        new = tl.maximum(top, tl.max(z, 0))
        at = or_zero(new)
        total = total * tl.exp2((top - at) * LOG2E) + tl.exp2((z - at) * LOG2E)
        if SMOOTH:
            there = z > -INF
            smooth += tl.where(present > 0.0, present * (top - at), 0.0) + tl.sum(tl.where(there, z - at, 0.0), 0)
            present += tl.sum(there.to(tl.float32), 0)
        tile = first_tile(tile, j, new, top)
        top = new
    return top, tl.sum(total, 0), smooth, present, tile


@triton.jit
def sum_teacher(
    teachers, given, i, split, c, K: tl.constexpr, MIX: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr
):
    """(max t, sum at tau) of distribution K."""
    top = scalar(float("-inf"))
    total = tl.zeros([BLOCK], tl.float32)
    first, last = tiles_of(given.columns, split, BLOCK, SPLITS)
    for j in range(first, last):
        offsets = j * BLOCK + tl.arange(0, BLOCK)
        t = teacher_tile(teachers, given, i, offsets, offsets < given.columns, K, MIX)
        new = tl.maximum(top, tl.max(t, 0))
        at = or_zero(new)
        total = total * tl.exp2((top - at) * c) + tl.exp2((t - at) * c)
        top = new
    return top, tl.sum(total, 0)


@triton.jit
def finish_sums(
    student,
    given,
    wanted,
    stats,
    i,
    c,
    z_top,
    at_tau,
    at_one,
    cross,
    smooth,
    present,
    rest_top,
    rest_sum,
    rest_smooth,
    rest_present,
    t_log2,
    KINDS: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """What a row's sums amount to, written where wanted; returns (max z, log2 at tau, max, log2 at 1, sum student)."""
    z_at, z_log2 = or_zero(z_top), tl.log2(at_tau)
    one_at, one_log2 = z_at, tl.log2(at_one)
    if TRUNCATED:
        one_at = or_zero(tl.maximum(z_top, rest_top))
        one_log2 = tl.log2(at_one * tl.exp2((z_top - one_at) * LOG2E) + rest_sum * tl.exp2((rest_top - one_at) * LOG2E))
        if SMOOTH:
            smooth = tl.where(present > 0.0, smooth + present * (z_at - one_at), 0.0)
            smooth += tl.where(rest_present > 0.0, rest_smooth + rest_present * (or_zero(rest_top) - one_at), 0.0)
            present += rest_present
    # sum p (ln p - ln q), which is sum student of the reverse KL
    reverse = (cross / at_tau) * (c * LN2) - (z_log2 - t_log2) * LN2
    sum_student = scalar(0.0)
    for k in tl.static_range(len(KINDS)):
        sum_student += given.weights[k] * divergences.sum_of_student(KINDS[k], reverse)
    if stats is not None:
        tl.store(stats, z_at)
        tl.store(stats + 1, z_log2)
        tl.store(stats + 2, one_at)
        tl.store(stats + 3, one_log2)
        tl.store(stats + 4, sum_student)
        tl.store(stats + 5, present)
    if wanted.logit_sum is not None:
        tl.store(wanted.logit_sum + i, smooth + present * one_at)
    if wanted.z2 is not None:
        lse = one_at + one_log2 * LN2
        tl.store(wanted.z2 + i, lse * lse)
    if wanted.hard is not None:
        label = tl.load(given.labels + i)
        inside = (label >= 0) & (label < given.vocab)
        z = logits(student, row_of(student, i), tl.where(inside, label, 0), True)
        ce = (one_at - z) + one_log2 * LN2
        if SMOOTH:
            ce += given.label_smoothing * ((z - one_at) - smooth / present)
        tl.store(wanted.hard + i, tl.where(inside, ce, tl.where(label == NO_LABEL, 0.0, float("nan"))))
    return z_at, z_log2, one_at, one_log2, sum_student, present
