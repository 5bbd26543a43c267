"""The dense distillation loss on a GPU.

Per row, with c = log2(e) / tau, z the student's and t a teacher's logits::

    pass 1  max z, sum 2^((z - max) c), sum 2^((z - max) log2 e), and so for each teacher     -> state
    pass 2  the divergence's value and, where unknown so far, sum student(column)
    pass 3  the gradient; the same pass as 2 for forward and reverse KL

The total variation has one more after the first, for the side on which p lies (``dense_sides.py``).

Probabilities follow as log2 p = (z - max) c - log2 sum, in which large logits lose nothing. Passes go through the row
forwards and backwards in turn, so that each begins with what the last one left in the cache.

Bytes per column of 16-bit logits: pass 1 reads 4, pass 2 reads 4, pass 3 reads 4 and writes 2. Forward and reverse KL
with their gradient move 10, the others 14; 6 reach the memory where the row stays in the L2 cache. Without a teacher,
or with one of kept columns (``dense_kept.py``), passes 1 and 3 go over the student alone: 6, and 4 to the memory.

One program takes a row and all its passes, so that a call is one launch. Where rows are few, a row is split among
programs, pass by pass: each leaves its partial sums, which a small kernel combines in their order, so that the result
does not depend on timing. Ensembles of distributions take that way too, as the number of their sums is open. The
partial sums are also what ranks exchange that hold a shard of the vocabulary each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton import divergences
from kdfast.kernels.triton.dense_hard import less_target, of_softmax
from kdfast.kernels.triton.dense_kept import RENORM, finish_kept, kept_gradient
from kdfast.kernels.triton.dense_observe import (
    NO_TOP_OF_TEACHER,
    OBSERVED,
    OBSERVED_SUMS,
    column_of,
    combined_spread,
    combined_tile,
    entropy,
    finish_observed,
    first_tile,
    no_tile,
)
from kdfast.kernels.triton.dense_rows import (
    ELSEWHERE,
    INF,
    LOG2E,
    NO_LABEL,
    STATE,
    SUMS,
    TAU_TWO,
    VALUES,
    exponent_scale,
    logits,
    or_zero,
    row_of,
    scalar,
    teacher_tile,
    tiles_of,
    to_stored,
)
from kdfast.kernels.triton.dense_sides import (
    exact_scale,
    exp2_exact,
    load_halves,
    log2_of,
    offset_of,
    side_of,
    store_halves,
    sum_sides,
)
from kdfast.kernels.triton.dense_sums import finish_sums, sum_rest, sum_taught, sum_teacher
from kdfast.kernels.triton.divergences import LN2

# --- Passes 2 and 3 ---------------------------------------------------------------------------------------------------


@triton.jit
def _log2_q(
    teachers,
    given,
    stats,
    i,
    offsets,
    mask,
    c,
    t_at,
    t_log2,
    MIX: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
):
    """log2 q of a tile; of several distributions log2 sum w q, from the largest summand on."""
    if DISTRIBUTIONS == 1:
        return (teacher_tile(teachers, given, i, offsets, mask, 0, MIX) - t_at) * c - t_log2
    else:
        top = tl.full(offsets.shape, float("-inf"), tl.float32)
        total = tl.zeros(offsets.shape, tl.float32)
        for k in tl.static_range(DISTRIBUTIONS):
            w = tl.load(given.teacher_weights + k * given.weight_teacher_stride + i * given.weight_row_stride)
            t = teacher_tile(teachers, given, i, offsets, mask, k, MIX)
            v = (t - tl.load(stats + STATE + 2 * k)) * c - tl.load(stats + STATE + 2 * k + 1) + tl.log2(w)
            v = tl.where(w == 0.0, -INF, v)
            new = tl.maximum(top, v)
            at = or_zero(new)
            total = total * tl.exp2(top - at) + tl.exp2(v - at)
            top = new
        return or_zero(top) + tl.log2(total)


@triton.jit
def _column(
    z,
    teachers,
    given,
    stats,
    i,
    offsets,
    mask,
    c,
    z_at,
    z_log2,
    t_at,
    t_log2,
    d_high,
    d_low,
    MIX: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
    SIDED: tl.constexpr,
):
    """What divergences are told of the columns of a tile: (p, q, log2 p, log2 q, ln q - ln p, side)."""
    u = (z - z_at) * c - z_log2
    if SIDED:
        t = teacher_tile(teachers, given, i, offsets, mask, 0, MIX)
        v = (t - t_at) * c - t_log2
    else:
        v = _log2_q(teachers, given, stats, i, offsets, mask, c, t_at, t_log2, MIX, DISTRIBUTIONS)
    p, q = tl.exp2(u), tl.exp2(v)
    side = p - q
    if SIDED:
        side = side_of(z, t, p, q, d_high, d_low)
    return p, q, u, v, (v - u) * LN2, side


@triton.jit
def _finish_values(wanted, i, c, value, student, student_u, p_u, teacher, teacher_v, q_v):
    if wanted.soft is not None:
        tl.store(wanted.soft + i, value)
    if wanted.dtau is not None:
        # -(1 / tau) (dD/dx . x + dD/dy . y), x and y the logits over tau, which are u and v up to a shift and a factor
        moved = (student_u - student * p_u) + (teacher_v - teacher * q_v)
        tl.store(wanted.dtau + i, -(c * LN2) * LN2 * moved)


@triton.jit
def _passes(
    student,
    teachers,
    grad,
    given,
    wanted,
    factors,
    sums,
    values,
    i,
    split,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TAU: tl.constexpr,
    KINDS: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
    KEPT: tl.constexpr,
    RULE: tl.constexpr,
    MIX: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SMOOTH: tl.constexpr,
    CROSS: tl.constexpr,
    KNOWN: tl.constexpr,
    PASS_SUMS: tl.constexpr,
    PASS_VALUE: tl.constexpr,
    PASS_GRADIENT: tl.constexpr,
    JOINT_VALUE: tl.constexpr,
    OBSERVE: tl.constexpr,
    SIDED: tl.constexpr,
):
    c = exponent_scale(given)
    if DISTRIBUTIONS == 0 and KEPT == 0:  # no temperature matters then
        c = scalar(LOG2E)
    stats = wanted.stats
    if stats is not None:
        stats += i * (STATE + 2 * (DISTRIBUTIONS + (KEPT > 0)) + 4 * SIDED)
    t_at, t_log2 = scalar(0.0), scalar(0.0)
    d_high, d_low = scalar(0.0), scalar(0.0)

    if PASS_SUMS:
        z_top, at_tau, at_one, cross, smooth, present, t_top, t_sum, z_tile, z_spread, t_tile, t_spread = sum_taught(
            student, teachers, given, i, split, c, BLOCK, SPLITS, TAU, MIX, CROSS, SMOOTH,
            DISTRIBUTIONS == 1, KEPT * (RULE <= RENORM), OBSERVE,
        )  # fmt: skip
        rest_top, rest_sum, rest_smooth, rest_present = scalar(float("-inf")), scalar(0.0), scalar(0.0), scalar(0.0)
        rest_tile = no_tile()
        if TRUNCATED:
            rest_top, rest_sum, rest_smooth, rest_present, rest_tile = sum_rest(
                student, given, i, split, BLOCK, SPLITS, SMOOTH,
            )  # fmt: skip
        if sums is not None:
            sums += (i * SPLITS + split) * (SUMS + 2 * DISTRIBUTIONS + OBSERVED_SUMS * OBSERVE + 4 * SIDED)
            tl.store(sums, z_top)
            tl.store(sums + 1, at_tau)
            tl.store(sums + 2, at_one)
            tl.store(sums + 3, cross)
            tl.store(sums + 4, smooth)
            tl.store(sums + 5, present)
            tl.store(sums + 6, rest_top)
            tl.store(sums + 7, rest_sum)
            tl.store(sums + 8, rest_smooth)
            tl.store(sums + 9, rest_present)
            if OBSERVE:
                tl.store(sums + SUMS + 2 * DISTRIBUTIONS, z_tile.to(tl.float32))
                tl.store(sums + SUMS + 2 * DISTRIBUTIONS + 1, z_spread)
                tl.store(sums + SUMS + 2 * DISTRIBUTIONS + 2, rest_tile.to(tl.float32))
                tl.store(sums + SUMS + 2 * DISTRIBUTIONS + 3, t_tile.to(tl.float32))
                tl.store(sums + SUMS + 2 * DISTRIBUTIONS + 4, t_spread)
            if DISTRIBUTIONS == 1:
                tl.store(sums + SUMS, t_top)
                tl.store(sums + SUMS + 1, t_sum)
            if SIDED:
                z_exact, t_exact = sum_sides(student, teachers, given, i, split, z_top, t_top, MIX, BLOCK, SPLITS)
                store_halves(sums + SUMS + 2 + OBSERVED_SUMS * OBSERVE, z_exact)
                store_halves(sums + SUMS + 4 + OBSERVED_SUMS * OBSERVE, t_exact)
            if DISTRIBUTIONS > 1:
                for k in tl.static_range(DISTRIBUTIONS):
                    t_top, t_sum = sum_teacher(teachers, given, i, split, c, k, MIX, BLOCK, SPLITS)
                    tl.store(sums + SUMS + 2 * k, t_top)
                    tl.store(sums + SUMS + 2 * k + 1, t_sum)
        else:
            t_at, t_log2 = or_zero(t_top), tl.log2(t_sum)
            z_at, z_log2, one_at, one_log2, sum_student, present = finish_sums(
                student, given, wanted, stats, i, c, z_top, at_tau, at_one, cross, smooth, present, rest_top, rest_sum,
                rest_smooth, rest_present, t_log2, KINDS, TRUNCATED, SMOOTH,
            )  # fmt: skip
            if OBSERVE:
                finish_observed(
                    student, teachers, given, wanted, i, z_top, z_tile, at_tau, z_spread, rest_top, rest_tile, rest_sum,
                    t_top, t_tile, t_sum, t_spread, BLOCK, DISTRIBUTIONS, MIX, TRUNCATED,
                )  # fmt: skip
            if stats is not None and DISTRIBUTIONS == 1:
                tl.store(stats + STATE, t_at)
                tl.store(stats + STATE + 1, t_log2)
            if SIDED:
                z_exact, t_exact = sum_sides(student, teachers, given, i, split, z_top, t_top, MIX, BLOCK, SPLITS)
                z_exact, t_exact = log2_of(z_top, z_exact, given), log2_of(t_top, t_exact, given)
                d_high, d_low = offset_of(z_exact, t_exact, given)
                if stats is not None:
                    store_halves(stats + STATE + 2, z_exact)
                    store_halves(stats + STATE + 4, t_exact)
            if KEPT > 0:
                sum_student, pull, shift = finish_kept(
                    student, given, wanted, stats, i, c, z_at, z_log2, cross, KEPT, RULE, KINDS,
                )  # fmt: skip
    else:
        z_at, z_log2 = tl.load(stats), tl.load(stats + 1)
        one_at, one_log2 = tl.load(stats + 2), tl.load(stats + 3)
        sum_student, present = tl.load(stats + 4), tl.load(stats + 5)
        if DISTRIBUTIONS == 1:
            t_at, t_log2 = tl.load(stats + STATE), tl.load(stats + STATE + 1)
        if SIDED:
            d_high, d_low = offset_of(load_halves(stats + STATE + 2), load_halves(stats + STATE + 4), given)
        if KEPT > 0:
            pull, shift = tl.load(stats + STATE), tl.load(stats + STATE + 1)

    if PASS_VALUE or PASS_GRADIENT:
        row = row_of(student, i)
        first, last = tiles_of(given.columns, split, BLOCK, SPLITS)

    if PASS_VALUE:
        value = tl.zeros([BLOCK], tl.float32)
        s_sum = tl.zeros([BLOCK], tl.float32)
        s_u = tl.zeros([BLOCK], tl.float32)
        p_u = tl.zeros([BLOCK], tl.float32)
        t_sum_ = tl.zeros([BLOCK], tl.float32)
        t_v = tl.zeros([BLOCK], tl.float32)
        q_v = tl.zeros([BLOCK], tl.float32)
        for back in range(last - first):
            offsets = (last - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < given.columns
            z = logits(student, row, offsets, mask)
            p, q, u, v, d, side = _column(
                z, teachers, given, stats, i, offsets, mask, c, z_at, z_log2, t_at, t_log2, d_high, d_low, MIX,
                DISTRIBUTIONS, SIDED,
            )  # fmt: skip
            value += divergences.sum_terms(divergences.value, given, p, q, u, v, d, side, KINDS)
            of_student = divergences.sum_terms(divergences.student, given, p, q, u, v, d, side, KINDS)
            s_sum += of_student
            if wanted.dtau is not None:
                of_teacher = divergences.sum_terms(divergences.teacher, given, p, q, u, v, d, side, KINDS)
                s_u += divergences.times(of_student, u)
                p_u += divergences.times(p, u)
                t_sum_ += of_teacher
                t_v += divergences.times(of_teacher, v)
                q_v += divergences.times(q, v)
        total, sum_of_student = tl.sum(value, 0), tl.sum(s_sum, 0)
        if values is not None:
            at = values + (i * SPLITS + split) * VALUES
            tl.store(at, total)
            tl.store(at + 1, sum_of_student)
            if wanted.dtau is not None:
                tl.store(at + 2, tl.sum(s_u, 0))
                tl.store(at + 3, tl.sum(p_u, 0))
                tl.store(at + 4, tl.sum(t_sum_, 0))
                tl.store(at + 5, tl.sum(t_v, 0))
                tl.store(at + 6, tl.sum(q_v, 0))
        else:
            if not KNOWN:
                sum_student = sum_of_student
                if stats is not None:
                    tl.store(stats + 4, sum_student)
            _finish_values(
                wanted, i, c, total, sum_of_student, tl.sum(s_u, 0), tl.sum(p_u, 0), tl.sum(t_sum_, 0), tl.sum(t_v, 0),
                tl.sum(q_v, 0),
            )  # fmt: skip

    if PASS_GRADIENT:
        c_soft, c_hard, c_one = scalar(0.0), scalar(0.0), scalar(0.0)
        label = tl.full([], NO_LABEL, tl.int64)
        if factors.soft is not None:
            c_soft = tl.load(factors.soft + i) * (c * LN2)  # over tau
        if factors.hard is not None:
            label = tl.load(given.labels + i)
            c_hard = tl.where(label == NO_LABEL, 0.0, tl.load(factors.hard + i))
            inside = (label == NO_LABEL) | (label == ELSEWHERE) | ((label >= 0) & (label < given.vocab))
            c_hard = tl.where(inside, c_hard, float("nan"))
            c_one = c_hard
        if factors.z is not None:
            c_z = tl.load(factors.z + i)
            c_one += tl.where(c_z == 0.0, 0.0, 2.0 * c_z * (one_at + one_log2 * LN2))
        smoothed = scalar(0.0)
        if SMOOTH:
            smoothed = c_hard * given.label_smoothing
        # factor of p (p^2 with TAU_TWO), where softmax(z) follows from it; one_at = z_at then
        one_from_p = c_one
        if TAU == TAU_TWO:
            one_from_p = c_one * tl.exp2(2.0 * z_log2 - one_log2)
        g_row = row_of(grad, i)
        value = tl.zeros([BLOCK], tl.float32)
        if KEPT > 0:
            ids, here, of_kept = kept_gradient(
                student, given, factors, i, first * BLOCK, last * BLOCK, c, c_soft, z_at, z_log2, sum_student, pull,
                shift, label, c_hard, c_one, one_at, one_log2, one_from_p, smoothed, present, KEPT, RULE, KINDS, TAU,
                TRUNCATED, SMOOTH,
            )  # fmt: skip
            pull = tl.where(c_soft == 0.0, 0.0, pull)
            tl.debug_barrier()  # their logits have been read
        if DISTRIBUTIONS > 0 or KEPT > 0:
            for step in range(last - first):
                j = first + step
                if not PASS_VALUE:  # which ended at the beginning
                    j = last - 1 - step
                offsets = j * BLOCK + tl.arange(0, BLOCK)
                mask = offsets < given.columns
                z = logits(student, row, offsets, mask)
                if KEPT > 0:
                    p = tl.exp2((z - z_at) * c - z_log2)
                    g = c_soft * (pull * p)
                else:
                    p, q, u, v, d, side = _column(
                        z, teachers, given, stats, i, offsets, mask, c, z_at, z_log2, t_at, t_log2, d_high, d_low, MIX,
                        DISTRIBUTIONS, SIDED,
                    )  # fmt: skip
                    if JOINT_VALUE:
                        value += divergences.sum_terms(divergences.value, given, p, q, u, v, d, side, KINDS)
                    # A distillation term without weight is left out, not multiplied by 0: its gradient may be infinite.
                    g = divergences.sum_terms(divergences.student, given, p, q, u, v, d, side, KINDS) - p * sum_student
                    g = tl.where(c_soft == 0.0, 0.0, c_soft * g)
                if factors.hard is not None or factors.z is not None:
                    g += of_softmax(z, p, c_one, one_at, one_log2, one_from_p, TAU, TRUNCATED)
                g = less_target(g, z, offsets, label, c_hard, smoothed, present, SMOOTH)
                g = to_stored(student, g, z)
                tl.store(g_row + offsets, g.to(grad.data.dtype.element_ty), mask=mask)
            begin = given.columns
        else:
            begin = 0
        if TRUNCATED or DISTRIBUTIONS == 0:
            r_first, r_last = tiles_of(given.vocab - begin, split, BLOCK, SPLITS)
            for step in range(r_last - r_first):
                offsets = begin + (r_last - 1 - step) * BLOCK + tl.arange(0, BLOCK)
                mask = offsets < given.vocab
                z = logits(student, row, offsets, mask)
                g = c_one * tl.exp2((z - one_at) * LOG2E - one_log2)
                g = less_target(g, z, offsets, label, c_hard, smoothed, present, SMOOTH)
                g = to_stored(student, g, z)
                tl.store(g_row + offsets, g.to(grad.data.dtype.element_ty), mask=mask)
        if KEPT > 0:
            tl.debug_barrier()  # what they have as columns like any other is in memory
            tl.store(g_row + ids, of_kept.to(grad.data.dtype.element_ty), mask=here)
        if JOINT_VALUE:
            total = tl.sum(value, 0)
            if values is not None:
                tl.store(values + (i * SPLITS + split) * VALUES, total)
            else:
                tl.store(wanted.soft + i, total)


@triton.jit
def _drop(grad, given, wanted, i, split, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SAVED: tl.constexpr,
          PASS_GRADIENT: tl.constexpr):  # fmt: skip
    """A row that does not count: zeros wherever something is wanted."""
    if split == 0:
        if wanted.soft is not None:
            tl.store(wanted.soft + i, 0.0)
        if wanted.hard is not None:
            tl.store(wanted.hard + i, 0.0)
        if wanted.z2 is not None:
            tl.store(wanted.z2 + i, 0.0)
        if wanted.dtau is not None:
            tl.store(wanted.dtau + i, 0.0)
        if wanted.logit_sum is not None:
            tl.store(wanted.logit_sum + i, 0.0)
        if wanted.observed is not None:
            for k in tl.static_range(OBSERVED):
                tl.store(wanted.observed + i * OBSERVED + k, tl.full([], 0.0, tl.float64))
        if wanted.stats is not None:
            for k in tl.static_range(SAVED):
                tl.store(wanted.stats + i * SAVED + k, 0.0)
    if PASS_GRADIENT:
        row = row_of(grad, i)
        first, last = tiles_of(given.vocab, split, BLOCK, SPLITS)
        for j in range(first, last):
            offsets = j * BLOCK + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], tl.float32).to(grad.data.dtype.element_ty)
            tl.store(row + offsets, zeros, mask=offsets < given.vocab)


@triton.jit
def dense_kernel(
    student,
    teachers,
    grad,
    given,
    wanted,
    factors,
    sums,
    values,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TAU: tl.constexpr,
    KINDS: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
    KEPT: tl.constexpr,
    RULE: tl.constexpr,
    MIX: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SMOOTH: tl.constexpr,
    CROSS: tl.constexpr,
    KNOWN: tl.constexpr,
    PASS_SUMS: tl.constexpr,
    PASS_VALUE: tl.constexpr,
    PASS_GRADIENT: tl.constexpr,
    JOINT_VALUE: tl.constexpr,
    OBSERVE: tl.constexpr,
    SIDED: tl.constexpr,
):
    """Some or all passes over one row, or over one split of it; grid (rows, splits).

    With `sums` (rows, splits, 10 + 2 distributions, 5 more with OBSERVE and 4 with SIDED) pass 1 leaves its partial
    sums there; with `values` (rows, splits, 7) passes 2 and 3 do. Without, one program has the whole row and finishes
    it.
    """
    i = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    counts = True
    if given.counted is not None:
        counts = tl.load(given.counted + i) != 0
    if counts:
        _passes(
            student, teachers, grad, given, wanted, factors, sums, values, i, split, BLOCK, SPLITS, TAU, KINDS,
            DISTRIBUTIONS, KEPT, RULE, MIX, TRUNCATED, SMOOTH, CROSS, KNOWN, PASS_SUMS, PASS_VALUE, PASS_GRADIENT,
            JOINT_VALUE, OBSERVE, SIDED,
        )  # fmt: skip
    else:
        saved: tl.constexpr = STATE + 2 * (DISTRIBUTIONS + (KEPT > 0)) + 4 * SIDED
        _drop(grad, given, wanted, i, split, BLOCK, SPLITS, saved, PASS_GRADIENT)


# --- Between the passes of a split row --------------------------------------------------------------------------------


@triton.jit
def _together(top, total, factor):
    """Partial sums under their own maxima -> (maximum, sum under it), in the order in which they stand."""
    most = tl.max(top, 0)
    return most, tl.sum(total * tl.exp2((top - or_zero(most)) * factor), 0)


@triton.jit
def _exactly_together(top, total, given):
    """log2 of fp64 sums under their own maxima."""
    most = tl.max(top, 0)
    shift = (top.to(tl.float64) - or_zero(most).to(tl.float64)) * exact_scale(given)
    return log2_of(most, tl.sum(total * exp2_exact(shift), 0), given)


@triton.jit
def combine_sums_kernel(
    student,
    teachers,
    given,
    wanted,
    sums,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MIX: tl.constexpr,
    OBSERVE: tl.constexpr,
    KINDS: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
    KEPT: tl.constexpr,
    RULE: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SMOOTH: tl.constexpr,
    SIDED: tl.constexpr,
):
    """Partial sums of a row -> its state, cross-entropy and squared logsumexp, and the value of kept columns.

    Grid (rows,).
    """
    i = tl.program_id(0).to(tl.int64)
    counts = True
    if given.counted is not None:
        counts = tl.load(given.counted + i) != 0
    if counts:
        c = exponent_scale(given)
        if DISTRIBUTIONS == 0 and KEPT == 0:
            c = scalar(LOG2E)
        s = tl.arange(0, SPLITS)
        at = sums + (i * SPLITS + s) * (SUMS + 2 * DISTRIBUTIONS + OBSERVED_SUMS * OBSERVE + 4 * SIDED)
        tops = tl.load(at)
        z_top, at_tau = _together(tops, tl.load(at + 1), c)
        z_top, at_one = _together(tops, tl.load(at + 2), LOG2E)
        crosses = tl.load(at + 3)
        if DISTRIBUTIONS == 1:  # distances to a split's own maxima
            t_tops = tl.load(at + SUMS)
            apart = (or_zero(tl.max(t_tops, 0)) - or_zero(t_tops)) - (or_zero(z_top) - or_zero(tops))
            crosses += tl.load(at + 1) * apart
        z_top, cross = _together(tops, crosses, c)
        present = tl.load(at + 5)
        moved = tl.load(at + 4) + present * (or_zero(tops) - or_zero(z_top))
        smooth, present = tl.sum(tl.where(present > 0.0, moved, 0.0), 0), tl.sum(present, 0)
        tops = tl.load(at + 6)
        rest_top, rest_sum = _together(tops, tl.load(at + 7), LOG2E)
        r_present = tl.load(at + 9)
        moved = tl.load(at + 8) + r_present * (or_zero(tops) - or_zero(rest_top))
        rest_smooth, rest_present = tl.sum(tl.where(r_present > 0.0, moved, 0.0), 0), tl.sum(r_present, 0)
        stats = wanted.stats + i * (STATE + 2 * (DISTRIBUTIONS + (KEPT > 0)) + 4 * SIDED)
        t_at, t_log2 = scalar(0.0), scalar(0.0)
        for k in tl.static_range(DISTRIBUTIONS):
            tops = tl.load(at + SUMS + 2 * k)
            top, total = _together(tops, tl.load(at + SUMS + 2 * k + 1), c)
            t_at, t_log2 = or_zero(top), tl.log2(total)
            tl.store(stats + STATE + 2 * k, t_at)
            tl.store(stats + STATE + 2 * k + 1, t_log2)
        if SIDED:
            halves = at + SUMS + 2 + OBSERVED_SUMS * OBSERVE
            store_halves(stats + STATE + 2, _exactly_together(tl.load(at), load_halves(halves), given))
            store_halves(stats + STATE + 4, _exactly_together(tl.load(at + SUMS), load_halves(halves + 2), given))
        z_at, z_log2, _, _, _, _ = finish_sums(
            student, given, wanted, stats, i, c, z_top, at_tau, at_one, cross, smooth, present, rest_top, rest_sum,
            rest_smooth, rest_present, t_log2, KINDS, TRUNCATED, SMOOTH,
        )  # fmt: skip
        if OBSERVE:
            seen = at + SUMS + 2 * DISTRIBUTIONS
            tops, rest_tops = tl.load(at), tl.load(at + 6)
            z_tile = combined_tile(tops, z_top, tl.load(seen))
            z_spread = combined_spread(tops, z_top, tl.load(at + 1), tl.load(seen + 1), c)
            rest_tile = combined_tile(rest_tops, rest_top, tl.load(seen + 2))
            t_top, t_tile, t_sum, t_spread = scalar(float("-inf")), no_tile(), scalar(0.0), scalar(0.0)
            if DISTRIBUTIONS == 1:
                tops, totals = tl.load(at + SUMS), tl.load(at + SUMS + 1)
                t_top, t_sum = _together(tops, totals, c)
                t_tile = combined_tile(tops, t_top, tl.load(seen + 3))
                t_spread = combined_spread(tops, t_top, totals, tl.load(seen + 4), c)
            finish_observed(
                student, teachers, given, wanted, i, z_top, z_tile, at_tau, z_spread, rest_top, rest_tile, rest_sum,
                t_top, t_tile, t_sum, t_spread, BLOCK, DISTRIBUTIONS, MIX, TRUNCATED,
            )  # fmt: skip
        if KEPT > 0:
            finish_kept(student, given, wanted, stats, i, c, z_at, z_log2, cross, KEPT, RULE, KINDS)


@triton.jit
def observe_mixture_kernel(
    teachers, given, wanted, BLOCK: tl.constexpr, DISTRIBUTIONS: tl.constexpr, MIX: tl.constexpr
):
    """The likeliest column and the entropy of an ensemble's mixture, from the state of a row; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    counts = True
    if given.counted is not None:
        counts = tl.load(given.counted + i) != 0
    if counts:
        c = exponent_scale(given)
        stats = wanted.stats + i * (STATE + 2 * DISTRIBUTIONS)
        top, tile = scalar(float("-inf")), no_tile()
        total, spread = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        first, last = tiles_of(given.columns, 0, BLOCK, 1)
        for j in range(first, last):
            offsets = j * BLOCK + tl.arange(0, BLOCK)
            v = _log2_q(
                teachers, given, stats, i, offsets, offsets < given.columns, c, 0.0, 0.0, MIX, DISTRIBUTIONS,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(v, 0))
            q = tl.exp2(v)
            tile = first_tile(tile, j, new, top)
            total += q
            spread += tl.where(q == 0.0, 0.0, q * v)
            top = new
        offsets = tile * BLOCK + tl.arange(0, BLOCK)
        v = _log2_q(
            teachers, given, stats, i, offsets, offsets < given.columns, c, 0.0, 0.0, MIX, DISTRIBUTIONS,
        )  # fmt: skip
        all_q = tl.sum(total, 0)
        tl.store(wanted.observed + i * OBSERVED + 3, column_of(v, offsets, top, all_q, NO_TOP_OF_TEACHER))
        tl.store(wanted.observed + i * OBSERVED + 4, entropy(all_q, tl.sum(spread, 0)).to(tl.float64))


@triton.jit
def combine_values_kernel(
    given,
    wanted,
    values,
    SPLITS: tl.constexpr,
    DISTRIBUTIONS: tl.constexpr,
    KNOWN: tl.constexpr,
    SIDED: tl.constexpr,
):
    """Partial values of a row -> its distillation term, sum student and dD/dtau; grid (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    counts = True
    if given.counted is not None:
        counts = tl.load(given.counted + i) != 0
    if counts:
        s = tl.arange(0, SPLITS)
        at = values + (i * SPLITS + s) * VALUES
        zero = scalar(0.0)
        value = tl.sum(tl.load(at), 0)
        student, student_u, p_u, teacher, teacher_v, q_v = zero, zero, zero, zero, zero, zero
        student = tl.sum(tl.load(at + 1), 0)
        if wanted.dtau is not None:
            student_u = tl.sum(tl.load(at + 2), 0)
            p_u = tl.sum(tl.load(at + 3), 0)
            teacher = tl.sum(tl.load(at + 4), 0)
            teacher_v = tl.sum(tl.load(at + 5), 0)
            q_v = tl.sum(tl.load(at + 6), 0)
        if not KNOWN:
            tl.store(wanted.stats + i * (STATE + 2 * DISTRIBUTIONS + 4 * SIDED) + 4, student)
        _finish_values(wanted, i, exponent_scale(given), value, student, student_u, p_u, teacher, teacher_v, q_v)


@triton.jit
def scale_kernel(rows, factor, columns, BLOCK: tl.constexpr):
    """Multiplies rows by a number in memory, in place; grid (rows, tiles)."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row_of(rows, tl.program_id(0).to(tl.int64)) + offsets
        mask = offsets < columns
        x = tl.load(at, mask=mask).to(tl.float32)
        tl.store(at, (x * f).to(rows.data.dtype.element_ty), mask=mask)
