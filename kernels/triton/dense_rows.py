"""What every pass of the dense loss knows of a row: where it lies, what is asked of it, and how a tile is read."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
NO_LABEL = tl.constexpr(-(2**63))
ELSEWHERE = tl.constexpr(-(2**63) + 1)  # a label in a column that another rank holds

# How softmax(z) follows from softmax(z / tau): equal, by squaring, or by an exponential of its own.
TAU_ONE = tl.constexpr(0)
TAU_TWO = tl.constexpr(1)
TAU_OTHER = tl.constexpr(2)

# Floats of a row, each followed by (max t, log2 sum or sum) of each distribution where it says so.
# max z, log2 sum at tau; max z, log2 sum at 1; sum student; columns present; distributions, or (pull, log2 of what q is
# divided by) of kept columns; with SIDED, (high, low) of log2 sums in fp64 of student and teacher
STATE = tl.constexpr(6)
# max z, sum at tau, at 1, cross, or at tau beside the kept columns; sum z - max, columns present; and of the columns
# beyond the taught ones max z, sum at 1, sum z - max, columns present; distributions
SUMS = tl.constexpr(10)
VALUES = tl.constexpr(7)  # value; student, student u, p u; teacher, teacher v, q v


class Cap(NamedTuple):
    """How logits follow from what is stored of them, x: softcap tanh(rate x), or rate x without a softcap.

    A column of -inf stays one, and has no gradient.
    """

    rate: float  # scale / softcap, or scale
    scale: float
    softcap: Any  # None: none
    inverse: Any  # 1 / softcap


class Rows(NamedTuple):
    """Where the rows of a (..., V) tensor lie: row i at (i // inner) * outer_stride + (i % inner) * inner_stride."""

    data: Any
    inner: int
    outer_stride: int
    inner_stride: int
    cap: Any = None  # Cap; None: logits are stored as they are


class Kept(NamedTuple):
    """A teacher's kept columns; tensors are contiguous."""

    packed: Any  # unpack.Packed, whose entries each program unpacks by itself; None: they lie in memory
    ids: Any  # (rows, size) int32; negative: none. Packed: (rows, 2), offset and number of entries
    ordered: Any  # the same, each row ascending; None where only the gradient is left to do, and packed
    content: Any  # (rows, size) fp32: log q at temperature 1, nats, or a drawn weight. Packed: (rows,), of entry 0
    per_row: Any  # (rows,) fp32: log-normaliser at tau, None: 0; of drawn ones, negative entropy
    size: int
    columns: int  # that the teacher had


class Given(NamedTuple):
    """What every pass is told. Tensors per row are contiguous; None where there is no such thing.

    A tuple within stands first: Triton 3.6 would take a number of it that is 1, a constant therefore, for None in loops
    if no constant came after it, such as the teachers' weights, of which there are none where there is `kept`.
    """

    kept: Any  # Kept, in place of teachers
    temperature: Any  # 0-d
    columns: int  # of the distillation term
    vocab: int  # of the student
    weights: tuple[float, ...]  # of the divergences, and their parameters
    parameters: tuple[float, ...]
    label_smoothing: float
    labels: Any  # int64
    counted: Any  # bool
    teacher_weights: Any  # of teacher k in row i: at k * weight_teacher_stride + i * weight_row_stride
    weight_teacher_stride: int
    weight_row_stride: int


class Wanted(NamedTuple):
    """What a forward call writes, per row, and the state by row that later passes read."""

    soft: Any
    hard: Any
    z2: Any
    dtau: Any
    stats: Any
    logit_sum: Any
    observed: Any  # (rows, 5) fp64


class Factors(NamedTuple):
    """What the gradient of each term is multiplied by, per row."""

    soft: Any
    hard: Any
    z: Any


@triton.jit
def row_of(rows, i):
    """The address of row i."""
    return rows.data + (i // rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride


@triton.jit
def load(row, offsets, mask):
    """Logits as fp32; a column beyond the end is one without mass."""
    return tl.load(row + offsets, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def tanh(x):
    """Relative error 3e-7: a polynomial where the exponentials would cancel."""
    size, square = tl.abs(x), x * x
    e = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = 2.06390887954e-2 - 5.70498872745e-3 * square
    y = y * square - 5.37397155531e-2
    y = y * square + 1.33314422036e-1
    y = y * square - 3.33332819422e-1
    return tl.where(size < 0.625, x + x * square * y, tl.where(x < 0.0, -far, far))


@triton.jit
def logits(rows, row, offsets, mask):
    """The same of a row of ``rows``, through its cap."""
    x = load(row, offsets, mask)
    if rows.cap is not None:
        z = x * rows.cap.rate
        if rows.cap.softcap is not None:
            z = rows.cap.softcap * tanh(z)
        x = tl.where(x == -INF, -INF, z)
    return x


@triton.jit
def to_stored(rows, g, z):
    """The gradient of what is stored from that of logits z."""
    if rows.cap is not None:
        slope = rows.cap.scale
        if rows.cap.softcap is not None:
            y = z * rows.cap.inverse
            slope = slope * ((1.0 - y) * (1.0 + y))
        g = tl.where(z == -INF, 0.0, g * slope)
    return g


@triton.jit
def scalar(x: tl.constexpr):
    """A number as fp32, for a variable that a loop changes."""
    return tl.full([], x, tl.float32)


@triton.jit
def or_zero(x):
    """A maximum to subtract: a row of -inf alone has none, and -inf - -inf would be NaN."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def exponent_scale(given):
    """log2(e) / tau; NaN for a temperature that is not above 0."""
    tau = tl.load(given.temperature).to(tl.float32)
    return LOG2E / tl.where(tau > 0.0, tau, float("nan"))


@triton.jit
def tiles_of(columns, split, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """The tiles [first, last) of a split."""
    tiles = tl.cdiv(columns, BLOCK)
    each = tl.cdiv(tiles, SPLITS)
    first = tl.minimum(split * each, tiles)
    return first, tl.minimum(first + each, tiles)


@triton.jit
def teacher_tile(teachers, given, i, offsets, mask, K: tl.constexpr, MIX: tl.constexpr):
    """Logits of distribution K: a teacher's own, or the weighted sum of all, whose number MIX is then."""
    if MIX:
        total = tl.zeros(offsets.shape, tl.float32)
        for k in tl.static_range(MIX):  # len(teachers), which Triton 3.6 does not know in a loop
            w = tl.load(given.teacher_weights + k * given.weight_teacher_stride + i * given.weight_row_stride)
            total += tl.where(w == 0.0, 0.0, w * logits(teachers[k], row_of(teachers[k], i), offsets, mask))
        return tl.where(mask, total, -INF)
    else:
        return logits(teachers[K], row_of(teachers[K], i), offsets, mask)
