r"""The dense loss as operators: schemas, fakes, vmap rules, the CPU implementation, and autograd around them.

Two ways through one kernel, chosen by :func:`distill_loss`:

*gradient in forward* (``dense_fused``)
    one call returns the per-token terms and the finished gradient, as the upstream gradient of a scalar loss is nearly always 1.
    Another upstream scales the buffer once, in place. A second backward recomputes.
*statistics* (``dense_forward``, ``dense_backward``)
    forward saves a few numbers per token and backward reads the logits again, under the upstream gradient of each token: for
    per-token losses, fp16 (whose gradient underflows before a loss scale could reach it), torch.compile and torch.func.

The operators return D, CE and logsumexp^2 per token. Weights, alpha, tau^2 and the reduction are plain PyTorch on (N,) vectors,
shared with the reference, so their gradients come from autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import reference
from kdfast.divergence import Term
from kdfast.problem import Problem
from kdfast.reference import DistillTerms, TokenTerms

try:
    from kdfast import _core
except ImportError as error:  # a source tree without its extension; `unavailable` says so where it matters
    _core = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.bool: "bool",
}

# Arguments that every operator takes. student (..., V); teachers (..., >= columns) each; teacher_weights (n,) or (n, ...) fp32;
# labels (...) int64; counted (...) bool; temperature 0-d; c_soft, c_hard, c_z (...) fp32.
_INPUTS = (
    "Tensor[] teachers, Tensor? teacher_weights, Tensor? labels, Tensor? counted, Tensor temperature, "
    "str[] names, float[] weights, float[] parameters, bool mix_logits, int columns, float label_smoothing"
)
_COEFFICIENTS = "Tensor? c_soft, Tensor? c_hard, Tensor? c_z"

_library = torch.library.Library("kdfast", "DEF")
_library.define(
    f"dense_forward(Tensor student, {_INPUTS}, bool wants_z, bool wants_dtau) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor stats)"
)
_library.define(f"dense_backward(Tensor student, {_INPUTS}, Tensor stats, {_COEFFICIENTS}) -> Tensor")
_library.define(
    f"dense_fused(Tensor student, {_INPUTS}, bool wants_z, bool wants_dtau, {_COEFFICIENTS}) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau, Tensor grad)"
)
_library.define(
    f"dense_fused_(Tensor(a!) student, {_INPUTS}, bool wants_z, bool wants_dtau, {_COEFFICIENTS}) "
    "-> (Tensor soft, Tensor hard, Tensor z2, Tensor dtau)"
)
_library.define(f"dense_backward_(Tensor(a!) student, {_INPUTS}, Tensor stats, {_COEFFICIENTS}) -> ()")
_library.define("scale_(Tensor(a!) grad, Tensor factor) -> ()")
_ops = torch.ops.kdfast


class Inputs(NamedTuple):
    """The arguments in ``_INPUTS``, in order."""

    teachers: list[Tensor]
    teacher_weights: Tensor | None
    labels: Tensor | None
    counted: Tensor | None
    temperature: Tensor
    names: list[str]
    weights: list[float]
    parameters: list[float]
    mix_logits: bool
    columns: int
    label_smoothing: float


_N_INPUTS = len(Inputs._fields)


def _stats_size(inputs: Inputs) -> int:
    """Numbers saved per token, in the kernel's layout: 6 of the student, 2 of each softmax of a teacher."""
    softmaxes = 1 if inputs.mix_logits and inputs.teachers else len(inputs.teachers)
    return 6 + 2 * softmaxes


# --- CPU --------------------------------------------------------------------------------------------------------------


def _view(x: Tensor) -> _core.View:
    return _core.View(x.data_ptr(), _DTYPE_NAMES[x.dtype], x.shape, x.stride())


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows: itself, unless its last axis is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _call(student: Tensor, inputs: Inputs, **outputs: Tensor | None) -> None:
    """Run the kernel; ``outputs`` are its named outputs and coefficients, (...) or (..., V) tensors or None."""
    backward = outputs.get("stats") is not None and outputs.get("grad") is not None
    labels, counted, weights = (x if x is None else x.contiguous() for x in (inputs.labels, inputs.counted, inputs.teacher_weights))
    teachers = [_rows(t) for t in inputs.teachers]
    held = {k: v if k == "grad" else v.contiguous() for k, v in outputs.items() if v is not None}
    _core.dense(
        backward=backward,
        student=_view(student),
        teachers=[_view(t) for t in teachers],
        teacher_weights=None if weights is None else _view(weights),
        labels=None if labels is None else _view(labels),
        counted=None if counted is None else _view(counted),
        temperature=inputs.temperature.item(),
        names=inputs.names,
        weights=inputs.weights,
        parameters=inputs.parameters,
        mix_logits=inputs.mix_logits,
        columns=inputs.columns,
        label_smoothing=inputs.label_smoothing,
        threads=torch.get_num_threads(),
        **{k: _view(v) for k, v in held.items()},
    )


def _per_token(student: Tensor) -> Tensor:
    return torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)


def _fresh_gradient(student: Tensor) -> Tensor:
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _core.advise_huge_pages(_view(grad))
    return grad


def _token_outputs(student: Tensor, inputs: Inputs, wants_z: bool, wants_dtau: bool) -> dict[str, Tensor]:
    """Output tensors by the kernel's names; a term that the call does not have is an empty tensor of two axes."""
    taught = bool(inputs.teachers)
    there = {
        "soft": taught,
        "hard": inputs.labels is not None,
        "z2": wants_z,
        "dsoft_dtemperature": taught and wants_dtau,
    }
    shapes = {k: student.shape[:-1] if yes else (0, 0) for k, yes in there.items()}
    return {k: torch.empty(s, dtype=torch.float32, device=student.device) for k, s in shapes.items()}


def _run_forward(student: Tensor, inputs: Inputs, wants: tuple[bool, bool], **more: Tensor | None) -> tuple[Tensor, ...]:
    out = _token_outputs(student, inputs, *wants)
    _call(student, inputs, **{k: v for k, v in out.items() if v.shape == student.shape[:-1]}, **more)
    return tuple(out.values())


def _dense_forward(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, student = Inputs(*args[:_N_INPUTS]), _rows(student)
    stats = torch.empty((*student.shape[:-1], _stats_size(inputs)), dtype=torch.float32)
    return *_run_forward(student, inputs, args[_N_INPUTS:], stats=stats), stats


def _dense_backward(student: Tensor, *args: Any) -> Tensor:
    student = _rows(student)
    grad = _fresh_gradient(student)
    _backward_into(grad, student, *args)
    return grad


def _dense_backward_inplace(student: Tensor, *args: Any) -> None:
    _backward_into(student, student, *args)


def _backward_into(grad: Tensor, student: Tensor, *args: Any) -> None:
    stats, c_soft, c_hard, c_z = args[_N_INPUTS:]
    _call(student, Inputs(*args[:_N_INPUTS]), stats=stats, grad=grad, c_soft=c_soft, c_hard=c_hard, c_z=c_z)


def _dense_fused(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    student = _rows(student)
    grad = _fresh_gradient(student)
    return *_fused_into(grad, student, *args), grad


def _dense_fused_inplace(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fused_into(student, student, *args)


def _fused_into(grad: Tensor, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, (*wants, c_soft, c_hard, c_z) = Inputs(*args[:_N_INPUTS]), args[_N_INPUTS:]
    return _run_forward(student, inputs, tuple(wants), grad=grad, c_soft=c_soft, c_hard=c_hard, c_z=c_z)


def _scale_inplace(grad: Tensor, factor: Tensor) -> None:
    value = factor.item()
    if value != 1.0:
        _core.scale(_view(grad), value, torch.get_num_threads())


_library.impl("dense_forward", _dense_forward, "CPU")
_library.impl("dense_backward", _dense_backward, "CPU")
_library.impl("dense_backward_", _dense_backward_inplace, "CPU")
_library.impl("dense_fused", _dense_fused, "CPU")
_library.impl("dense_fused_", _dense_fused_inplace, "CPU")
_library.impl("scale_", _scale_inplace, "CPU")


# --- Fakes: the shapes and strides that the implementations allocate --------------------------------------------------


def _fake_outputs(student: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(_token_outputs(student, Inputs(*args[:_N_INPUTS]), *args[_N_INPUTS : _N_INPUTS + 2]).values())


def _fake_forward(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    stats = student.new_empty((*student.shape[:-1], _stats_size(Inputs(*args[:_N_INPUTS]))), dtype=torch.float32)
    return *_fake_outputs(student, args), stats


def _fake_fused(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *_fake_outputs(student, args), student.new_empty(student.shape)


torch.library.register_fake("kdfast::dense_forward", _fake_forward)
torch.library.register_fake("kdfast::dense_backward", lambda student, *_: student.new_empty(student.shape))
torch.library.register_fake("kdfast::dense_backward_", lambda *_: None)
torch.library.register_fake("kdfast::dense_fused", _fake_fused)
torch.library.register_fake("kdfast::dense_fused_", lambda student, *args: _fake_outputs(student, args))
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
        inputs, rest = Inputs(*args[:_N_INPUTS]), args[_N_INPUTS:]
        dims, rest_dims = Inputs(*in_dims[1 : 1 + _N_INPUTS]), in_dims[1 + _N_INPUTS :]
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
        )
        result = op(
            _to_front(student, in_dims[0], batch),
            *moved,
            *(_to_front(x, d, batch) for x, d in zip(rest, rest_dims, strict=True)),
        )
        return result, (0 if outputs == 1 else (0,) * outputs)

    return rule


torch.library.register_vmap("kdfast::dense_forward", _batched(_ops.dense_forward, 5))
torch.library.register_vmap("kdfast::dense_backward", _batched(_ops.dense_backward, 1))
torch.library.register_vmap("kdfast::dense_fused", _batched(_ops.dense_fused, 5))


# --- Autograd ---------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What of a call is not a tensor."""

    terms: tuple[Term, ...]
    mix_logits: bool
    columns: int
    label_smoothing: float
    wants_z: bool
    wants_dtau: bool
    overwrite: bool

    def inputs(
        self,
        teachers: tuple[Tensor, ...],
        teacher_weights: Tensor | None,
        labels: Tensor | None,
        counted: Tensor | None,
        temperature: Tensor,
    ) -> Inputs:
        """The operators' arguments."""
        names, weights, parameters = ([t[k] for t in self.terms if teachers] for k in range(3))
        return Inputs(
            list(teachers),
            teacher_weights,
            labels,
            counted,
            temperature,
            names,  # type: ignore[arg-type]
            weights,  # type: ignore[arg-type]
            parameters,  # type: ignore[arg-type]
            self.mix_logits,
            self.columns,
            self.label_smoothing,
        )


class _OnlyOnce(torch.autograd.Function):
    """Identity on a gradient that names the remedy where somebody differentiates it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        msg = (
            "kdfast: the kernels have no second derivative (create_graph=True was differentiated again): "
            'pass backend="reference" to distill_loss'
        )
        raise RuntimeError(msg)


def _once(grad: Tensor, *sources: Tensor) -> Tensor:
    needed = torch.is_grad_enabled() and any(s.requires_grad for s in sources)
    return _OnlyOnce.apply(grad, *sources) if needed else grad  # type: ignore[no-untyped-call,no-any-return]


class _Fused(torch.autograd.Function):
    """Scalar loss with the gradient made in the forward call; returns (loss, soft, hard, z2)."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        temperature: Tensor,
        c_soft: Tensor | None,
        c_hard: Tensor | None,
        c_z: Tensor | None,
        spec: Spec,
        inputs: Inputs,
    ) -> tuple[Tensor, ...]:
        coefficients = (c_soft, c_hard, c_z)
        if spec.overwrite:
            *tokens, dtau = _ops.dense_fused_(student, *inputs, spec.wants_z, spec.wants_dtau, *coefficients)
            torch.autograd.graph.increment_version(student)
            ctx.grad = student.detach()
        else:
            *tokens, dtau, ctx.grad = _ops.dense_fused(student, *inputs, spec.wants_z, spec.wants_dtau, *coefficients)
            ctx.save_for_backward(student, *inputs.teachers)
        ctx.spec, ctx.inputs, ctx.coefficients, ctx.tokens, ctx.dtau = spec, inputs, coefficients, tokens, dtau
        terms = [reference.weighted(c, x, "sum") for c, x in zip(coefficients, tokens, strict=True) if c is not None]
        ctx.mark_non_differentiable(*tokens)
        return sum(terms[1:], terms[0]), *tokens

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _Fused.gradients(ctx, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            sources = (upstream, *ctx.saved_tensors[:1])
            grads = tuple(None if g is None else _once(g, *sources) for g in grads)
        return *grads, None, None

    @staticmethod
    def gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """To the student, the temperature and the coefficients."""
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            if ctx.spec.overwrite:
                msg = "kdfast: a second backward needs the logits that overwrite_logits=True gave away"
                raise RuntimeError(msg)
            student, *_teachers = ctx.saved_tensors  # raises where one was changed since
            grad = _ops.dense_fused(student, *ctx.inputs, ctx.spec.wants_z, ctx.spec.wants_dtau, *ctx.coefficients)[-1]
        _ops.scale_(grad, upstream)
        to_coefficients = [
            None if c is None or not needed else upstream * torch.where((c != 0) | x.isfinite(), x, 0.0)
            for c, x, needed in zip(ctx.coefficients, ctx.tokens, ctx.needs_input_grad[2:5], strict=True)
        ]
        dtau = None
        if ctx.needs_input_grad[1] and ctx.spec.wants_dtau:
            dtau = (upstream * reference.weighted(ctx.coefficients[0], ctx.dtau, "sum")).to(ctx.inputs.temperature.dtype)
        return grad, dtau, *to_coefficients


class _Tokens(torch.autograd.Function):
    """Per-token (soft, hard, z2), with a backward that reads the logits again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,
        temperature: Tensor,
        labels: Tensor | None,
        counted: Tensor | None,
        teacher_weights: Tensor | None,
        spec: Spec,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = spec.inputs(teachers, teacher_weights, labels, counted, temperature)
        return _ops.dense_forward(student, *inputs, spec.wants_z, spec.wants_dtau)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, temperature, labels, counted, teacher_weights, spec, *teachers = inputs
        dtau, stats = output[3:]
        ctx.mark_non_differentiable(dtau, stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, temperature, labels, counted, teacher_weights, dtau, stats, *teachers)
        ctx.spec = spec

    @staticmethod
    def backward(
        ctx: Any, g_soft: Tensor | None, g_hard: Tensor | None, g_z: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        student, temperature, labels, counted, teacher_weights, dtau, stats, *teachers = ctx.saved_tensors
        spec: Spec = ctx.spec
        inputs = spec.inputs(tuple(teachers), teacher_weights, labels, counted, temperature)
        # A term that the call does not have has an output without elements, whose upstream may be None or as empty.
        coefficients = [
            g if there else None
            for g, there in ((g_soft, bool(teachers)), (g_hard, labels is not None), (g_z, spec.wants_z))
        ]
        g_soft = coefficients[0]
        upstream = [g for g in coefficients if g is not None]
        to_student: Tensor | None = None
        to_temperature: Tensor | None = None
        to_teachers: list[Tensor | None] = [None] * len(teachers)
        if any(ctx.needs_input_grad[6:]) and g_soft is not None:
            # The same divergence with its arguments, and so its roles, exchanged.
            swapped = inputs._replace(
                teachers=[student], labels=None, **_exchanged(spec.terms)
            )
            grad = _ops.dense_fused(teachers[0], *swapped, False, False, g_soft, None, None)[-1]
            to_teachers[0] = _once(grad, *upstream, student, teachers[0])
        if ctx.needs_input_grad[1] and spec.wants_dtau and g_soft is not None:
            to_temperature = _once((g_soft * dtau).sum().to(temperature.dtype), *upstream, student, temperature)
        if ctx.needs_input_grad[0] and upstream:
            if spec.overwrite:
                with torch.no_grad():
                    _ops.dense_backward_(student, *inputs, stats, *coefficients)
                torch.autograd.graph.increment_version(student)
                to_student = student.detach()
            else:
                grad = _ops.dense_backward(student, *inputs, stats, *coefficients)
                to_student = _once(grad, *upstream, student)
        return to_student, to_temperature, None, None, None, None, *to_teachers


_EXCHANGED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "skew_forward_kl": "skew_reverse_kl",
    "skew_reverse_kl": "skew_forward_kl",
}
_COMPLEMENT = ("jsd", "alpha_div")  # D(q, p; x) = D(p, q; 1 - x)


def _exchanged(terms: tuple[Term, ...]) -> dict[str, Any]:
    """The terms of D(p, q), written as a divergence of exchanged arguments."""
    return {
        "names": [_EXCHANGED.get(t.name, t.name) for t in terms],
        "weights": [t.weight for t in terms],
        "parameters": [1 - t.parameter if t.name in _COMPLEMENT else t.parameter for t in terms],
    }


# --- The row of the registry ------------------------------------------------------------------------------------------


def cpu_unavailable() -> str | None:
    """Why the compiled CPU kernel cannot run here."""
    return None if _core is not None else f"the compiled extension is missing ({_IMPORT_ERROR})"


def cpu_detail() -> str:
    """What the compiled CPU kernel runs with."""
    isas = ", ".join(_core.supported_isas())
    return f"C++ kernel, {_core.isa()} of {isas}, {torch.get_num_threads()} threads"


def cpu_declines(problem: Problem) -> str | None:
    """Why the compiled CPU kernel cannot serve this call."""
    logits = (problem.student, *problem.teachers)
    if not all(isinstance(x, Tensor) for x in logits):
        return "an LMHead needs the reference"
    if problem.sparse is not None:
        return "sparse targets need the reference"
    for x in logits:
        if x.device.type != "cpu":  # type: ignore[union-attr]
            return f"logits on {x.device}"  # type: ignore[union-attr]
        if x.dtype not in KERNEL_DTYPES:  # type: ignore[union-attr]
            return f"{x.dtype} logits (it takes float32, bfloat16 and float16)"  # type: ignore[union-attr]
    if problem.temperature.device.type != "cpu":
        return f"temperature on {problem.temperature.device}"
    several = len(problem.teachers) > 1
    if several and problem.teacher_grad:
        return "gradients to an ensemble of teachers"
    if problem.teacher_weights is not None and problem.teacher_weights.requires_grad:
        return "gradients to teacher_weights"
    if several and problem.ensemble == "prob" and problem.learns_temperature:
        return "a learned temperature under ensemble='prob'"
    return None


def cpu_distill_loss(problem: Problem) -> DistillTerms:
    """The loss through the compiled kernel."""
    student = problem.student
    assert isinstance(student, Tensor)  # noqa: S101 - cpu_declines has seen to it
    teachers: tuple[Tensor, ...] = problem.teachers  # type: ignore[assignment]
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    spec = Spec(
        problem.terms,
        problem.ensemble == "logit" and len(teachers) > 1,
        problem.columns,
        problem.label_smoothing,
        isinstance(problem.z_loss, Tensor) or problem.z_loss != 0.0,
        problem.learns_temperature and bool(teachers),
        problem.overwrite_logits and not transformed,
    )
    weights = problem.teacher_weights
    if weights is not None:
        weights = weights.detach().to(torch.float32)
    tensors = (problem.labels, problem.counted, weights)
    w = reference.token_weights(problem)
    in_forward = (
        torch.is_grad_enabled()
        and student.requires_grad
        and student.dtype != torch.float16
        and problem.reduction != "none"
        and not problem.teacher_grad
        and not transformed
    )
    if not in_forward:
        out = _Tokens.apply(student, problem.temperature, *tensors, spec, *teachers)  # type: ignore[no-untyped-call]
        return reference.assemble(problem, _token_terms(problem, *out[:3]), w)
    inputs = spec.inputs(teachers, weights, problem.labels, problem.counted, problem.temperature.detach())
    c = reference.coefficients(problem, w)
    loss, *out = _Fused.apply(student, problem.temperature, *c, spec, inputs)  # type: ignore[no-untyped-call]
    return DistillTerms(loss, *reference.reduced_terms(problem, _token_terms(problem, *out), w))


def _token_terms(problem: Problem, soft: Tensor, hard: Tensor, z2: Tensor) -> TokenTerms:
    return TokenTerms(soft if problem.has_teacher else None, hard if problem.labels is not None else None, z2)
