"""The dense loss as operators: schemas, implementations, fakes and vmap rules.

Two ways through one kernel:

*gradient in forward* (``dense_fused``)
    one call returns the per-token terms and the finished gradient, as the upstream gradient of a scalar loss is nearly
    always 1. Another upstream scales the buffer once, in place. A second backward recomputes.
*statistics* (``dense_forward``, ``dense_backward``)
    forward saves a few numbers per token and backward reads the logits again, under the upstream gradient of each
    token: for per-token losses, fp16 (whose gradient would underflow before a loss scale reached it), torch.compile and
    torch.func.

The operators return D, CE and logsumexp^2 per token, before alpha, tau^2, weights and the reduction. Autograd around
them is in ``dense_autograd``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

import torch
from torch import Tensor

from kdfast.ops.dense.inputs import INPUTS, N_INPUTS, N_OBSERVED, Inputs, Wants, stats_size
from kdfast.views import classes_apart, contiguous_rows, kernel_rows

COEFFICIENTS = "Tensor? c_soft, Tensor? c_hard, Tensor? c_z"
# Last, and with a default: programs that were exported before it was there go on.
OBSERVES = "bool wants_observed=False"

_library = torch.library.Library("kdfast", "DEF")
_library.define(
    f"dense_forward(Tensor student, {INPUTS}, bool wants_z, bool wants_dtau, {OBSERVES}) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor stats, Tensor observed)"
)
_library.define(f"dense_backward(Tensor student, {INPUTS}, Tensor stats, {COEFFICIENTS}) -> Tensor")
_library.define(
    f"dense_fused(Tensor student, {INPUTS}, bool wants_z, bool wants_dtau, {COEFFICIENTS}, {OBSERVES}) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor grad, Tensor observed)"
)
_library.define(
    f"dense_fused_(Tensor(a!) student, {INPUTS}, bool wants_z, bool wants_dtau, {COEFFICIENTS}, {OBSERVES}) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor observed)"
)
_library.define(f"dense_backward_(Tensor(a!) student, {INPUTS}, Tensor stats, {COEFFICIENTS}) -> ()")
_library.define("scale_(Tensor(a!) grad, Tensor factor, str backend) -> ()")
_ops = torch.ops.kdfast


# --- Implementations: memory is taken here, and filled by a backend's launcher ---------------------------------------


class Launcher(Protocol):
    """A module that runs the kernels of one backend."""

    def run(self, student: Tensor, inputs: Inputs, **outputs: Tensor | None) -> None:
        """Fill the named outputs; ``stats`` together with ``grad`` asks for the gradient of an earlier call."""

    def fresh_gradient(self, student: Tensor) -> Tensor:
        """Memory for a gradient."""

    def scale(self, grad: Tensor, factor: Tensor) -> None:
        """``grad *= factor`` in place, with an early exit for a factor of 1."""

    # The passes one by one, for ranks that hold a shard of the columns each. Totals are fp64, (..., 4 + softmaxes of
    # teachers): log2 of the sum of exponentials at tau and at 1; sum and number of the logits that are not -inf, for
    # label smoothing only; log2 of each teacher's sum at tau; and where the inputs are sided, of the student's and the
    # teacher's sum at tau as fp64 has them.

    def sums(self, student: Tensor, inputs: Inputs, observed: Tensor | None = None) -> Tensor:
        """Totals over the columns that are here, and what is observed of them, (..., 5) fp64, where it is given."""

    def values(self, student: Tensor, inputs: Inputs, totals: Tensor, *, dtemperature: bool) -> Tensor:
        """Sums over the columns that are here, (..., 7) fp32, under totals over all columns.

        D; sum student, sum student * log2 p, sum p log2 p; sum teacher, sum teacher * log2 q, sum q log2 q. Those with
        a logarithm are there with ``dtemperature`` only.
        """

    def stats_of(self, totals: Tensor, sum_student: Tensor, inputs: Inputs) -> Tensor:
        """The stats with which ``run`` gives the gradient."""


#: Modules, imported when they are first asked for.
LAUNCHERS = {"cpu": "kdfast.ops.dense.cpu", "triton": "kdfast.kernels.triton.dense_launch"}


@functools.cache
def launcher(backend: str) -> Launcher:
    """The module that runs a backend's kernels."""
    return importlib.import_module(LAUNCHERS[backend])


def _kernel_rows(student: Tensor, inputs: Inputs) -> Tensor:
    return kernel_rows(student) if inputs.backend == "cpu" else contiguous_rows(student)


def token_outputs(student: Tensor, inputs: Inputs, wants: Wants) -> dict[str, Tensor]:
    """Output tensors by the kernel's names; one that the call does not have is :func:`absent`.

    All are (...) fp32, but for ``observed``, (..., 5) fp64.
    """
    taught, leading = inputs.taught, student.shape[:-1]
    there = {
        "soft": taught,
        "hard": inputs.labels is not None,
        "z2": wants.z,
        "dsoft_dtemperature": taught and wants.dtau,
    }
    shapes = {k: leading if yes else (0, 0) for k, yes in there.items()}
    out = {k: torch.empty(s, dtype=torch.float32, device=student.device) for k, s in shapes.items()}
    observed = (*leading, N_OBSERVED) if wants.observed else (0, 0)
    return out | {"observed": torch.empty(observed, dtype=torch.float64, device=student.device)}


def absent(output: Tensor) -> bool:
    """Whether an output of a call stands for something that it does not have: an empty tensor of two axes."""
    return output.shape == (0, 0)


def _run_forward(student: Tensor, inputs: Inputs, wants: Wants, **more: Tensor | None) -> dict[str, Tensor]:
    out = token_outputs(student, inputs, wants)
    launcher(inputs.backend).run(student, inputs, **{k: v for k, v in out.items() if not absent(v)}, **more)
    return out


def wants_of(rest: tuple[Any, ...], between: int = 0) -> tuple[Wants, tuple[Any, ...]]:
    """What is wanted, and the arguments in between; ``rest`` stands behind INPUTS, and may lack OBSERVES."""
    return Wants(*rest[:2], *rest[2 + between :]), rest[2 : 2 + between]


def _last(out: dict[str, Tensor], *more: Tensor) -> tuple[Tensor, ...]:
    """Outputs in the order of the schemas: ``observed``, which came last, behind the others."""
    *terms, observed = out.values()
    return *terms, *more, observed


def _dense_forward(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[:N_INPUTS])
    student = _kernel_rows(student, inputs)
    stats = torch.empty((*student.shape[:-1], stats_size(inputs)), dtype=torch.float32, device=student.device)
    wants, _ = wants_of(args[N_INPUTS:])
    return _last(_run_forward(student, inputs, wants, stats=stats), stats)


def _dense_backward(student: Tensor, *args: Any) -> Tensor:
    inputs = Inputs(*args[:N_INPUTS])
    student = _kernel_rows(student, inputs)
    grad = launcher(inputs.backend).fresh_gradient(student)
    _backward_into(grad, student, *args)
    return grad


def _dense_backward_inplace(student: Tensor, *args: Any) -> None:
    _backward_into(student, student, *args)


def _backward_into(grad: Tensor, student: Tensor, *args: Any) -> None:
    inputs, (stats, c_soft, c_hard, c_z) = Inputs(*args[:N_INPUTS]), args[N_INPUTS:]
    run = launcher(inputs.backend).run
    run(student, inputs, stats=stats, grad=grad, c_soft=c_soft, c_hard=c_hard, c_z=c_z)


def _dense_fused(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[:N_INPUTS])
    student = _kernel_rows(student, inputs)
    grad = launcher(inputs.backend).fresh_gradient(student)
    return _last(_fused_into(grad, student, *args), grad)


def _dense_fused_inplace(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _last(_fused_into(student, student, *args))


def _fused_into(grad: Tensor, student: Tensor, *args: Any) -> dict[str, Tensor]:
    inputs, (wants, (c_soft, c_hard, c_z)) = Inputs(*args[:N_INPUTS]), wants_of(args[N_INPUTS:], 3)
    return _run_forward(student, inputs, wants, grad=grad, c_soft=c_soft, c_hard=c_hard, c_z=c_z)


def _scale_inplace(grad: Tensor, factor: Tensor, backend: str) -> None:
    launcher(backend).scale(grad, factor)


for _device in ("CPU", "CUDA"):
    _library.impl("dense_forward", _dense_forward, _device)
    _library.impl("dense_backward", _dense_backward, _device)
    _library.impl("dense_backward_", _dense_backward_inplace, _device)
    _library.impl("dense_fused", _dense_fused, _device)
    _library.impl("dense_fused_", _dense_fused_inplace, _device)
    _library.impl("scale_", _scale_inplace, _device)


# --- Fakes: the shapes and strides that the implementations allocate --------------------------------------------------


def _fake_forward(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, (wants, _) = Inputs(*args[:N_INPUTS]), wants_of(args[N_INPUTS:])
    stats = student.new_empty((*student.shape[:-1], stats_size(inputs)), dtype=torch.float32)
    return _last(token_outputs(student, inputs, wants), stats)


def _fake_fused(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _last(_fake_outputs(student, args), _fake_gradient(student, *args))


def _fake_gradient(student: Tensor, *args: Any) -> Tensor:
    apart = Inputs(*args[:N_INPUTS]).backend == "cpu" and classes_apart(student)
    return torch.empty_like(student) if apart else student.new_empty(student.shape)


def _fake_outputs(student: Tensor, args: tuple[Any, ...]) -> dict[str, Tensor]:
    return token_outputs(student, Inputs(*args[:N_INPUTS]), wants_of(args[N_INPUTS:], 3)[0])


torch.library.register_fake("kdfast::dense_forward", _fake_forward)
torch.library.register_fake("kdfast::dense_backward", _fake_gradient)
torch.library.register_fake("kdfast::dense_backward_", lambda *_: None)
torch.library.register_fake("kdfast::dense_fused", _fake_fused)
torch.library.register_fake("kdfast::dense_fused_", lambda student, *args: _last(_fake_outputs(student, args)))
torch.library.register_fake("kdfast::scale_", lambda *_: None)


# --- vmap: a mapped axis is one more leading axis ---------------------------------------------------------------------


def _to_front(x: Any, dim: int | None, batch: int, axis: int = 0) -> Any:
    """``x`` with its mapped axis at ``axis``, expanded there where it has none."""
    if not isinstance(x, Tensor):
        return x
    return x.unsqueeze(axis).expand(*x.shape[:axis], batch, *x.shape[axis:]) if dim is None else x.movedim(dim, axis)


def _batched(op: Any, outputs: int) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], student: Tensor, *args: Any) -> tuple[Any, Any]:
        batch = info.batch_size
        inputs, rest = Inputs(*args[:N_INPUTS]), args[N_INPUTS:]
        dims, rest_dims = Inputs(*in_dims[1 : 1 + N_INPUTS]), in_dims[1 + N_INPUTS :]
        if dims.temperature is not None:
            msg = "vmap over the temperature is not supported by the kernels: use backend='reference'"
            raise NotImplementedError(msg)
        weights = inputs.teacher_weights
        if weights is not None and (weights.dim() > 1 or dims.teacher_weights is not None):
            weights = _to_front(weights, dims.teacher_weights, batch, axis=1)
            if weights.dim() == 2 and student.dim() - (in_dims[0] is not None) > 1:  # (n, B): one weight for all tokens
                leading = student.dim() - (in_dims[0] is not None) - 1
                weights = weights.reshape(*weights.shape, *[1] * leading).expand(
                    -1, -1, *[s for k, s in enumerate(student.shape[:-1]) if k != in_dims[0]]
                )
        moved = inputs._replace(
            teachers=[
                _to_front(t, d, batch) for t, d in zip(inputs.teachers, dims.teachers or [None] * 99, strict=False)
            ],
            teacher_weights=weights,
            labels=_to_front(inputs.labels, dims.labels, batch),
            counted=_to_front(inputs.counted, dims.counted, batch),
            kept_ids=_to_front(inputs.kept_ids, dims.kept_ids, batch),
            kept_values=_to_front(inputs.kept_values, dims.kept_values, batch),
            kept_per_row=_to_front(inputs.kept_per_row, dims.kept_per_row, batch),
        )
        result = op(
            _to_front(student, in_dims[0], batch),
            *moved.arguments,
            *(_to_front(x, d, batch) for x, d in zip(rest, rest_dims, strict=True)),
        )
        return result, (0 if outputs == 1 else (0,) * outputs)

    return rule


torch.library.register_vmap("kdfast::dense_forward", _batched(_ops.dense_forward, 6))
torch.library.register_vmap("kdfast::dense_backward", _batched(_ops.dense_backward, 1))
torch.library.register_vmap("kdfast::dense_fused", _batched(_ops.dense_fused, 6))
