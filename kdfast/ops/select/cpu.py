"""The compiled selection of sparse targets: a chunk of logits in, tensors filled."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.spec.selection import Request, Selected, empty
from kdfast.views import _core, contiguous_rows, view


def select(logits: Tensor, request: Request, first_token: int) -> Selected:
    """What :func:`kdfast.spec.selection.select` computes, for fp32, bf16 and fp16 (..., V) on the CPU."""
    logits = contiguous_rows(logits)
    out = empty(logits, request)
    _core.select(
        logits=view(logits),
        method=request.method,
        k=request.most,
        least=request.least,
        p=request.p,
        temperatures=request.temperatures,
        seed=request.seed,
        first_token=first_token,
        threads=torch.get_num_threads(),
        **{name: view(x) for name, x in out._asdict().items() if x is not None},
    )
    return out
