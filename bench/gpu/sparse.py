"""The loss of sparse targets in the suite, beside kdfast's own cross-entropy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from bench.gpu import errors
from bench.sparse import LOSSES
from kdfast.benchmark.cases import ALPHA, DTYPES
from kdfast.benchmark.competitors import SOFT_TERMS
from kdfast.ops._registry import ROWS
from kdfast.spec.problem import build_problem

#: Rows of the teacher's logits that exist at a time while targets are made.
BLOCK = 1024


@dataclass(frozen=True)
class SparseCase:
    """A step over (tokens, vocab) logits and k entries of each token."""

    loss: str  # a key of LOSSES
    tokens: int
    vocab: int
    k: int = 64
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """Such as ``sparse forward KL, T = 1-8192x128256-k64-bf16``."""
        return f"sparse {self.loss}-{self.tokens}x{self.vocab}-k{self.k}-{self.dtype}"

    @property
    def floor_bytes(self) -> int:
        """Read student, write the gradient; the targets are few."""
        return 2 * self.tokens * self.vocab * DTYPES[self.dtype].itemsize


def cases(*, rehearse: bool) -> Iterator[SparseCase]:
    """Most telling first: the suite stops at its deadline."""
    if rehearse:
        yield SparseCase("forward KL, T = 1", 4, 300, 8)
        yield SparseCase("renorm, T = 1", 4, 300, 8, "fp32")
        yield SparseCase("forward KL, T = 1", 4, 301, 1)
        return
    for loss in LOSSES:
        yield SparseCase(loss, 8192, 128256)
    yield SparseCase("forward KL, T = 1", 1024, 128256)
    yield SparseCase("forward KL, T = 1", 8192, 32000)
    yield SparseCase("forward KL, T = 1", 8192, 50257, 1)


class Inputs:
    """The tensors of a case; the student is sure of the kept columns in every second token, as in bench/sparse.py."""

    def __init__(self, case: SparseCase, device: torch.device, seed: int = 20) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        blocks = []
        for start in range(0, case.tokens, BLOCK):
            shape = (min(BLOCK, case.tokens - start), case.vocab)
            log_q = torch.empty(shape, device=device).normal_(0, 2, generator=generator).log_softmax(-1)
            blocks.append((*log_q.topk(case.k), (log_q / 2).logsumexp(-1)))
        logprobs, ids, lse = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        kept = {1.0: torch.zeros_like(lse), 2.0: lse}
        self.targets = kdfast.SparseTargets(ids.int(), logprobs, vocab_size=case.vocab, lse=kept)
        shape, dtype = (case.tokens, case.vocab), DTYPES[case.dtype]
        self.student = torch.empty(shape, dtype=dtype, device=device).normal_(0, 2, generator=generator)
        sure = torch.full_like(logprobs[::2], 9.0, dtype=dtype)
        self.student[::2] = self.student[::2].scatter_add(-1, ids[::2], sure)
        self.student.requires_grad_()
        self.labels = torch.randint(case.vocab, (case.tokens,), device=device, generator=generator)

    def release(self) -> None:
        """Steps return their gradient and leave nothing behind."""


def _declined(x: Inputs, options: dict[str, Any]) -> str | None:
    """Why the Triton kernels do not serve the case, where they say so."""
    problem = build_problem(x.student, x.targets, x.labels, **options)
    return next(row for row in ROWS if row.name == "triton").declines(problem)


def _eager(student: Tensor, x: Inputs, options: dict[str, Any]) -> Tensor:
    """Gathers the kept columns of the log-softmax; all others are one more outcome, or left out (``renorm``)."""
    tau = options.get("temperature", 1.0)
    log_p = F.log_softmax(student.float() / tau, -1).gather(-1, x.targets.ids.long())
    log_q = x.targets.logprobs / tau - x.targets.lse[tau][:, None]
    if options.get("tail") == "renorm":
        log_q = log_q.log_softmax(-1)
    else:
        log_p, log_q = (
            torch.cat([a, (1 - a.exp().sum(-1, keepdim=True)).clamp_min(1e-10).log()], -1) for a in (log_p, log_q)
        )
    soft = SOFT_TERMS[options.get("divergence", "forward_kl")](log_p, log_q)
    return ALPHA * tau * tau * soft + (1 - ALPHA) * F.cross_entropy(student.float(), x.labels)


def _kdfast(student: Tensor, x: Inputs, options: dict[str, Any], backend: str) -> Tensor:
    return kdfast.distill_loss(student, x.targets, x.labels, alpha=ALPHA, backend=backend, **options)


def competitors(case: SparseCase, x: Inputs) -> dict[str, Callable[[], object] | str]:
    """Steps by name; the text of who cannot run it says why. kdfast stands first."""
    options = LOSSES[case.loss]

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), x.student)

    eager = partial(_eager, x.student, x, options)
    return {
        "kdfast": _declined(x, options) or step(partial(_kdfast, x.student, x, options, "triton")),
        "bare cross-entropy": step(lambda: kdfast.distill_loss(x.student, labels=x.labels, backend="triton")),
        "eager": step(eager),
        "torch.compile": step(torch.compile(eager, dynamic=False)) if x.student.is_cuda else "needs a GPU here",
    }


def tolerance(case: SparseCase) -> float:
    """See :mod:`bench.gpu.errors`."""
    return errors.GRADIENT[case.dtype]


def gradient_errors(case: SparseCase, device: torch.device) -> dict[str, Any]:
    """See :mod:`bench.gpu`."""
    options = LOSSES[case.loss]
    x = Inputs(SparseCase(case.loss, 4, case.vocab, case.k, case.dtype), device, seed=torch.seed() % 2**31)
    if _declined(x, options):
        return {}
    exact = x.student.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(_kdfast(exact, x, options, "reference"), exact)

    def error(loss: Tensor) -> dict[str, Any]:
        return errors.worst(torch.autograd.grad(loss, x.student)[0], truth)

    return {
        "kdfast": error(_kdfast(x.student, x, options, "triton")),
        "eager": error(_eager(x.student, x, options)),
    }
