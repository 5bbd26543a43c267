"""The loss of targets as a cache stores them, with the copy to the device in the step: packed, and unpacked before."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

import kdfast
from bench.gpu import errors, sparse
from kdfast import cache
from kdfast.benchmark.cases import ALPHA, DTYPES

Targets = TypeVar("Targets", kdfast.SparseTargets, kdfast.PackedTargets)


@dataclass(frozen=True)
class PackedCase:
    """A step over (tokens, vocab) logits and k stored entries of each token, at temperature 1."""

    tokens: int
    vocab: int
    k: int = 64
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """Such as ``packed-8192x128256-k64-bf16``."""
        return f"packed-{self.tokens}x{self.vocab}-k{self.k}-{self.dtype}"

    @property
    def floor_bytes(self) -> int:
        """Read student, write the gradient; the targets are few."""
        return 2 * self.tokens * self.vocab * DTYPES[self.dtype].itemsize


def cases(*, rehearse: bool) -> Iterator[PackedCase]:
    """Most telling first: the suite stops at its deadline."""
    if rehearse:
        yield PackedCase(4, 300, 8)
        yield PackedCase(2, 301, 20, "fp32")
        yield PackedCase(2, 301, 1)
        return
    yield PackedCase(8192, 128256)
    yield PackedCase(8192, 32000)
    yield PackedCase(1024, 128256)


class Inputs:
    """Student, labels and targets of a case, which have been in a cache; the targets lie in the host's memory."""

    def __init__(self, case: PackedCase, device: torch.device, seed: int = 20) -> None:
        given = sparse.Inputs(sparse.SparseCase("forward KL, T = 1", case.tokens, case.vocab, case.k), device, seed)
        self.student = given.student.detach().to(DTYPES[case.dtype]).requires_grad_()
        self.labels = given.labels
        with tempfile.TemporaryDirectory() as folder:
            with cache.Writer(folder, vocab_size=case.vocab, temperatures=(1.0, 2.0)) as writer:
                writer.write("targets", given.targets.to("cpu"))
            reader = cache.Reader(folder)
            self.packed, self.plain = reader.packed(["targets"])[0], reader["targets"]
        self.there = self.packed.to(device)
        if device.type == "cuda":
            self.packed, self.plain = self.packed.pin_memory(), self.plain.map(lambda t: t.pin_memory())

    def release(self) -> None:
        """Steps return their gradient and leave nothing behind."""


def _moved(x: Targets, device: torch.device) -> Targets:
    return x.map(lambda t: t.to(device, non_blocking=True))


def _loss(student: Tensor, targets: kdfast.SparseTargets | kdfast.PackedTargets, x: Inputs, backend: str) -> Tensor:
    return kdfast.distill_loss(student, targets, x.labels, alpha=ALPHA, backend=backend)


def competitors(case: PackedCase, x: Inputs) -> dict[str, Callable[[], object] | str]:
    """Steps by name; kdfast stands first. Those that do less work say so."""
    device = x.student.device

    def step(targets: Callable[[], kdfast.SparseTargets | kdfast.PackedTargets]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(_loss(x.student, targets(), x, "triton"), x.student)

    return {
        "kdfast": step(lambda: _moved(x.packed, device)),
        "copied unpacked": step(lambda: _moved(x.plain, device)),
        "copied packed, unpacked into memory": step(lambda: _moved(x.packed, device).unpack()),
        "bare loss, packed on the device": step(lambda: x.there),
        "bare copy, packed": lambda: _moved(x.packed, device),
        "bare copy, unpacked": lambda: _moved(x.plain, device),
    }


def tolerance(case: PackedCase) -> float:
    """See :mod:`bench.gpu.errors`."""
    return errors.GRADIENT[case.dtype]


def gradient_errors(case: PackedCase, device: torch.device) -> dict[str, Any]:
    """See :mod:`bench.gpu`; eager is that of the unpacked targets, whose bits the packed ones must give."""
    x = Inputs(PackedCase(4, case.vocab, case.k, case.dtype), device, seed=torch.seed() % 2**31)
    exact = x.student.detach().double().requires_grad_()
    plain = x.plain.to(device)
    (truth,) = torch.autograd.grad(_loss(exact, plain, x, "reference"), exact)

    def error(targets: kdfast.SparseTargets | kdfast.PackedTargets) -> dict[str, Any]:
        (got,) = torch.autograd.grad(_loss(x.student, targets, x, "triton"), x.student)
        return errors.worst(got, truth)

    return {"kdfast": error(x.there), "eager": error(plain)}
