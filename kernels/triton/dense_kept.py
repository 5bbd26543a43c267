"""A teacher of K kept columns a row: what lies between pass 1 and the gradient.

The kept columns, and where the rule has one the tail of all others, are outcomes of two distributions p and q like the
columns of a dense row. With S = sum student over them::

    kept column    tau dD/dz = student - p S
    another one    tau dD/dz = p (student_tail / p_tail - S), as its share of the tail is p / p_tail

so the gradient of the row is p times one number, the pull, and the kept columns are written once more after it. Pass 1
leaves the kept columns out of a sum of its own, as 1 - sum p has no digits left of the tail of a student that is sure.

Memory sees the row as often as under the cross-entropy alone. Of the K entries a program reads ids, values and logits
once before the gradient and once with it; their logits before the first column of the gradient is written, which may
take the place of them all. Packed entries are unpacked in registers each time (``unpack.py``), and never stored: their
order is found id by id, as the least of those that are left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton import divergences
from kdfast.kernels.triton.dense_hard import less_target, of_softmax
from kdfast.kernels.triton.dense_rows import INF, LOG2E, STATE, logits, or_zero, row_of, to_stored
from kdfast.kernels.triton.divergences import LN2, times
from kdfast.kernels.triton.unpack import NOWHERE, escapes_begin, unpack_ids, unpack_steps

#: Numbers of the rules for the tail, for ``tl.constexpr`` arguments; the first two have one among their outcomes.
RULES = {"bucket": 0, "renorm": 1, "zero": 2, "drawn": 3}
BUCKET = tl.constexpr(0)
RENORM = tl.constexpr(1)
DRAWN = tl.constexpr(3)

# log2 of what a tail has that ought to have mass, however little its sum has left of it. A little above the smallest
# number, so that a quotient by it is finite.
FLOOR = tl.constexpr(-120.0)


# --- Pass 1: the tail -------------------------------------------------------------------------------------------------


@triton.jit
def first_kept(given, i, column, KEPT: tl.constexpr):
    """Where the ids in order reach a column, the one that stands there, and what the next ones are found by."""
    k = tl.arange(0, KEPT)
    if given.kept.packed is not None:
        ids = _packed_ids(given, i, k)
        return 0, tl.min(tl.where(ids >= column, ids, NOWHERE), 0), ids
    else:
        ids = tl.load(given.kept.ordered + i * given.kept.size + k, mask=k < given.kept.size, other=NOWHERE)
        at = tl.sum((ids < column).to(tl.int32), 0)
        return at, _id_at(given, i, at), 0


@triton.jit
def _packed_ids(given, i, k):
    """Ids of a packed row; -1 where there is none."""
    token = given.kept.ids + 2 * i
    return unpack_ids(given.kept.packed, tl.load(token), tl.load(token + 1), k)


@triton.jit
def _id_at(given, i, at):
    return tl.load(given.kept.ordered + i * given.kept.size + at, mask=at < given.kept.size, other=NOWHERE)


@triton.jit
def less_kept(e, given, i, offsets, end, at, following, ids):
    """A tile's summands without those of kept columns; and where the ids stand at its end."""
    while following < end:
        e = tl.where(offsets == following, 0.0, e)
        if given.kept.packed is not None:
            following = tl.min(tl.where(ids > following, ids, NOWHERE), 0)
        else:
            at += 1
            following = _id_at(given, i, at)
    return e, at, following


# --- The outcomes -----------------------------------------------------------------------------------------------------


@triton.jit
def _entries(given, i, KEPT: tl.constexpr, RULE: tl.constexpr):
    """(ids, which of them are columns here, log2 q at tau in fp64, or a drawn weight)."""
    k = tl.arange(0, KEPT)
    if given.kept.packed is not None:
        ids = _packed_ids(given, i, k)
        used = (ids >= 0) & (ids < given.columns)
        token = given.kept.ids + 2 * i
        size = tl.load(token + 1)
        begin = escapes_begin(given.kept.packed, size)
        steps, _, _ = unpack_steps(given.kept.packed, tl.load(token), size, k, begin, 0)
        x = tl.load(given.kept.content + i) - steps.to(tl.float32) * given.kept.packed.step
    else:
        ids = tl.load(given.kept.ids + i * given.kept.size + k, mask=k < given.kept.size, other=-1)
        used = (ids >= 0) & (ids < given.columns)
        x = tl.load(given.kept.content + i * given.kept.size + k, mask=used, other=0.0)
    if RULE == DRAWN:
        return ids, used, x
    else:
        log2e = tl.full([], LOG2E, tl.float64)
        v = x.to(tl.float64) * (log2e / tl.load(given.temperature).to(tl.float64))
        if given.kept.per_row is not None:
            v -= tl.load(given.kept.per_row + i).to(tl.float64) * log2e
        return ids, used, tl.where(used, v, -INF)


@triton.jit
def _mass_left(v):
    """1 - sum 2^v, fp64: what the largest lacks of 1 less the sum of the others."""
    largest = tl.max(v, 0)
    is_largest = v == largest
    ties = (tl.sum(is_largest.to(tl.int32), 0) - 1).to(tl.float64)
    power = tl.exp2(largest)
    others = tl.sum(tl.where(is_largest, 0.0, tl.exp2(v)), 0) + ties * power
    # near 1, 1 - u is to log2 u as 1 - 2^v is to v
    near = tl.where(power == 1.0, -largest * LN2, (1.0 - power) * (largest / tl.log2(power)))
    return tl.where(power < 0.5, 1.0 - power, near) - others


@triton.jit
def _spoilt(given, i, KEPT: tl.constexpr):
    """NaN for a row with an id that is no column of the teacher's or stands there twice, 0 for any other.

    Packed rows were looked at when they were read.
    """
    k = tl.arange(0, KEPT)
    there = k < given.kept.size
    at = given.kept.ordered + i * given.kept.size + k
    ids = tl.load(at, mask=there, other=-1)
    after = tl.load(at + 1, mask=k + 1 < given.kept.size, other=-1)
    bad = there & ((ids < -1) | (ids >= given.kept.columns) | ((ids >= 0) & (ids == after)))
    return tl.where(tl.sum(bad.to(tl.int32), 0) > 0, float("nan"), 0.0)


@triton.jit
def _floored(log2_mass):
    return tl.where(log2_mass < FLOOR, FLOOR, log2_mass)


@triton.jit
def _total_weight(given, KINDS: tl.constexpr):
    weight = 0.0
    for k in tl.static_range(len(KINDS)):
        weight += given.weights[k]
    return weight


@triton.jit
def _outcomes(student, given, i, c, z_at, z_log2, log2_beside, KEPT: tl.constexpr, RULE: tl.constexpr,
              KINDS: tl.constexpr):  # fmt: skip
    """(value, sum student, pull, log2 of what q is divided by); without a tail the second number is 0."""
    ids, used, exact = _entries(given, i, KEPT, RULE)
    v = exact.to(tl.float32)
    if RULE == BUCKET:
        left = _mass_left(exact)
    u = (logits(student, row_of(student, i), tl.where(used, ids, 0), used) - z_at) * c - z_log2
    if RULE <= RENORM:
        shift = 0.0
        if RULE == RENORM:
            top = or_zero(tl.max(v, 0))
            shift = top + tl.log2(tl.sum(tl.exp2(v - top), 0))
            v -= shift
        p, q, d = tl.exp2(u), tl.exp2(v), (v - u) * LN2
        complete = tl.sum(used.to(tl.int32), 0) == given.columns  # nothing was left out
        tail_u = tl.where(complete, -INF, _floored(log2_beside))
        tail_v = -INF
        if RULE == BUCKET:
            tail_v = tl.where(complete, -INF, _floored(tl.log2(tl.where(left < 0.0, 0.0, left)).to(tl.float32)))
        tail_p, tail_q, tail_d = tl.exp2(tail_u), tl.exp2(tail_v), (tail_v - tail_u) * LN2
        value = tl.sum(divergences.sum_terms(divergences.value, given, p, q, u, v, d, p - q, KINDS), 0)
        value += divergences.sum_terms(divergences.value, given, tail_p, tail_q, tail_u, tail_v, tail_d, 0.0, KINDS)
        tail = divergences.sum_terms(divergences.student, given, tail_p, tail_q, tail_u, tail_v, tail_d, 0.0, KINDS)
        total = tl.sum(divergences.sum_terms(divergences.student, given, p, q, u, v, d, p - q, KINDS), 0) + tail
        return value, total, tl.where(complete, 0.0, tail / tail_p - total), shift
    else:  # sum w (log q - log p) over the kept ones: q itself is w, or w was drawn and its entropy is known
        weight = _total_weight(given, KINDS)
        if RULE == DRAWN:
            value = tl.load(given.kept.per_row + i) - tl.sum(times(v, u), 0) * LN2
            mass = tl.sum(v, 0)
        else:
            w = tl.exp2(v)
            value = tl.sum(times(w, v - u), 0) * LN2
            mass = tl.sum(w, 0)
        return weight * value, 0.0, weight * mass, 0.0


@triton.jit
def finish_kept(student, given, wanted, stats, i, c, z_at, z_log2, beside, KEPT: tl.constexpr, RULE: tl.constexpr,
                KINDS: tl.constexpr):  # fmt: skip
    """A row's value, written where wanted, and what its gradient needs: (sum student, pull, log2 of q's divisor).

    beside is the sum at tau over the columns that were not kept, under the row's maximum.
    """
    value, sum_student, pull, shift = _outcomes(
        student, given, i, c, z_at, z_log2, tl.log2(beside) - z_log2, KEPT, RULE, KINDS
    )
    spoilt = 0.0
    if given.kept.packed is None:
        spoilt = _spoilt(given, i, KEPT)
    sum_student += spoilt
    pull += spoilt
    if wanted.soft is not None:
        tl.store(wanted.soft + i, value + spoilt)
    if stats is not None:
        tl.store(stats + 4, sum_student)
        tl.store(stats + STATE, pull)
        tl.store(stats + STATE + 1, shift)
    return sum_student, pull, shift


# --- Their gradient ---------------------------------------------------------------------------------------------------


@triton.jit
def kept_gradient(
    student,
    given,
    factors,
    i,
    begin,
    end,
    c,
    c_soft,
    z_at,
    z_log2,
    sum_student,
    pull,
    shift,
    label,
    c_hard,
    c_one,
    one_at,
    one_log2,
    one_from_p,
    smoothed,
    present,
    KEPT: tl.constexpr,
    RULE: tl.constexpr,
    KINDS: tl.constexpr,
    TAU: tl.constexpr,
    TRUNCATED: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """The whole gradient of the kept columns in [begin, end), as it is stored: (ids, which are there, gradient)."""
    ids, used, exact = _entries(given, i, KEPT, RULE)
    v = exact.to(tl.float32)
    here = used & (ids >= begin) & (ids < end)
    z = logits(student, row_of(student, i), tl.where(here, ids, 0), here)
    u = (z - z_at) * c - z_log2
    p = tl.exp2(u)
    if RULE <= RENORM:
        v -= shift
        q = tl.exp2(v)
        of_student = divergences.sum_terms(divergences.student, given, p, q, u, v, (v - u) * LN2, p - q, KINDS)
        g = of_student - p * sum_student
    else:
        w = v
        if RULE != DRAWN:
            w = tl.exp2(v)
        g = p * pull - _total_weight(given, KINDS) * w
    g = tl.where(c_soft == 0.0, 0.0, c_soft * g)
    if factors.hard is not None or factors.z is not None:
        g += of_softmax(z, p, c_one, one_at, one_log2, one_from_p, TAU, TRUNCATED)
    g = less_target(g, z, ids, label, c_hard, smoothed, present, SMOOTH)
    return ids, here, to_stored(student, g, z)
