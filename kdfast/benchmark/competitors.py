"""Who is measured: the loss in plain PyTorch, its torch.compile, kdfast, and the machine's own bandwidth."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.benchmark.cases import ALPHA, DTYPES, TEMPERATURE, Case
from kdfast.benchmark.errors import BenchError
from kdfast.loss import distill_loss

KDFAST = "kdfast"
OVERWRITE = "kdfast-overwrite"
EAGER = "eager"
COMPILE = "torch.compile"
TRIAD = "triad"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student (N, V), teacher (N, V), labels (N,) -> loss, 0-d


# --- The formulas in plain PyTorch ------------------------------------------------------------------------------------


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453  # log((p + q) / 2)
    to_q = F.kl_div(log_m, log_q, log_target=True, reduction="batchmean")
    return 0.5 * to_q + 0.5 * F.kl_div(log_m, log_p, log_target=True, reduction="batchmean")


#: D(q, p) from the log-probabilities of student and teacher, (N, V) each, as a person writes it; a mean over N, nats.
SOFT_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


def eager_loss(divergence: str) -> Loss:
    """The whole loss in plain PyTorch; the baseline that every speed-up refers to, so it does not change."""
    soft_term = SOFT_TERMS[divergence]
    alpha, tau = ALPHA, TEMPERATURE

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(s.float() / tau, -1), F.log_softmax(t.float() / tau, -1)
        return alpha * tau * tau * soft_term(log_p, log_q) + (1 - alpha) * F.cross_entropy(s.float(), y)

    return loss


def _kdfast_loss(divergence: str, *, overwrite_logits: bool = False) -> Loss:
    options = {"temperature": TEMPERATURE, "alpha": ALPHA, "overwrite_logits": overwrite_logits}
    function: Callable[..., Any] = distill_loss

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        value: Tensor = function(s, t, y, divergence=divergence, **options)
        return value

    return loss


@contextmanager
def _forced_isa(isa: str | None) -> Iterator[None]:
    """The kernel reads the variable on every call, so setting it around one step is enough."""
    if isa is None:
        yield
        return
    before = os.environ.get("KDFAST_FORCE_ISA")
    os.environ["KDFAST_FORCE_ISA"] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ["KDFAST_FORCE_ISA"]
        else:
            os.environ["KDFAST_FORCE_ISA"] = before


# --- Steps ------------------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """The tensors of one case, which its competitors share; random, from a fixed seed."""

    case: Case
    student: Tensor = field(init=False)  # (rows, vocab), a leaf that requires grad
    teacher: Tensor = field(init=False)  # (rows, vocab)
    labels: Tensor = field(init=False)  # (rows,) int64

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(20)
        shape, dtype = (self.case.rows, self.case.vocab), DTYPES[self.case.dtype]
        self.student = torch.randn(shape, generator=generator).mul_(2).to(dtype).requires_grad_()
        self.teacher = torch.randn(shape, generator=generator).mul_(2).to(dtype)
        self.labels = torch.randint(self.case.vocab, (self.case.rows,), generator=generator)

    @cached_property
    def scratch(self) -> Tensor:
        """A second leaf like the student, for who writes over it; (rows, vocab)."""
        return self.student.detach().clone().requires_grad_()

    @cached_property
    def written(self) -> Tensor:
        """What the triad writes to, its pages touched; fp32."""
        return torch.zeros_like(_as_floats(self.teacher))


class Step(Protocol):
    """One step of a competitor: ``prepare`` is not timed, ``run`` is."""

    def prepare(self) -> None:
        """Put the tensors back to where a step starts."""

    def run(self) -> Tensor | None:
        """Do the work; the loss, if it computes one."""

    def gradient(self) -> Tensor | None:
        """What ``run`` left as gradient of the student, (rows, vocab)."""


class LossStep:
    """``loss.backward()`` into a fresh gradient.

    Every step starts from the same caches: the last that passed through them was a read of both logits. Otherwise the
    one that has its logits brought back would pay for writing those to memory, 5 to 30 % of its time.
    """

    def __init__(self, loss: Loss, work: Workload, *, overwrites: bool = False, isa: str | None = None) -> None:
        self._loss, self._work, self._overwrites, self._isa = loss, work, overwrites, isa
        self._student = work.scratch if overwrites else work.student
        self._settle = TriadStep(work).run

    def prepare(self) -> None:
        """Drop the gradient, and bring back logits that the last step wrote over."""
        self._student.grad = None
        if self._overwrites:
            with torch.no_grad():
                self._student.copy_(self._work.student)
        self._settle()

    def run(self) -> Tensor | None:
        """The loss, 0-d, after its backward."""
        with _forced_isa(self._isa):
            loss = self._loss(self._student, self._work.teacher, self._work.labels)
            torch.autograd.backward(loss)  # what loss.backward() calls, and typed
        return loss.detach()

    def gradient(self) -> Tensor | None:
        """The student's ``.grad``."""
        return self._student.grad


class TriadStep:
    """Two streams read and one written past the caches, over the bytes of the case, by all of torch's threads."""

    def __init__(self, work: Workload) -> None:
        from kdfast import _core
        from kdfast.views import view

        a, b = _as_floats(work.student.detach()), _as_floats(work.teacher)
        self._held = (a, b, work.written)
        a_view, b_view, out_view = (view(x) for x in self._held)
        self._triad: Callable[[], None] = lambda: _core.triad(a_view, b_view, out_view, torch.get_num_threads())

    def prepare(self) -> None:
        """Nothing to put back."""

    def run(self) -> Tensor | None:
        """The pass over memory; no loss."""
        self._triad()
        return None

    def gradient(self) -> Tensor | None:
        """None: it computes nothing."""
        return None


def _as_floats(x: Tensor) -> Tensor:
    """The same memory as fp32, (n,); an odd last bf16 element is left out."""
    flat = x.view(-1)
    return flat if flat.dtype == torch.float32 else flat[: flat.numel() // 2 * 2].view(torch.float32)


# --- The competitors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Competitor:
    """A name in the table and how to make its step."""

    name: str
    build: Callable[[Workload], Step]
    optional: bool = False  # left out, with the reason, where its first step fails

    @property
    def variant(self) -> bool:
        """It is kdfast under some setting, and not what kdfast is compared with."""
        return self.name.startswith(KDFAST)


def _compiled(work: Workload) -> Step:
    # Without the reset, the second shape that torch sees compiles to code for any shape, which is slower.
    torch.compiler.reset()
    compiled: Loss = torch.compile(eager_loss(work.case.divergence))
    return LossStep(compiled, work)


def _kdfast(*, overwrites: bool, isa: str | None = None) -> Competitor:
    base = OVERWRITE if overwrites else KDFAST

    def build(work: Workload) -> Step:
        loss = _kdfast_loss(work.case.divergence, overwrite_logits=overwrites)
        return LossStep(loss, work, overwrites=overwrites, isa=isa)

    return Competitor(base if isa is None else f"{base}[{isa}]", build)


#: Every competitor, in the order of a table; kdfast is first because the others are checked against it.
COMPETITORS = (
    _kdfast(overwrites=False),
    _kdfast(overwrites=True),
    Competitor(EAGER, lambda work: LossStep(eager_loss(work.case.divergence), work)),
    Competitor(COMPILE, _compiled, optional=True),
    Competitor(TRIAD, TriadStep),
)


def select(patterns: Sequence[str] = (), isas: Sequence[str] = ()) -> list[Competitor]:
    """The competitors whose names match any of the patterns, kdfast always among them.

    Args:
        patterns: globs; none for all.
        isas: instruction sets under which kdfast is measured besides its own choice.

    Raises:
        BenchError: a pattern that matches nothing, an instruction set that this machine does not have.
    """
    try:
        from kdfast import _core
    except ImportError as error:
        msg = f"the compiled kernel is missing, so there is nothing to measure: {error}"
        raise BenchError(msg) from None
    supported = _core.supported_isas()
    for isa in isas:
        if isa not in supported:
            msg = f"--isa {isa}: this machine runs {', '.join(supported)}"
            raise BenchError(msg)
    forced = [_kdfast(overwrites=overwrites, isa=isa) for isa in dict.fromkeys(isas) for overwrites in (False, True)]
    everyone = [*COMPETITORS, *forced]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(c.name, pattern) for c in everyone):
            msg = f"--competitor {pattern}: none matches; they are {', '.join(c.name for c in everyone)}"
            raise BenchError(msg)
    wanted = [c for c in everyone if not patterns or any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]
    return wanted if wanted[0].name == KDFAST else [everyone[0], *wanted]
