"""The selection of sparse targets in Triton: a chunk of logits in, tensors filled."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from kdfast.spec.selection import Request, Selected, empty


def _launcher() -> Any:
    return importlib.import_module("kdfast.kernels.triton.select_launch")


def declines(request: Request, columns: int) -> str | None:
    """Why the kernels, where there are any, cannot serve a request."""
    launcher = _launcher()
    if request.most > launcher.MOST_K:
        return f"k = {request.most} (they keep up to {launcher.MOST_K})"
    if columns > launcher.MOST_COLUMNS:
        return f"{columns} columns (they take up to {launcher.MOST_COLUMNS})"
    return None


@torch.no_grad()
def select(logits: Tensor, request: Request, first_token: int) -> Selected:
    """As :func:`kdfast.spec.selection.select`, for fp32, bf16 and fp16 (..., V), without waiting for the GPU."""
    out = empty(logits, request)
    _launcher().run(logits, request, first_token, out)
    return out
