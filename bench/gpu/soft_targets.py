"""Sparse targets in the suite: their cases, what a person would write in PyTorch, and the one read of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdfast
from bench.gpu import errors
from bench.gpu.dense import DTYPES

SEED = 7


@dataclass(frozen=True)
class SelectCase:
    """Targets of (tokens, vocab) logits."""

    method: str
    tokens: int
    vocab: int
    dtype: str
    k: int = 64
    temperatures: tuple[float, ...] = (1.0,)

    @property
    def name(self) -> str:
        """Such as ``topk-64-8192x128256-bf16-T 1, 2``."""
        temperatures = ", ".join(f"{t:g}" for t in self.temperatures)
        return f"{self.method}-{self.k}-{self.tokens}x{self.vocab}-{self.dtype}-T {temperatures}"

    @property
    def floor_bytes(self) -> int:
        """Read the logits."""
        return self.tokens * self.vocab * DTYPES[self.dtype].itemsize


def cases(*, rehearse: bool) -> Iterator[SelectCase]:
    """Most telling first: the suite stops at its deadline."""
    if rehearse:
        yield SelectCase("topk", 4, 1000, "bf16", temperatures=(1.0, 2.0))
        yield SelectCase("sample", 4, 701, "fp32")
        yield SelectCase("sample", 4, 701, "fp32", k=1)
        return
    for temperatures in ((1.0,), (1.0, 2.0), (1.0, 2.0, 3.0, 5.0)):
        yield SelectCase("topk", 8192, 128256, "bf16", temperatures=temperatures)
    yield SelectCase("topk", 8192, 128256, "fp32", temperatures=(1.0, 2.0))
    for vocab in (151936, 50257, 262144):
        yield SelectCase("topk", 8192, vocab, "bf16", temperatures=(1.0, 2.0))
    yield SelectCase("topk", 8192, 128256, "bf16", k=1024)
    for method in ("topp", "sample", "pps"):
        yield SelectCase(method, 8192, 128256, "bf16")
    yield SelectCase("topk", 16, 128256, "bf16")


class Inputs:
    """The logits of a case."""

    def __init__(self, case: SelectCase, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(20)
        shape = (case.tokens, case.vocab)
        self.logits = torch.empty(shape, dtype=DTYPES[case.dtype], device=device).normal_(0, 2, generator=generator)

    def release(self) -> None:
        """Nothing is left behind."""


def _kdfast(case: SelectCase, x: Tensor) -> kdfast.SparseTargets:
    options: dict[str, object] = {"p": 0.95} if case.method == "topp" else {}
    if case.method in ("sample", "pps"):
        options["seed"] = SEED
    return kdfast.soft_targets(x, k=case.k, method=case.method, temperatures=case.temperatures, **options)  # type: ignore[arg-type]


def _normalisers(case: SelectCase, x: Tensor) -> list[Tensor]:
    return [torch.logsumexp(x if t == 1 else x / t, -1) for t in case.temperatures]


def competitors(case: SelectCase, x: Inputs) -> dict[str, Callable[[], object] | str]:
    """Steps by name; kdfast stands first. Those that do less work say so."""
    logits, k = x.logits, case.k
    compiled: Callable[[], object] | str = "needs a GPU here"
    if case.method == "sample":
        return {
            "kdfast": lambda: _kdfast(case, logits),
            "softmax + multinomial": lambda: torch.multinomial(torch.softmax(logits.float(), -1), k, replacement=True),
            "bare read (amax)": lambda: logits.amax(-1),
        }
    if logits.is_cuda:
        function = torch.compile(lambda z: (torch.topk(z, k), _normalisers(case, z)), dynamic=False)
        compiled = lambda: function(logits)  # noqa: E731
    return {
        "kdfast": lambda: _kdfast(case, logits),
        "topk + logsumexp": lambda: (torch.topk(logits, k), _normalisers(case, logits)),
        "topk + logsumexp, torch.compile": compiled,
        "topk (no logsumexp)": lambda: torch.topk(logits, k),
        "sort (no logsumexp)": lambda: torch.sort(logits, descending=True),
        "logsumexp (no topk)": lambda: _normalisers(case, logits),
        "bare read (amax)": lambda: logits.amax(-1),
    }


def tolerance(_: SelectCase) -> float:
    """See :mod:`bench.gpu.errors`."""
    return errors.NORMALISER


def gradient_errors(case: SelectCase, device: torch.device) -> dict[str, Any]:
    """Errors of log-normalisers against fp64, on inputs of few tokens: kdfast's, and torch.logsumexp's."""
    x = Inputs(replace(case, tokens=4), device).logits
    got, log_q = _kdfast(case, x), x.double().log_softmax(-1)
    eager_log_q = x.float() - torch.logsumexp(x.float(), -1, keepdim=True)
    found: dict[str, Any] = {}
    assert got.lse is not None
    for t, lse in got.lse.items():
        exact = torch.logsumexp(log_q / t, -1)
        for name, value in (("kdfast", lse), ("eager", torch.logsumexp(eager_log_q / t, -1))):
            error = {"of": f"lse at {t:g}", **errors.worst(value, exact, 1.0)}
            found[name] = errors.larger(found[name], error) if name in found else error
    return found
