"""Functions that a compiler goes around."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(fn: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, which imports ``torch._dynamo`` and its seconds, put off until that is there.

    Whoever compiles has imported it; everybody else does not pay for it with the import of kdfast.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if sys.modules.get("torch._dynamo") is None:
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(fn))
        return disabled[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable leaves on a function
    return call
