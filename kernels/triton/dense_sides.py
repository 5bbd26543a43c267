"""On which side of q each p lies, for the total variation, whose gradient is a sign.

p_i > q_i exactly where z_i - t_i > D = tau (logsumexp(z / tau) - logsumexp(t / tau)). z_i - t_i is two floats without
any rounding, and D is made of sums in fp64, of relative error 2e-12, under the very log2(e) / tau. So a sign is right
where ln p - ln q, which is (z_i - t_i - D) / tau, is further from 0 than 1e-11 + 5e-15 abs(z) / tau.

The sums take a pass of their own, after the maxima are known: registers would not hold fp64 beside the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton.dense_rows import INF, LOG2E, logits, or_zero, row_of, teacher_tile, tiles_of


@triton.jit
def exact_scale(given):
    """log2(e) / tau, fp64; NaN for a temperature that is not above 0."""
    tau = tl.load(given.temperature).to(tl.float64)
    return tl.full([], LOG2E, tl.float64) / tl.where(tau > 0.0, tau, float("nan"))


@triton.jit
def exp2_exact(x):
    """2^x in fp64, relative error 2e-12; 2^-1000 below that. Adding 1.5 * 2^52 leaves the whole part in the low bits.

    A GPU's own would be to the last bit, and slow where fp64 is.
    """
    x = tl.where(x < -1000.0, -1000.0, x)
    shifted = x + 6755399441055744.0
    r = x - (shifted - 6755399441055744.0)
    p = r * 1.325497460306718e-06 + 1.531007807039615e-05
    p = p * r + 0.000154034570394104
    p = p * r + 0.0013333450573018062
    p = p * r + 0.009618129157656703
    p = p * r + 0.055504109412010456
    p = p * r + 0.24022650695821055
    p = p * r + 0.6931471805459343
    p = p * r + 0.9999999999999997
    return p * ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def log2_exact(x):
    """Log2 of a sum that fp32 holds, absolute error 3e-12: fp32's, and a step of Newton's."""
    y = tl.log2(x.to(tl.float32)).to(tl.float64)
    e = x * exp2_exact(-y) - 1.0
    return y + (e - 0.5 * e * e) * LOG2E


@triton.jit
def sum_sides(
    student,
    teachers,
    given,
    i,
    split,
    z_top,
    t_top,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """fp64 sums of 2^((x - top) log2(e) / tau) of student and teacher."""
    c = exact_scale(given)
    row = row_of(student, i)
    first, last = tiles_of(given.columns, split, BLOCK, SPLITS)
    at = or_zero(z_top).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for back in range(last - first):
        offsets = (last - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        z = logits(student, row, offsets, offsets < given.columns)
        total += exp2_exact((z.to(tl.float64) - at) * c)
    of_z = tl.sum(total, 0)
    at = or_zero(t_top).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for j in range(first, last):
        offsets = j * BLOCK + tl.arange(0, BLOCK)
        t = teacher_tile(teachers, given, i, offsets, offsets < given.columns, 0, MIX)
        total += exp2_exact((t.to(tl.float64) - at) * c)
    return of_z, tl.sum(total, 0)


@triton.jit
def store_halves(to, x):
    """An fp64 number as two of fp32."""
    high = x.to(tl.float32)
    tl.store(to, high)
    tl.store(to + 1, (x - high.to(tl.float64)).to(tl.float32))


@triton.jit
def load_halves(at):
    """The same, read."""
    return tl.load(at).to(tl.float64) + tl.load(at + 1).to(tl.float64)


@triton.jit
def halved(x):
    """An fp64 number as two of fp32 hold it."""
    high = x.to(tl.float32).to(tl.float64)
    return high + (x - high).to(tl.float32).to(tl.float64)


@triton.jit
def log2_of(top, total, given):
    """log2 of the sum over a row, as it is saved."""
    return halved(or_zero(top).to(tl.float64) * exact_scale(given) + log2_exact(total))


@triton.jit
def offset_of(z_log2, t_log2, given):
    """D as two floats."""
    d = (z_log2 - t_log2) / exact_scale(given)
    high = d.to(tl.float32)
    return high, (d - high.to(tl.float64)).to(tl.float32)


@triton.jit
def side_of(z, t, p, q, high, low):
    """What has the sign of p - q: z - t as difference and rounding error (Knuth), less D.

    Where a logit is infinite, p or q is 0, and their difference has their sign.
    """
    s = z - t
    back = s - z
    error = (z - (s - back)) - (t + back)
    side = (s - high) + (error - low)
    return tl.where(tl.abs(side) < INF, side, p - q)
