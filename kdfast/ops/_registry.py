"""Which implementation serves a call: the only dispatch of the package.

An implementation is a row of :data:`ROWS`: a name, why it may be missing, why it may decline a call, and the loss
itself. ``None`` as backend takes the first row that serves the call; a name takes that row or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kdfast import reference
from kdfast.ops import dense_autograd, dense_cpu, head_autograd
from kdfast.spec.problem import Problem, build_problem
from kdfast.spec.reference import DistillTerms

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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_version() -> str | None:
    """Of the module, as its distribution has other names in builds for AMD."""
    if importlib.util.find_spec("triton") is None:
        return None
    return str(importlib.import_module("triton").__version__)


def _triton_unavailable() -> str | None:
    version = _triton_version()
    if version is None:
        return "Triton is not installed: pip install 'kdfast[triton]'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old: the kernels need {'.'.join(map(str, OLDEST_TRITON))}"
    if not (_interprets() or torch.cuda.is_available()):
        return "no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"
    return None


def _triton_detail() -> str:
    where = "the interpreter, on the CPU" if _interprets() else torch.cuda.get_device_name()
    return f"Triton {_triton_version()} kernels, {where}"


def _declines(problem: Problem, devices: tuple[str, ...]) -> str | None:
    reason = dense_autograd.declines(problem, devices)
    return reason or (head_autograd.declines(problem) if head_autograd.has_head(problem) else None)


def _declines_on_triton(problem: Problem) -> str | None:
    from kdfast.kernels.triton.tiles import MOST_KEPT

    if problem.kept is not None and problem.kept.shape[-1] > MOST_KEPT:
        return f"{problem.kept.shape[-1]} entries a token of sparse targets (it takes {MOST_KEPT})"
    return _declines(problem, ("cpu",) if _interprets() else ("cuda",))


def _distill_loss(problem: Problem, backend: str) -> DistillTerms:
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
        lambda: dense_cpu.EXTENSION_MISSING,
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

#: Named in the design and in the signature, but without a row: what to say when one is asked for.
_PLANNED = {"cuda": "no CUDA kernels in this version"}

_warned: set[str] = set()


def select(problem: Problem, backend: str | None) -> Implementation:
    """The implementation that serves ``problem``.

    Raises:
        ValueError: a backend of an unknown name.
        RuntimeError: a named backend that is not available or cannot serve this call, with the reason.
    """
    name = backend if backend is not None else os.environ.get("KDFAST_BACKEND") or None
    if name is not None:
        row = _named(name, "backend" if backend is not None else "KDFAST_BACKEND")
        reason = row.unavailable() or row.declines(problem)
        if reason:
            msg = f"backend {name!r} cannot serve this call: {reason}"
            raise RuntimeError(msg)
        return row
    declined: list[str] = []
    for row in ROWS:
        reason = row.unavailable() or row.declines(problem)
        if reason is None:
            if row.name == "reference" and problem.vocab_size >= LARGE_VOCABULARY:
                _say_once(f"distill_loss runs in plain PyTorch, with full-size copies: {'; '.join(declined)}")
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


def _named(name: str, source: str) -> Implementation:
    check_name(name, source)
    if name in _PLANNED:
        msg = f"backend {name!r} is not available: {_PLANNED[name]}"
        raise RuntimeError(msg)
    return next(row for row in ROWS if row.name == name)


def _say_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, UserWarning, stacklevel=4)


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
        problem: a call to ask about, as :func:`kdfast.spec.problem.build_problem` makes it; None for a plain dense loss.
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
