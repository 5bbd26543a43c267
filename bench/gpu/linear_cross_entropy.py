"""The cross-entropy of an `LMHead` without a teacher in the suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench import heads
from bench.gpu.head import HeadCase, Inputs, errors_against_fp64, tolerance

__all__ = ["Inputs", "cases", "competitors", "gradient_errors", "tolerance"]


def cases(*, rehearse: bool) -> Iterator[HeadCase]:
    """Most telling first: the suite stops at its deadline."""
    if rehearse:
        yield HeadCase("cross_entropy", 6, 300, 32)
        yield HeadCase("cross_entropy", 6, 301, 32, "fp32")
        return
    for tokens, vocab, hidden in [(8192, 128256, 4096), (8192, 256000, 2304), (1024, 128256, 4096)]:
        yield HeadCase("cross_entropy", tokens, vocab, hidden)


def competitors(case: HeadCase, x: Inputs) -> heads.Steps:
    """Steps by name; the text of who cannot run it says why. kdfast stands first."""
    return heads.cross_entropy(x, backend="triton", compiles=x.hidden.is_cuda, triton=True)


def gradient_errors(case: HeadCase, device: torch.device) -> dict[str, Any]:
    """See :mod:`bench.gpu`."""
    return errors_against_fp64(case, device, heads.kdfast_cross_entropy, heads.eager_cross_entropy)
