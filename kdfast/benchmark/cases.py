"""The measured work: shapes, dtypes, divergences and options of the loss, declared here and nowhere else."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from kdfast.benchmark.errors import BenchError

#: Options of every case, besides its divergence; labels are always given.
TEMPERATURE = 2.0
ALPHA = 0.5

#: Divergences that have a formula in plain PyTorch, :data:`kdfast.benchmark.competitors.SOFT_TERMS`.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_NAME = re.compile(r"(?P<divergence>[a-z_]+)-(?P<rows>[1-9]\d*)x(?P<vocab>[1-9]\d*)-(?P<dtype>[a-z0-9]+)")


@dataclass(frozen=True)
class Case:
    """One training step of the loss: forward and backward over (rows, vocab) logits of student and teacher."""

    divergence: str
    rows: int  # tokens
    vocab: int  # columns
    dtype: str  # of the logits and the gradient: a key of DTYPES

    @property
    def name(self) -> str:
        """Such as ``forward_kl-512x128256-bf16``; :meth:`parse` reads it back."""
        return f"{self.divergence}-{self.rows}x{self.vocab}-{self.dtype}"

    @property
    def floor_bytes(self) -> int:
        """Bytes that any implementation moves: read student, read teacher, write the gradient."""
        return 3 * self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @staticmethod
    def parse(name: str) -> Case:
        """The case of this name, declared below or not.

        Raises:
            BenchError: not the name of a case.
        """
        match = _NAME.fullmatch(name)
        if match and match["divergence"] in DIVERGENCES and match["dtype"] in DTYPES:
            return Case(match["divergence"], int(match["rows"]), int(match["vocab"]), match["dtype"])
        msg = (
            f"{name!r} is not a case: expected DIVERGENCE-ROWSxVOCABULARY-DTYPE such as forward_kl-512x128256-bf16, "
            f"with a divergence of {', '.join(DIVERGENCES)} and a dtype of {', '.join(DTYPES)}"
        )
        raise BenchError(msg)


def _grid(divergences: Iterable[str], shapes: Iterable[tuple[int, int]]) -> tuple[Case, ...]:
    pairs = list(shapes)
    return tuple(Case(d, rows, vocab, dtype) for rows, vocab in pairs for d in divergences for dtype in DTYPES)


#: The full selection. Vocabularies of Llama 3 and Qwen 2.5, of Llama 2, of ImageNet's classes (1000, no multiple of a
#: vector), and two odd ones: GPT-2's, and Qwen 2.5's without its padding. Rows keep a case near 65 M elements.
FULL = (
    *_grid(DIVERGENCES, [(512, 128256), (512, 151936)]),
    *_grid(["forward_kl"], [(2048, 32000), (8192, 1000), (1024, 50257), (384, 151643)]),
)

#: The selection for a CI: every divergence and both dtypes, in a minute or two. Every gradient is larger than 32 MiB:
#: up to there glibc may or may not keep freed memory, so that one step takes 64,000 page faults in one run and none in
#: the next.
QUICK = (
    Case("forward_kl", 320, 32000, "fp32"),
    Case("forward_kl", 576, 32000, "bf16"),
    Case("reverse_kl", 384, 50257, "bf16"),
    Case("jsd", 320, 32000, "fp32"),
    Case("forward_kl", 10240, 1000, "fp32"),
)


def select(patterns: Sequence[str], *, quick: bool) -> list[Case]:
    """The cases that match any of the patterns; all of the selection where none is given.

    Args:
        patterns: globs over the names of :data:`FULL` and :data:`QUICK`, or the name of any other case, which need not
            be declared.
        quick: choose from :data:`QUICK`; otherwise from :data:`FULL`, and from :data:`QUICK` for what FULL lacks.

    Raises:
        BenchError: a pattern that matches nothing and names no case.
    """
    if not patterns:
        return list(QUICK if quick else FULL)
    pool = QUICK if quick else (*FULL, *QUICK)
    chosen: dict[Case, None] = {}  # ordered, each once
    for pattern in patterns:
        found = [case for case in pool if fnmatch.fnmatchcase(case.name, pattern)]
        if not found and any(c in pattern for c in "*?["):
            msg = f"--case {pattern}: no case matches; kdfast bench --list shows them all"
            raise BenchError(msg)
        chosen.update(dict.fromkeys(found or [Case.parse(pattern)]))
    return list(chosen)
