"""Distillation through a student's and a teacher's `LMHead` in the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import heads
from bench.gpu import errors
from kdfast.benchmark.cases import DTYPES

#: Tokens and the size of the hidden states where gradients are compared with fp64.
CHECKED_TOKENS, CHECKED_HIDDEN = 16, 512


@dataclass(frozen=True)
class HeadCase:
    """A step from hidden states and weights, forward and backward."""

    loss: str
    tokens: int
    vocab: int
    hidden: int
    dtype: str = "bf16"

    #: The floor is the matrix products, which are measured.
    floor_bytes = None

    @property
    def name(self) -> str:
        """Such as ``head forward_kl-8192x128256-H4096-bf16``."""
        return f"head {self.loss}-{self.tokens}x{self.vocab}-H{self.hidden}-{self.dtype}"


def cases(*, rehearse: bool) -> Iterator[HeadCase]:
    """Most telling first: the suite stops at its deadline."""
    if rehearse:
        yield HeadCase("forward_kl", 6, 300, 32)
        yield HeadCase("jsd", 6, 301, 32, "fp32")
        return
    for loss in ("forward_kl", "jsd"):
        for tokens in (8192, 1024):
            yield HeadCase(loss, tokens, 128256, 4096)
    yield HeadCase("forward_kl", 8192, 151936, 2048)


class Inputs(heads.HeadInputs):
    """The tensors of a case."""

    def __init__(self, case: HeadCase, device: torch.device) -> None:
        super().__init__(case.tokens, case.vocab, case.hidden, DTYPES[case.dtype], device)


def competitors(case: HeadCase, x: Inputs) -> heads.Steps:
    """Steps by name; the text of who cannot run it says why. kdfast stands first."""
    return heads.distillation(x, case.loss, backend="triton", compiles=x.hidden.is_cuda, triton=True)


def errors_against_fp64(
    case: HeadCase, device: torch.device, ours: Callable[..., Tensor], eager: Callable[..., Tensor]
) -> dict[str, Any]:
    """Of the gradients of hidden states and weight, on fresh inputs of few tokens; ``ours`` takes a backend."""
    small = (CHECKED_TOKENS, case.vocab, min(case.hidden, CHECKED_HIDDEN))
    x = heads.HeadInputs(*small, DTYPES[case.dtype], device, seed=torch.seed() % 2**31)
    exact = x.double()
    truth = torch.autograd.grad(ours(exact, backend="reference"), exact.leaves)

    def error(loss: Tensor) -> dict[str, Any]:
        hidden, weight = (
            {"of": name, **errors.worst(got, want)}
            for name, got, want in zip(("hidden", "weight"), torch.autograd.grad(loss, x.leaves), truth, strict=True)
        )
        return errors.larger(hidden, weight)

    return {"kdfast": error(ours(x, backend="triton")), "eager": error(eager(x))}


def tolerance(case: HeadCase) -> float:
    """See :mod:`bench.gpu.errors`."""
    return errors.HEAD[case.dtype]


def gradient_errors(case: HeadCase, device: torch.device) -> dict[str, Any]:
    """See :mod:`bench.gpu`."""
    return errors_against_fp64(
        case,
        device,
        lambda x, backend: heads.kdfast_distillation(x, case.loss, backend),
        lambda x: heads.eager_distillation(x, case.loss),
    )
