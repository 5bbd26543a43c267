"""Which implementation serves a call: the only dispatch of the package.

An implementation is a row of :data:`ROWS`: a name, why it may be missing, why it may decline a call, and the loss
itself. ``None`` as backend takes the first row that serves the call; a name takes that row or raises.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kdfast.ops import probabilities
from kdfast.ops.dense import autograd as dense_autograd
from kdfast.ops.dense import cpu as dense_cpu
from kdfast.ops.dense.inputs import KERNEL_DTYPES
from kdfast.ops.head import autograd as head_autograd
from kdfast.ops.select import cpu as select_cpu
from kdfast.ops.select import triton as select_triton
from kdfast.spec import reference, selection
from kdfast.spec.problem import Logits, Problem, build_problem, device_of
from kdfast.spec.reduction import DistillTerms
from kdfast.spec.selection import Request, Selected
from kdfast.views import EXTENSION_MISSING

#: Columns from which the plain PyTorch fallback costs enough memory and time to be worth a word.
LARGE_VOCABULARY = 16384


@dataclass(frozen=True)
class Implementation:
    """One way to compute the loss."""

    name: str
    unavailable: Callable[[], str | None]  # why it cannot run on this machine
    declines: Callable[[Problem], str | None]  # why it cannot serve this call
    distill_loss: Callable[[Problem], DistillTerms]
    detail: Callable[[], str]


def _interprets() -> bool:
    """Whether Triton was told to run kernels on the CPU, which serves tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


#: The oldest Triton that the kernels were compiled with.
OLDEST_TRITON = (3, 6)


def _installed_triton() -> str | None:
    """Version of the module; its distribution has other names in builds for AMD, Intel and Windows."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return str(importlib.import_module("triton").__version__)


#: Looked up once, where no compiler traces it.
TRITON_VERSION = _installed_triton()


def _triton_unavailable() -> str | None:
    version = TRITON_VERSION
    if version is None:
        return "Triton is not installed: pip install 'kdfast[triton]'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old: the kernels need {'.'.join(map(str, OLDEST_TRITON))}"
    if not (_interprets() or torch.cuda.is_available()):
        return "no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    return None


def _triton_detail() -> str:
    where = "the interpreter, on the CPU" if _interprets() else torch.cuda.get_device_name()
    return f"Triton {TRITON_VERSION} kernels, {where}"


def _declines(problem: Problem, devices: tuple[str, ...]) -> str | None:
    reason = dense_autograd.declines(problem, devices)
    return reason or (head_autograd.declines(problem) if head_autograd.has_head(problem) else None)


def _declines_on_triton(problem: Problem) -> str | None:
    from kdfast.kernels.triton.tiles import MOST_KEPT

    if problem.kept is not None and problem.kept.shape[-1] > MOST_KEPT:
        return f"{problem.kept.shape[-1]} entries a token of sparse targets (it takes {MOST_KEPT})"
    return _declines(problem, ("cpu",) if _interprets() else ("cuda",))


def _distill_loss(problem: Problem, backend: str) -> DistillTerms:
    if problem.probabilities is not None:
        return probabilities.distill_loss(problem, lambda part: _distill_loss(part, backend))
    if not _unpacks(problem, backend):
        problem = problem.unpacked()
    if head_autograd.has_head(problem):
        return head_autograd.distill_loss(problem, backend)
    return dense_autograd.distill_loss(problem, backend)


def _unpacks(problem: Problem, backend: str) -> bool:
    """Whether the kernels of a backend take packed targets as they are."""
    if problem.packed is None or backend != "triton":
        return False
    from kdfast.kernels.triton.tiles import MOST_PACKED

    return problem.packed.kept <= MOST_PACKED


#: Best first.
ROWS: tuple[Implementation, ...] = (
    Implementation(
        "cpu",
        lambda: EXTENSION_MISSING,
        lambda problem: _declines(problem, ("cpu",)),
        lambda problem: _distill_loss(problem, "cpu"),
        dense_cpu.detail,
    ),
    Implementation(
        "triton",
        _triton_unavailable,
        _declines_on_triton,
        lambda problem: _distill_loss(problem, "triton"),
        _triton_detail,
    ),
    Implementation(
        "reference",
        lambda: None,
        lambda problem: None,
        lambda problem: reference.distill_loss(problem.unpacked()),
        lambda: "plain PyTorch, any device",
    ),
)


@dataclass(frozen=True)
class Selector:
    """One way to choose soft targets."""

    name: str
    unavailable: Callable[[], str | None]
    declines: Callable[[Logits, Request], str | None]
    select: Callable[[Tensor, Request, int], Selected]


def _not_taken(x: Logits, device: str) -> str | None:
    """Why the kernels for tensors of a device cannot take these logits."""
    if device_of(x).type != device:
        return f"logits on {device_of(x)}"
    dtype = x.dtype if isinstance(x, Tensor) else x.hidden.dtype
    return None if dtype in KERNEL_DTYPES else f"{dtype} logits (it takes float32, bfloat16 and float16)"


def _not_selected_by_triton(x: Logits, request: Request) -> str | None:
    reason = _not_taken(x, "cpu" if _interprets() else "cuda")
    return reason or select_triton.declines(request, x.shape[-1])


#: Best first.
SELECTORS: tuple[Selector, ...] = (
    Selector("cpu", lambda: EXTENSION_MISSING, lambda x, _: _not_taken(x, "cpu"), select_cpu.select),
    Selector("triton", _triton_unavailable, _not_selected_by_triton, select_triton.select),
    Selector("reference", lambda: None, lambda _x, _request: None, selection.select),
)

#: Named in the design and in the signature, but without a row: what to say when one is asked for.
_PLANNED = {"cuda": "no CUDA kernels in this version"}

_warned: set[str] = set()


def select(problem: Problem, backend: str | None) -> Implementation:
    """The implementation of the loss that serves ``problem``.

    Raises:
        ValueError: a backend of an unknown name.
        RuntimeError: a named backend that is not available or cannot serve this call, with the reason.
    """
    return _serving(
        ROWS,
        lambda row: row.declines(problem),
        backend,
        slow="distill_loss runs in plain PyTorch, with full-size copies" if _is_large(problem.vocab_size) else None,
    )


def selector(x: Logits, request: Request) -> Selector:
    """The implementation of ``soft_targets`` that serves a request.

    Raises:
        ValueError: KDFAST_BACKEND is no backend's name.
        RuntimeError: KDFAST_BACKEND names one that is not available or cannot serve this call, with the reason.
    """
    return _serving(
        SELECTORS,
        lambda row: row.declines(x, request),
        None,
        slow="soft_targets runs in plain PyTorch, with fp64 copies of its logits" if _is_large(x.shape[-1]) else None,
    )


def _is_large(columns: int) -> bool:
    return columns >= LARGE_VOCABULARY


_Row = TypeVar("_Row", Implementation, Selector)


def _serving(
    rows: tuple[_Row, ...], declines: Callable[[_Row], str | None], backend: str | None, *, slow: str | None
) -> _Row:
    """The first row that serves a call, or the one that is named; ``slow`` is said once where that is the reference."""
    name = backend if backend is not None else os.environ.get("KDFAST_BACKEND") or None
    if name is not None:
        check_name(name, "backend" if backend is not None else "KDFAST_BACKEND")
        named = next((row for row in rows if row.name == name), None)
        reason = _PLANNED[name] if named is None else named.unavailable() or declines(named)
        if named is None or reason:
            msg = f"backend {name!r} cannot serve this call: {reason}"
            raise RuntimeError(msg)
        return named
    declined: list[str] = []
    for row in rows:
        reason = row.unavailable() or declines(row)
        if reason is None:
            if row.name == "reference" and slow:
                _say_once(f"{slow}: {'; '.join(declined)}")
            return row
        declined.append(f"{row.name}: {reason}")
    msg = "no implementation"  # pragma: no cover - the reference serves every call
    raise RuntimeError(msg)


def check_name(name: str, source: str) -> None:
    """Raise ValueError where no backend of any machine has this name."""
    known = [*(row.name for row in ROWS), *_PLANNED]
    if name not in known:
        msg = f"{source} must be one of {', '.join(map(repr, known))}, got {name!r}"
        raise ValueError(msg)


def _say_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, UserWarning, stacklevel=5)


@dataclass(frozen=True)
class BackendStatus:
    """What one backend says of itself, and of the call it was asked about."""

    name: str
    available: bool
    chosen: bool
    reason: str  # what it is where it can serve, why not otherwise


@dataclass(frozen=True)
class Backends:
    """The answer of :func:`kdfast.backends`; printing it gives a table."""

    rows: tuple[BackendStatus, ...]

    @property
    def chosen(self) -> str:
        """Name of the backend that would run.

        Raises:
            RuntimeError: KDFAST_BACKEND names one that cannot serve the call.
        """
        for row in self.rows:
            if row.chosen:
                return row.name
        raise RuntimeError(self.refusal())

    def refusal(self) -> str:
        """Why none is chosen, where none is."""
        forced = os.environ.get("KDFAST_BACKEND")
        why = next((row.reason for row in self.rows if row.name == forced), None)
        if why is None:
            return f"KDFAST_BACKEND={forced!r} names none of {', '.join(row.name for row in self.rows)}"
        return f"KDFAST_BACKEND={forced!r} cannot serve this call: {why}"

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        mark = {True: "->", False: "  "}
        lines = [
            f"{mark[r.chosen]} {r.name:<{width}}  {'yes' if r.available else 'no ':<3}  {r.reason}" for r in self.rows
        ]
        return "\n".join(lines if any(r.chosen for r in self.rows) else [*lines, self.refusal()])


def backends(problem: Problem | None = None, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Backends:
    """What is available on this machine, what would be chosen, and why.

    Args:
        problem: a call to ask about, of :func:`kdfast.spec.problem.build_problem`; None for a plain dense loss.
        dtype: dtype of the logits in that plain loss.
        device: device of the logits in that plain loss.

    Returns:
        :class:`Backends`: ``.rows``, ``.chosen``, and a table when printed.

    Example:
        >>> backends(dtype=torch.float64).chosen
        'reference'
    """
    if problem is None:
        logits = torch.zeros(1, 2, dtype=dtype, device=device)
        problem = build_problem(logits, logits)
    forced = os.environ.get("KDFAST_BACKEND") or None
    rows: list[BackendStatus] = []
    for row in ROWS:
        missing = row.unavailable()
        reason = missing or row.declines(problem)
        free = not any(r.chosen for r in rows) and forced in (None, row.name)
        chosen = reason is None and free
        rows.append(BackendStatus(row.name, missing is None, chosen, reason or row.detail()))
    rows += [BackendStatus(name, available=False, chosen=False, reason=why) for name, why in _PLANNED.items()]
    return Backends(tuple(rows))
