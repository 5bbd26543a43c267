"""The compiled selection of sparse targets: a chunk of logits in, tensors filled."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.dense.cpu import _contiguous_rows, _view
from kdfast.spec.selection import Request, Selected, empty


def select(logits: Tensor, request: Request, first_token: int) -> Selected:
    """What :func:`kdfast.spec.selection.select` computes, for fp32, bf16 and fp16 (..., V) on the CPU."""
    from kdfast import _core

    logits = _contiguous_rows(logits)
    out = empty(logits, request)
    _core.select(
        logits=_view(logits),
        method=request.method,
        k=request.most,
        least=request.least,
        p=request.p,
        temperatures=request.temperatures,
        seed=request.seed,
        first_token=first_token,
        threads=torch.get_num_threads(),
        **{name: _view(x) for name, x in out._asdict().items() if x is not None},
    )
    return out
