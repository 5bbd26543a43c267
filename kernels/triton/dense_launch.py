"""Launches the dense kernels: tensors in, tensors filled.

Allocates O(rows), with kept columns O(rows x kept); never asks the device for a value.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from kdfast.kernels.triton import dense, dense_observe, dense_rows, tiles
from kdfast.kernels.triton.dense_kept import RULES
from kdfast.kernels.triton.dense_rows import Cap, Factors, Given, Kept, Rows, Wanted
from kdfast.kernels.triton.divergences import KINDS
from kdfast.kernels.triton.unpack import packed_of
from kdfast.spec.reference import check_ids
from kdfast.spec.values import at_hand, check_memory

LOG2E = dense_rows.LOG2E.value
NO_FACTORS = Factors(None, None, None)


def _rows(x: Tensor) -> Rows | None:
    """Where the rows of (..., V) lie, or None where two leading axes cannot say it."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    axes = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    merged: list[tuple[int, int]] = []
    for n, s in axes:
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    if len(merged) > 2:
        return None
    if len(merged) < 2:
        # One stride says it all. Told by 16 rows at a time, no number here follows the count of rows, of which each
        # kind would be a kernel of its own; and none is 1, which Triton 3.6 loses in a tuple of tuples.
        step = merged[0][1] if merged else 0
        return Rows(x, 16, 16 * step, step)
    (_, outer), (inner, step) = merged
    return Rows(x, inner, outer, step)


def _readable_rows(x: Tensor) -> Rows:
    return _rows(x) or _rows(x.contiguous())  # type: ignore[return-value]


def _cap(x: Any) -> Cap | None:
    """What kernels are told of a :class:`kdfast.spec.head.Cap`."""
    if x.plain:
        return None
    return (
        Cap(x.scale / x.softcap, x.scale, x.softcap, 1 / x.softcap) if x.softcap else Cap(x.scale, x.scale, None, None)
    )


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _check_values(student: Tensor, inputs: Any, tau: float | None, *, elsewhere: bool) -> None:
    """Raise for values that cannot be meant, where they are at hand: on the CPU, or on request."""
    if tau is not None and not tau > 0:
        msg = f"temperature must be > 0, got {tau}"
        raise ValueError(msg)
    if not at_hand(student.device):
        return
    if student.device.type != "cpu" and not inputs.temperature > 0:
        msg = f"temperature must be > 0, got {inputs.temperature.item()}"
        raise ValueError(msg)
    if inputs.kept_ids is not None and inputs.kept_packed is None:  # packed ones were looked at when they were read
        check_ids(inputs.kept_ids if inputs.counted is None else inputs.kept_ids[inputs.counted], inputs.kept_columns)
    if inputs.labels is None:
        return
    y = inputs.labels if inputs.counted is None else inputs.labels[inputs.counted]
    known = (y == dense_rows.NO_LABEL.value) | ((y == dense_rows.ELSEWHERE.value) if elsewhere else False)
    bad = y[~known & ((y < 0) | (y >= student.shape[-1]))]
    if bad.numel():
        msg = f"labels must be in [0, {student.shape[-1]}) or ignore_index, got {bad[0].item()}"
        raise ValueError(msg)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Every launch goes through here, so that a proof without a device can compile instead.

    The device of the tensors must be the current one, see :func:`_on`.

    Fused multiply-adds are asked for: Triton changes its mind about the default between versions.
    """
    kernel[grid](*args, enable_fp_fusion=True, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, which is where Triton launches, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def bytes_per_column(args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """What a launch of the dense kernel reads and writes for each column, in bytes; the cache may spare some of it."""
    student, teachers, grad = args[:3]
    passes: int = sum(options[name] for name in ("PASS_SUMS", "PASS_VALUE", "PASS_GRADIENT"))
    passes += options["SIDED"] and options["PASS_SUMS"]
    read: int = sum(rows.data.element_size() for rows in (student, *teachers))
    written: int = grad.data.element_size() if options["PASS_GRADIENT"] else 0
    return passes * read + written


def padded(kept: int) -> int:
    """Entries of the vector that holds a row's kept columns."""
    return max(16, 1 << max(kept - 1, 0).bit_length())


def _kept(inputs: Any, *, summing: bool) -> Kept | None:
    """The kept columns; their order, which only pass 1 needs, is made by the device."""
    if inputs.kept_ids is None:
        return None
    ids = inputs.kept_ids.contiguous()
    if inputs.kept_packed is not None:
        packed = packed_of(inputs.kept_packed, inputs.kept_columns, inputs.kept_grid)
        values, per_row = inputs.kept_values.contiguous(), _flat(inputs.kept_per_row)
        return Kept(packed, ids, None, values, per_row, inputs.kept_size, inputs.kept_columns)
    return Kept(
        None,
        ids,
        ids.sort(-1).values if summing else None,
        inputs.kept_values.contiguous(),
        _flat(inputs.kept_per_row),
        ids.shape[-1],
        inputs.kept_columns,
    )


class _Call:
    """The launches of one call, which share their inputs and constants."""

    def __init__(
        self,
        student: Tensor,
        inputs: Any,
        tau: float | None,
        *,
        grad: Rows | None = None,
        factors: Factors = NO_FACTORS,
        summing: bool = True,
    ) -> None:
        vocab, n = student.shape[-1], len(inputs.teachers)
        weights = _flat(inputs.teacher_weights)
        self.device, self.rows = student.device, student.numel() // vocab
        self.student, self.grad, self.factors = _readable_rows(student), grad, factors
        self.teachers = tuple(_readable_rows(t) for t in inputs.teachers)
        if inputs.caps:
            mine, *theirs = map(_cap, inputs.caps)
            self.student = self.student._replace(cap=mine)
            self.teachers = tuple(t._replace(cap=cap) for t, cap in zip(self.teachers, theirs, strict=True))
        self.distributions = min(1, n) if inputs.mix_logits else n
        # Whether pass 1 knows the sum of `student`, which the gradient needs.
        self.known = all(name == "forward_kl" for name in inputs.names) or (
            self.distributions == 1 and set(inputs.names) <= {"forward_kl", "reverse_kl"}
        )
        self.given = Given(
            # A number becomes a tensor by a fill on the device, which a CUDA graph can record; a copy it could not.
            temperature=inputs.temperature
            if tau is None
            else torch.full((), tau, dtype=torch.float64, device=self.device),
            columns=inputs.columns if inputs.taught else vocab,
            vocab=vocab,
            weights=tuple(inputs.weights),
            parameters=tuple(inputs.parameters),
            label_smoothing=float(inputs.label_smoothing),
            labels=_flat(inputs.labels),
            counted=_flat(inputs.counted),
            teacher_weights=weights,
            weight_teacher_stride=0 if weights is None else weights.stride(0),
            weight_row_stride=0 if weights is None or weights.dim() == 1 else 1,
            kept=_kept(inputs, summing=summing),
        )
        light = inputs.names in ([], ["forward_kl"])
        self.kept = 0 if self.given.kept is None else padded(self.given.kept.size)
        many = self.distributions > 1 or len(inputs.names) > 1
        kept = "kept many" if self.kept > tiles.FEW_KEPT else "kept"
        capped = not all(cap.plain for cap in inputs.caps) or (many and inputs.sided)
        work = kept if self.kept else "capped" if capped else "many" if many else "light" if light else "other"
        self.tile = tiles.dense_tile(self.device, work, vocab)
        self.splits = tiles.dense_splits(self.device, self.rows, vocab, self.tile)
        needs_one = inputs.labels is not None or factors.hard is not None or factors.z is not None
        known = tau if inputs.taught else 1
        one = dense_rows.TAU_ONE if known == 1 else dense_rows.TAU_TWO if known == 2 else dense_rows.TAU_OTHER
        self.tau = one, needs_one
        self.mix = n if inputs.mix_logits else 0
        self.sided = inputs.sided
        self.cross = self.known and "reverse_kl" in inputs.names
        self.constants = {
            "KINDS": tuple(KINDS[name] for name in inputs.names),
            "DISTRIBUTIONS": self.distributions,
            "KEPT": self.kept,
            "RULE": RULES.get(inputs.tail_rule, 0),
            "TRUNCATED": inputs.taught and inputs.columns < vocab,
            "SMOOTH": inputs.label_smoothing > 0 and inputs.labels is not None,
            "SIDED": self.sided,
        }

    @property
    def saved(self) -> int:
        """Numbers of a row's state."""
        numbers: int = dense_rows.STATE.value + 2 * (self.distributions + (self.kept > 0)) + 4 * self.sided
        return numbers

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty((self.rows, *shape), dtype=torch.float32, device=self.device)

    def passes(
        self,
        wanted: Wanted,
        *,
        sums: Tensor | None = None,
        values: Tensor | None = None,
        summing: bool = False,
        value: bool = False,
        gradient: bool = False,
        joint: bool = False,
    ) -> None:
        """One launch of some passes over every row, or every split."""
        mode, needs_one = self.tau
        needs_one = needs_one or wanted.z2 is not None
        launch(
            dense.dense_kernel,
            (self.rows, self.splits),
            self.student,
            self.teachers,
            self.grad if gradient else None,
            self.given,
            wanted,
            self.factors if gradient else NO_FACTORS,
            sums,
            values,
            BLOCK=self.tile.columns,
            SPLITS=self.splits,
            TAU=(mode if needs_one else dense_rows.TAU_ONE).value,
            MIX=self.mix,
            CROSS=self.cross,
            KNOWN=self.known,
            OBSERVE=summing and wanted.observed is not None,
            PASS_SUMS=summing,
            PASS_VALUE=value,
            PASS_GRADIENT=gradient,
            JOINT_VALUE=joint,
            **self.constants,
            num_warps=self.tile.warps,
        )

    def forward(self, wanted: Wanted) -> None:
        """Per-token values and state, and the gradient where there is memory for one."""
        gradient = self.grad is not None
        value = self.distributions > 0 and (wanted.soft is not None or not self.known)
        joint = value and gradient and self.known and wanted.dtau is None
        value = value and not joint
        if self.splits == 1 and self.distributions <= 1:
            return self.passes(wanted, summing=True, value=value, gradient=gradient, joint=joint)
        if wanted.stats is None:
            wanted = wanted._replace(stats=self._empty(self.saved))
        self.sums(wanted)
        if wanted.observed is not None and self.distributions > 1:
            self._observe_mixture(wanted)
        values = self._empty(self.splits, dense_rows.VALUES.value)
        if value:
            self.passes(wanted, values=values, value=True)
            self._combine_values(wanted, values)
        if gradient:
            self.passes(wanted, values=values, gradient=True, joint=joint)
            if joint:
                self._combine_values(wanted, values)
        return None

    def sums(self, wanted: Wanted) -> None:
        """Pass 1 by splits, and what it amounts to."""
        observe = wanted.observed is not None
        numbers = dense_rows.SUMS.value + 2 * self.distributions + dense_observe.OBSERVED_SUMS.value * observe
        numbers += 4 * self.sided
        sums = self._empty(self.splits, numbers)
        self.passes(wanted, sums=sums, summing=True)
        launch(
            dense.combine_sums_kernel,
            (self.rows,),
            self.student,
            self.teachers if observe else (),
            self.given,
            wanted,
            sums,
            BLOCK=self.tile.columns,
            SPLITS=self.splits,
            MIX=self.mix if observe else 0,
            OBSERVE=observe,
            **self.constants,
            num_warps=min(8, max(1, self.kept // 128)),
        )

    def _observe_mixture(self, wanted: Wanted) -> None:
        launch(
            dense.observe_mixture_kernel,
            (self.rows,),
            self.teachers,
            self.given,
            wanted,
            BLOCK=self.tile.columns,
            DISTRIBUTIONS=self.distributions,
            MIX=self.mix,
            num_warps=self.tile.warps,
        )

    def _combine_values(self, wanted: Wanted, values: Tensor) -> None:
        launch(
            dense.combine_values_kernel,
            (self.rows,),
            self.given,
            wanted,
            values,
            SPLITS=self.splits,
            DISTRIBUTIONS=self.distributions,
            KNOWN=self.known,
            SIDED=self.sided,
            num_warps=1,
        )


def run(
    student: Tensor,
    inputs: Any,
    *,
    soft: Tensor | None = None,
    hard: Tensor | None = None,
    z2: Tensor | None = None,
    dsoft_dtemperature: Tensor | None = None,
    stats: Tensor | None = None,
    grad: Tensor | None = None,
    c_soft: Tensor | None = None,
    c_hard: Tensor | None = None,
    c_z: Tensor | None = None,
    observed: Tensor | None = None,
) -> None:
    """One call of the dense loss; ``stats`` together with ``grad`` is the gradient of an earlier forward call.

    Args:
        student: (..., V) fp32, bf16 or fp16.
        inputs: :class:`kdfast.ops.dense.Inputs`.
        soft: (...) fp32, filled with the distillation term; this and the others None where not wanted.
        hard: (...) fp32, filled with the cross-entropy.
        z2: (...) fp32, filled with logsumexp^2.
        dsoft_dtemperature: (...) fp32, filled with the derivative of ``soft``.
        stats: (..., 6 + 2 distributions and 4 of sides, or 8 with kept columns) fp32, filled by a forward call and read
            by a backward one.
        grad: like student, or the student itself; filled with the gradient.
        c_soft: (...) fp32, factor of the distillation term's gradient.
        c_hard: (...) fp32, factor of the cross-entropy's gradient.
        c_z: (...) fp32, factor of the gradient of logsumexp^2.
        observed: (..., 5) fp64, filled with what metrics are made of.

    Raises:
        ValueError: more kept columns than MOST_KEPT; logits whose memory was freed; and a temperature that is not above
            0, a label or a kept column out of range, or one kept twice, where the values are on the CPU, or anywhere
            with KDFAST_CHECK=1 in the environment.
    """
    packed = inputs.kept_packed is not None
    kept = 0 if inputs.kept_ids is None else inputs.kept_size if packed else inputs.kept_ids.shape[-1]
    most = tiles.MOST_PACKED if packed else tiles.MOST_KEPT
    if kept > most:
        kind = "packed" if packed else "kept"
        msg = f"kdfast: the Triton kernel takes at most {most} {kind} columns a token, got {kept}"
        raise ValueError(msg)
    for name, x in (("student", student), *(("teacher", t) for t in inputs.teachers)):
        check_memory(name, x)  # a backward comes later than the call, which looked at them, too
    tau = inputs.temperature.item() if inputs.temperature.device.type == "cpu" else None
    _check_values(student, inputs, tau, elsewhere=hard is None)
    if student.numel() == 0:
        return
    target = None if grad is None else _rows(grad)
    if grad is not None and target is None:  # the logits' own memory, in a layout that takes more than two strides
        target = _rows(torch.empty(grad.shape, dtype=grad.dtype, device=grad.device))
    factors = Factors(_flat(c_soft), _flat(c_hard), _flat(c_z))
    backward = stats is not None and grad is not None
    call = _Call(student, inputs, tau, grad=target, factors=factors, summing=not backward)
    with _on(student.device):
        if backward:
            call.passes(Wanted(None, None, None, None, stats, None, None), gradient=True)
        else:
            call.forward(Wanted(soft, hard, z2, dsoft_dtemperature, stats, None, observed))
    if grad is not None and target is not None and target.data is not grad:
        grad.copy_(target.data)


def _part(student: Tensor, inputs: Any) -> _Call:
    """A call for the passes one by one."""
    tau = inputs.temperature.item() if inputs.temperature.device.type == "cpu" else None
    call = _Call(student, inputs, tau)
    # The softmax at 1 may be wanted of them all, whether this rank holds the label or not.
    call.tau = call.tau[0], True
    return call


def _scale_of(inputs: Any, like: Tensor) -> Tensor:
    """log2(e) / tau, fp64, on the device."""
    scale: Tensor = LOG2E / inputs.temperature.to(device=like.device, dtype=torch.float64)
    return scale


def sums(student: Tensor, inputs: Any, observed: Tensor | None = None) -> Tensor:
    """Pass 1 over the columns that are here; see :class:`kdfast.ops.dense.Launcher`."""
    shape, device = student.shape[:-1], student.device
    call = _part(student, inputs)
    stats = torch.zeros((*shape, call.saved), dtype=torch.float32, device=device)
    logit_sum = torch.zeros(shape, dtype=torch.float32, device=device)
    if student.numel():
        with _on(device):
            call.sums(Wanted(None, None, None, None, stats, logit_sum, observed))
    s, c = stats.double(), _scale_of(inputs, student)
    at_one = s[..., 2] * LOG2E + s[..., 3]
    at_tau = s[..., 0] * c + s[..., 1] if call.distributions else at_one
    end = dense_rows.STATE.value + 2 * call.distributions
    of_teachers, of_sides = s[..., 6:end:2] * c + s[..., 7:end:2], s[..., end::2] + s[..., end + 1 :: 2]
    return torch.stack(
        [at_tau, at_one, logit_sum.double(), s[..., 5], *of_teachers.unbind(-1), *of_sides.unbind(-1)], -1
    )


def stats_of(totals: Tensor, sum_student: Tensor, inputs: Any) -> Tensor:
    """The kernel's stats from totals over all columns; see :class:`kdfast.ops.dense.Launcher`."""
    c = _scale_of(inputs, totals) if inputs.teachers else LOG2E
    # One logit, near the largest, is subtracted for both of the student's sums, as in the kernel.
    at = torch.where(totals[..., 1].isfinite(), totals[..., 1] / LOG2E, 0.0).float()
    columns = [at, (totals[..., 0] - at.double() * c).float(), at, (totals[..., 1] - at.double() * LOG2E).float()]
    columns += [sum_student.float(), totals[..., 3].float()]
    end = 4 + inputs.softmaxes
    for total in totals[..., 4:end].unbind(-1):
        t_at = torch.where(total.isfinite(), total / c, 0.0).float()
        columns += [t_at, (total - t_at.double() * c).float()]
    for total in totals[..., end:].unbind(-1):
        high = total.float()
        columns += [high, (total - high.double()).float()]
    return torch.stack(columns, -1)


def values(student: Tensor, inputs: Any, totals: Tensor, *, dtemperature: bool) -> Tensor:
    """Pass 2 over the columns that are here; see :class:`kdfast.ops.dense.Launcher`."""
    shape, device = student.shape[:-1], student.device
    call = _part(student, inputs)
    out = torch.zeros((*shape, call.splits, dense_rows.VALUES.value), dtype=torch.float32, device=device)
    if student.numel():
        stats = stats_of(totals, torch.zeros(shape, dtype=torch.float32, device=device), inputs)
        asks = torch.empty(shape, dtype=torch.float32, device=device) if dtemperature else None
        with _on(device):
            call.passes(Wanted(None, None, None, asks, stats, None, None), values=out, value=True)
    return out.sum(-2)


def fresh_gradient(student: Tensor) -> Tensor:
    """Memory for a gradient."""
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def scale(grad: Tensor, factor: Tensor) -> None:
    """``grad *= factor`` in place; the device decides that a factor of 1 needs nothing."""
    if grad.numel() == 0:
        return
    rows = _rows(grad)
    if rows is None:  # the memory of a caller's logits, of which few layouts need more than two strides
        grad.mul_(factor)
        return
    columns = grad.shape[-1]
    tile = tiles.dense_tile(grad.device, "light", columns)
    grid = (grad.numel() // columns, -(-columns // tile.columns))
    with _on(grad.device):
        launch(dense.scale_kernel, grid, rows, factor, columns, BLOCK=tile.columns, num_warps=tile.warps)
