"""Packed targets to ids and log-probabilities, as an operator: compiled on the CPU, Triton on a GPU."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from kdfast.ops.dense.cpu import _view

_library = torch.library.Library("kdfast", "FRAGMENT")
_library.define(
    "unpack(Tensor data, Tensor offset, Tensor top, Tensor? k_eff, int kept, int vocab_size, int grid) "
    "-> (Tensor ids, Tensor logprobs)"
)


def unpack(
    data: Tensor, offset: Tensor, top: Tensor, k_eff: Tensor | None, kept: int, vocab_size: int, grid: int
) -> tuple[Tensor, Tensor]:
    """Ids (..., K) int32, -1 beyond k_eff, and logprobs (..., K) fp32, -inf there; the same bits on every device.

    Args:
        data: (bytes,) uint8, as :class:`kdfast.PackedTargets` has it.
        offset: (...) int32, where each token begins, in units of 4 bytes.
        top: (...) fp32, nats.
        k_eff: (...) int32, or None where each token has K.
        kept: K.
        vocab_size: of the teacher.
        grid: a step is 2^-grid nats.

    Raises:
        ValueError: tokens that cannot have been packed; on the CPU only, on a GPU nothing is looked at beyond data.
        RuntimeError: tensors on a GPU, and no Triton.
    """
    ids, logprobs = torch.ops.kdfast.unpack(data, offset, top, k_eff, kept, vocab_size, grid)
    return ids, logprobs


def _empty(offset: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    shape = (*offset.shape, kept)
    ids = torch.empty(shape, dtype=torch.int32, device=offset.device)
    return ids, torch.empty(shape, dtype=torch.float32, device=offset.device)


def _unpack_cpu(
    data: Tensor, offset: Tensor, top: Tensor, k_eff: Tensor | None, kept: int, vocab_size: int, grid: int
) -> tuple[Tensor, Tensor]:
    from kdfast import _core

    ids, logprobs = _empty(offset, kept)
    data, offset, top = data.contiguous(), offset.contiguous(), top.contiguous()
    k_eff = None if k_eff is None else k_eff.contiguous()
    _core.unpack(
        data=_view(data),
        offset=_view(offset),
        top=_view(top),
        k_eff=None if k_eff is None else _view(k_eff),
        vocab_size=vocab_size,
        grid=grid,
        ids=_view(ids.view(-1, kept)),
        logprobs=_view(logprobs.view(-1, kept)),
        threads=torch.get_num_threads(),
    )
    return ids, logprobs


def _unpack_triton(
    data: Tensor, offset: Tensor, top: Tensor, k_eff: Tensor | None, kept: int, vocab_size: int, grid: int
) -> tuple[Tensor, Tensor]:
    if importlib.util.find_spec("triton") is None:
        msg = "packed targets are unpacked on a GPU by Triton, which is not installed: unpack() them on the CPU first"
        raise RuntimeError(msg)
    ids, logprobs = _empty(offset, kept)
    launcher = importlib.import_module("kdfast.kernels.triton.unpack_launch")
    launcher.run(data, offset, top, k_eff, vocab_size, grid, ids, logprobs)
    return ids, logprobs


_library.impl("unpack", _unpack_cpu, "CPU")
_library.impl("unpack", _unpack_triton, "CUDA")
torch.library.register_fake("kdfast::unpack", lambda data, offset, top, k_eff, kept, *_: _empty(offset, kept))
