"""Functions that a compiler goes around, always or where it is too old."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

#: The first torch whose compiler takes a loss into its graph, and finds the right gradient there.
TRACING = (2, 12)

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(fn: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, which imports ``torch._dynamo`` and its seconds, put off until that is there.

    Whoever compiles has imported it; everybody else does not pay for it with the import of kdfast.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if sys.modules.get("torch._dynamo") is None:
            return fn(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(fn)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable leaves on a function
    return call


def in_graphs(fn: Callable[P, R]) -> Callable[P, R]:
    """A function that a compiler traces; one that cannot, of a torch before ``TRACING``, goes around it."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return fn if version >= TRACING else outside_graphs(fn)
