"""Functions that a compiler goes around."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(fn: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, which imports ``torch._dynamo`` and its seconds, put off until that is there.

    Whoever compiles has imported it; everybody else does not pay for it with the import of kdfast.
    """

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if sys.modules.get("torch._dynamo") is None:
            return fn(*args, **kwargs)
        return _disabled(fn)(*args, **kwargs)  # type: ignore[no-any-return]

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable leaves on a function
    return call


@functools.cache
def _disabled(fn: Callable[..., Any]) -> Any:
    return torch.compiler.disable(fn)
