"""What every kernel that selects sparse targets knows of a row: its chunks, their weights, and the order of columns.

A column weighs 2^(x c), c = log2(e) / T. Weights of a chunk are taken relative to 2^r with r = ceil(max x c), a whole
number, so that sums of different chunks are brought under one reference by a power of two, which rounds nothing::

    2^(x c - r) = 2^((x - max) c + f),  f = max c - r in (-1, 0]

Beyond |max c| = 2^23, where numbers are whole by themselves, f is 0. A column with less than 2^-126 of its chunk's
largest weight has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdfast.kernels.triton.dense_rows import or_zero

LN2 = tl.constexpr(0.6931471805599453)
WHOLE = tl.constexpr(8388608.0)  # 2^23, from where on every fp32 number is whole
#: The least of :func:`ordered` that is the order of a column above -inf.
PRESENT = tl.constexpr(0x00800000)
ANY_NUMBER = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr((1 << 63) - 1)  # a key above all
#: Numbers of a row that later kernels read, fp64: max x, logsumexp(x) - max x, log of the sum of weights at the
#: temperature that is drawn at, relative to the largest; and of pps the mass that an entry drawn stands for.
STATE = tl.constexpr(4)
#: And int32: chunks looked at again, columns gathered or kept for certain, the last chunk with weight.
COUNTS = tl.constexpr(3)


@triton.jit
def reference(top, c):
    """(r, f) of a maximum."""
    at = or_zero(top)
    product = at * c
    r = tl.ceil(product)
    return r, tl.where(tl.abs(product) < WHOLE, tl.fma(at, c, -r), 0.0)


@triton.jit
def weight(x, top, c, f):
    """Weight of x relative to 2^r, (r, f) the reference of top."""
    return tl.exp2(tl.fma(x - or_zero(top), c, f))


@triton.jit
def power_of_two(exponent):
    """2^exponent of whole fp32 numbers <= 0, fp64; 0 below the smallest normal one."""
    at = tl.maximum(exponent, -1023.0).to(tl.int64)
    return ((at + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def log1p(x):
    """log(1 + x) of fp64 numbers >= 0, to all digits of a small one: log u is to u - 1 as log1p x is to x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log2(u) * LN2 * (x / (u - 1.0)))


@triton.jit
def ordered(x):
    """Uint32 in the order of fp32 numbers, -0 and 0 alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def packed(order, column):
    """Int64 >= 0 in the order of columns: the larger logit first, the lower id among equals. 0 is no column."""
    return (order.to(tl.int64) << 31) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def column_of(key):
    """The id of a packed key."""
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def logit_of(key):
    """The logit of a packed key, fp32."""
    order = (key >> 31).to(tl.uint32)
    bits = order ^ tl.where((order >> 31) != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)
