"""Every divergence, a tile of columns at a time; the Triton side of :mod:`kdfast.reference`.

With p, q the distributions of student and teacher, u = log2 p, v = log2 q and d = ln q - ln p of a column:

* ``value``    f(q, p), >= 0 and summing to D over the row,
* ``student``  p df/dp, up to a multiple of p, which the gradient does not see: tau dD/dz = student - p * sum student,
* ``teacher``  q df/dq, likewise, needed for dD/dtau only.

``side`` has the sign of p - q: the difference itself, or what keeps its sign where that is rounded away
(``dense_sides.py``).

A column of -inf has p = 0 (q = 0), and d may be infinite or NaN there: each product with d is selected away where its
factor is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Numbers of the divergences, for ``tl.constexpr`` arguments.
KINDS = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jsd": 2,
    "skew_forward_kl": 3,
    "skew_reverse_kl": 4,
    "tvd": 5,
    "alpha_div": 6,
    "hellinger": 7,
}
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
TVD = tl.constexpr(5)
ALPHA_DIV = tl.constexpr(6)
HELLINGER = tl.constexpr(7)

LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1.1754943508222875e-38)
# g(x) = x + expm1(-x) over x^2, abs(x) < 1/8, relative error 8e-6; beyond, the plain form has enough digits.
G0 = tl.constexpr(0.5000000847639212)
G1 = tl.constexpr(-0.16676433148902373)
G2 = tl.constexpr(0.04167209088852112)
SERIES_LIMIT = tl.constexpr(0.125)


@triton.jit
def times(a, b):
    """A * b, where an a of 0 silences whatever b holds."""
    return tl.where(a == 0.0, 0.0, a * b)


@triton.jit
def kl_series(x):
    """g(x) / x^2 near 0."""
    return (G2 * x + G1) * x + G0


@triton.jit
def kl_term(a, b, x):
    """One summand a g(x) of KL(a, b), with x = ln a - ln b: a x + b - a without its cancellation; b where a is 0."""
    x2 = x * x
    near = a * (x2 * kl_series(x))
    far = b + tl.where(a == 0.0, 0.0, a * x - a)
    return tl.where(x2 < SERIES_LIMIT * SERIES_LIMIT, near, far)


@triton.jit
def mixture(a, p, b, q):
    """A * p + b * q; where it underflows neither has a say, and its logarithm must stay finite."""
    m = a * p + b * q
    return tl.where(m < TINY, TINY, m)


@triton.jit
def half_sign(x):
    """sign(x) / 2, sign(0) = 0; NaN stays."""
    return tl.where(x > 0.0, 0.5, tl.where(x < 0.0, -0.5, x - x))


@triton.jit
def value(KIND: tl.constexpr, x, p, q, u, v, d, side):
    """f(q, p) of each column; x is the divergence's parameter."""
    if KIND == FORWARD_KL:
        return kl_term(q, p, d)
    elif KIND == REVERSE_KL:
        return kl_term(p, q, -d)
    elif KIND == JSD:
        m = mixture(x, q, 1.0 - x, p)
        lm = tl.log2(m)
        return x * kl_term(q, m, (v - lm) * LN2) + (1.0 - x) * kl_term(p, m, (u - lm) * LN2)
    elif KIND == SKEW_FORWARD_KL:
        m = mixture(x, q, 1.0 - x, p)
        return kl_term(q, m, (v - tl.log2(m)) * LN2)
    elif KIND == SKEW_REVERSE_KL:
        m = mixture(1.0 - x, q, x, p)
        return kl_term(p, m, (u - tl.log2(m)) * LN2)
    elif KIND == TVD:
        return 0.5 * tl.abs(p - q)
    elif KIND == ALPHA_DIV:
        # (x q + (1 - x) p - q^x p^(1 - x)) / (x (1 - x)), near equality q [(1 - x) g(d) - g((1 - x) d)] / (x (1 - x)),
        # of whose series, term by term, nothing is left to cancel
        y = 1.0 - x
        near = q * (d * d) * ((G2 * (1.0 + y + y * y) * d + G1 * (1.0 + y)) * d + G0)
        far = (x * q + y * p - tl.exp2(x * v + y * u)) / (x * y)
        return tl.where(tl.abs(d) < SERIES_LIMIT, near, tl.where(far < 0.0, 0.0, far))
    else:  # (sqrt p - sqrt q)^2 / 2 = sqrt(p q) (cosh(d / 2) - 1)
        r = tl.exp2(0.5 * (u + v))
        y2 = 0.25 * (d * d)
        near = r * y2 * (y2 * (y2 * (1.0 / 720) + 1.0 / 24) + 0.5)
        far = 0.5 * (p + q) - r
        return tl.where(tl.abs(d) < 2 * SERIES_LIMIT, near, far)


@triton.jit
def student(KIND: tl.constexpr, x, p, q, u, v, d, side):
    """P df/dp of each column."""
    if KIND == FORWARD_KL:
        return -q
    elif KIND == REVERSE_KL:
        return -times(p, d)
    elif KIND == JSD:
        return (1.0 - x) * times(p, (u - tl.log2(mixture(x, q, 1.0 - x, p))) * LN2)
    elif KIND == SKEW_FORWARD_KL:
        return -times(q, (1.0 - x) * p / mixture(x, q, 1.0 - x, p))
    elif KIND == SKEW_REVERSE_KL:
        m = mixture(1.0 - x, q, x, p)
        return times(p, (u - tl.log2(m)) * LN2 - x * p / m)
    elif KIND == TVD:
        return p * half_sign(side)
    elif KIND == ALPHA_DIV:
        return -tl.exp2(x * v + (1.0 - x) * u) / x
    else:
        return -0.5 * tl.exp2(0.5 * (u + v))


@triton.jit
def teacher(KIND: tl.constexpr, x, p, q, u, v, d, side):
    """Q df/dq of each column."""
    if KIND == FORWARD_KL:
        return times(q, d)
    elif KIND == REVERSE_KL:
        return -p
    elif KIND == JSD:
        return x * times(q, (v - tl.log2(mixture(x, q, 1.0 - x, p))) * LN2)
    elif KIND == SKEW_FORWARD_KL:
        m = mixture(x, q, 1.0 - x, p)
        return times(q, (v - tl.log2(m)) * LN2 - x * q / m)
    elif KIND == SKEW_REVERSE_KL:
        return -times(p, (1.0 - x) * q / mixture(1.0 - x, q, x, p))
    elif KIND == TVD:
        return -q * half_sign(side)
    elif KIND == ALPHA_DIV:
        return -tl.exp2(x * v + (1.0 - x) * u) / (1.0 - x)
    else:
        return -0.5 * tl.exp2(0.5 * (u + v))


@triton.jit
def sum_of_student(KIND: tl.constexpr, reverse_kl):
    """Sum of ``student`` over the row, where pass 1 knows it: of forward and of reverse KL, whose value D it is."""
    if KIND == FORWARD_KL:
        return -1.0
    else:
        return reverse_kl


@triton.jit
def sum_terms(part: tl.constexpr, given, p, q, u, v, d, side, KINDS: tl.constexpr):
    """The weighted sum over the divergences of their `part`: value, student or teacher."""
    total = tl.zeros(p.shape, tl.float32)
    for k in tl.static_range(len(KINDS)):
        total += given.weights[k] * part(KINDS[k], given.parameters[k], p, q, u, v, d, side)
    return total
