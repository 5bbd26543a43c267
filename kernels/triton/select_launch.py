"""Launches the selection of sparse targets: logits in, tensors filled. Never asks the device for a value.

Scratch beside the logits: for each chunk of columns its maximum, in their dtype, and 2 bytes; to draw 12 bytes more.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.kernels.triton import dense_launch, select, select_draw, select_rows, tiles
from kdfast.kernels.triton.dense_rows import LOG2E, Rows

#: Chunks that a program holds in registers, and columns of a row that follow from them.
MOST_CHUNKS = 4096
MOST_COLUMNS = 1 << 24
#: Entries of a row, which one program sorts.
MOST_K = 2048

_CHUNK, _LEAST_CHUNK = 64, 8
_GROUP = 1024  # columns of chunks that are read again at a time
_POINTS = 1024  # columns in which points are looked for at a time
#: Leading bits of the order of fp32 numbers that tell logits of a dtype apart; for fp32 enough to leave few in doubt.
_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 24}


def bytes_per_column(args: tuple[Any, ...], _: dict[str, Any]) -> int:
    """What the scan reads for each column, in bytes; what it writes for a chunk is left out."""
    logits: Rows = args[0]
    size: int = logits.data.element_size()
    return size


class Plan(NamedTuple):
    """Which exponentials serve which temperatures: one serves T and, squared, T / 2."""

    scales: tuple[float, ...]  # c of each exponential
    slot: tuple[int, ...]  # of each exponential's sum
    squared: tuple[bool, ...]  # whether the next slot is for its squares
    slots: int
    # of each temperature asked for, and of 1 after them
    slot_of: tuple[int, ...]
    exponential: tuple[int, ...]
    factor: tuple[int, ...]  # 1, or 2 for squares


def plan(temperatures: tuple[float, ...], *, drawn: bool) -> Plan:
    """Exponentials for some temperatures and 1; where entries are ``drawn``, the first is of the first temperature."""
    wanted = list(dict.fromkeys([*temperatures, 1.0]))
    if not drawn:
        wanted.sort(reverse=True)
    bases: list[float] = []
    squares: set[float] = set()
    for t in wanted:
        if 2 * t in bases:
            squares.add(2 * t)
        else:
            bases.append(t)
    serves: dict[float, tuple[int, int, int]] = {}
    first: list[int] = []
    for e, t in enumerate(bases):
        first.append(len(serves))
        serves[t] = len(serves), e, 1
        if t in squares:
            serves[t / 2] = len(serves), e, 2
    slot_of, exponential, factor = zip(*(serves[t] for t in (*temperatures, 1.0)), strict=True)
    return Plan(
        scales=tuple(LOG2E.value / t for t in bases),
        slot=tuple(first),
        squared=tuple(t in squares for t in bases),
        slots=len(serves),
        slot_of=slot_of,
        exponential=exponential,
        factor=factor,
    )


def chunk_width(columns: int, k: int) -> int:
    """Columns of a chunk: several chunks for each entry, so that few columns reach the floor, and never too many."""
    width = _CHUNK
    while width > _LEAST_CHUNK and columns < 4 * k * width:
        width //= 2
    while columns > MOST_CHUNKS * width:
        width *= 2
    return width


def _power(n: int, least: int = 1) -> int:
    """The power of two that is enough for n."""
    return max(least, 1 << (n - 1).bit_length())


def _warps(elements: int) -> int:
    """Of a program that holds so many numbers in registers."""
    return min(8, max(1, elements // 512))


class _Call:
    """The launches of one call, which share their inputs and scratch."""

    def __init__(self, logits: Tensor, request: Any, out: Any) -> None:
        self.request, self.out = request, out
        self.columns = logits.shape[-1]
        self.rows = logits.numel() // self.columns
        self.device, self.dtype = logits.device, logits.dtype
        self.logits: Rows = dense_launch._readable_rows(logits)
        self.k = min(request.most, self.columns)
        self.chunk = chunk_width(self.columns, self.k)
        self.tile = tiles.select_tile(self.device, self.chunk, self.columns)
        self.chunks, self.tiles = -(-self.columns // self.chunk), -(-self.columns // self.tile.columns)
        self.plan = plan(request.temperatures, drawn=request.sampled)
        self.room = _power(2 * request.most, 256)
        self.maxima = self._empty(logits.dtype, self.chunks)
        self.tops = self._empty(torch.float32, self.tiles)
        self.sums = self._empty(torch.float32, self.tiles, self.plan.slots)
        self.chunk_sums = self._empty(torch.float32, self.chunks) if request.sampled else None
        self.state = self._empty(torch.float64, select_rows.STATE.value)
        self.counts = self._empty(torch.int32, select_rows.COUNTS.value)
        self.normalise = {
            "TILES": _power(self.tiles),
            "SLOTS": self.plan.slots,
            "SLOT_OF": self.plan.slot_of,
            "EXPONENTIAL": self.plan.exponential,
            "FACTOR": self.plan.factor,
        }

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((self.rows, *shape), dtype=dtype, device=self.device)

    def scan(self) -> None:
        """The one read of the logits."""
        dense_launch.launch(
            select.scan_kernel,
            (self.rows, self.tiles),
            self.logits,
            self.maxima,
            self.tops,
            self.sums,
            self.chunk_sums,
            self.plan.scales,
            self.columns,
            self.chunks,
            BLOCK=self.tile.columns,
            CHUNK=self.chunk,
            SLOT=self.plan.slot,
            SQUARED=self.plan.squared,
            SLOTS=self.plan.slots,
            num_warps=self.tile.warps,
        )

    def largest(self) -> None:
        """Log-normalisers, and keys of the columns that hold the k largest."""
        self.floors = self._empty(torch.int64)
        self.reached = self._empty(torch.int16, self.chunks)
        self.keys = self._empty(torch.int64, self.room)
        dense_launch.launch(
            select.floor_kernel,
            (self.rows,),
            self.maxima,
            self.tops,
            self.sums,
            self.plan.scales,
            self.out.lse,
            self.state,
            self.floors,
            self.reached,
            self.counts,
            self.chunks,
            self.tiles,
            self.k,
            CHUNKS=_power(self.chunks),
            BITS=_BITS[self.dtype],
            **self.normalise,
            num_warps=_warps(_power(self.chunks)),
        )
        dense_launch.launch(
            select.gather_kernel,
            (self.rows,),
            self.logits,
            self.state,
            self.floors,
            self.reached,
            self.counts,
            self.keys,
            self.columns,
            self.chunks,
            self.k,
            GROUP=max(1, _GROUP // self.chunk),
            CHUNK=self.chunk,
            ROOM=self.room,
            num_warps=4,
        )

    def keep(self) -> None:
        """Entries of topk and topp."""
        request, out = self.request, self.out
        p = ctypes.c_float(request.p).value
        dense_launch.launch(
            select.keep_kernel,
            (self.rows,),
            self.keys,
            self.counts,
            self.state,
            out.ids,
            out.logprobs,
            out.k_eff,
            self.columns,
            request.most,
            request.least,
            (p, request.p - p),
            ROOM=self.room,
            BY_MASS=request.method == "topp",
            num_warps=_warps(self.room),
        )

    def draw(self, first_token: int) -> None:
        """Entries of sample and pps."""
        request, out = self.request, self.out
        systematic = request.method == "pps"
        drawn = self._empty(torch.int32, request.most)
        limits = None
        if systematic:
            limits = self._empty(torch.int64)
            dense_launch.launch(
                select_draw.certain_kernel,
                (self.rows,),
                self.logits,
                self.maxima,
                self.chunk_sums,
                self.plan.scales,
                self.state,
                self.floors,
                self.reached,
                self.counts,
                self.keys,
                limits,
                drawn,
                self.columns,
                self.chunks,
                request.most,
                CHUNKS=_power(self.chunks),
                GROUP=max(1, _GROUP // self.chunk),
                CHUNK=self.chunk,
                ROOM=self.room,
                num_warps=4,
            )
        prefix = self._empty(torch.float64, self.chunks)
        dense_launch.launch(
            select_draw.prefix_kernel,
            (self.rows,),
            self.maxima,
            self.tops,
            self.sums,
            self.chunk_sums,
            self.plan.scales,
            out.lse,
            self.state,
            self.counts,
            prefix,
            self.chunks,
            self.tiles,
            CHUNKS=_power(self.chunks),
            SYSTEMATIC=systematic,
            **self.normalise,
            num_warps=_warps(_power(self.chunks)),
        )
        points = max(1, _POINTS // self.chunk)
        dense_launch.launch(
            select_draw.locate_kernel,
            (self.rows, -(-request.most // points)),
            self.logits,
            self.maxima,
            self.plan.scales,
            self.state,
            self.counts,
            prefix,
            limits,
            drawn,
            self.columns,
            self.chunks,
            request.most,
            request.seed,
            first_token,
            POINTS=points,
            CHUNK=self.chunk,
            STEPS=self.chunks.bit_length(),
            SYSTEMATIC=systematic,
            num_warps=1,
        )
        room = _power(request.most)
        dense_launch.launch(
            select_draw.order_kernel, (self.rows,), drawn, request.most, ROOM=room, num_warps=_warps(room)
        )
        dense_launch.launch(
            select_draw.write_kernel,
            (self.rows,),
            self.logits,
            drawn,
            self.state,
            limits,
            self.plan.scales,
            out.ids,
            out.logprobs,
            out.mass,
            out.k_eff,
            out.neg_entropy,
            self.columns,
            request.most,
            ROOM=room,
            STEPS=request.most.bit_length(),
            SYSTEMATIC=systematic,
            num_warps=_warps(room),
        )


def run(logits: Tensor, request: Any, first_token: int, out: Any) -> None:
    """Fill targets of logits (..., V) fp32, bf16 or fp16, tokens numbered from ``first_token``.

    Args:
        logits: on a GPU, or on the CPU under the interpreter; any strides.
        request: :class:`kdfast.spec.selection.Request`, with k up to :data:`MOST_K`.
        first_token: number of the first token, for draws.
        out: :class:`kdfast.spec.selection.Selected`, contiguous.
    """
    if logits.numel() == 0:
        return
    call = _Call(logits, request, out)
    with dense_launch._on(logits.device):
        call.scan()
        if request.method != "sample":
            call.largest()
        if request.sampled:
            call.draw(first_token)
        else:
            call.keep()
