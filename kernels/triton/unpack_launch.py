"""Launches the kernel that unpacks targets: tensors in, tensors filled. Never asks the device for a value."""

from __future__ import annotations

from torch import Tensor

from kdfast.kernels.triton import dense_launch, unpack

#: Entries that a program has in registers at a time.
BLOCK = 1024


def run(
    data: Tensor,
    offset: Tensor,
    top: Tensor,
    k_eff: Tensor | None,
    vocab_size: int,
    grid: int,
    ids: Tensor,
    logprobs: Tensor,
) -> None:
    """Fills ids (..., K) int32 and logprobs (..., K) fp32; see :func:`kdfast.ops.unpack.unpack`."""
    kept = ids.shape[-1]
    if ids.numel() == 0:
        return
    block = min(BLOCK, max(32, 1 << (kept - 1).bit_length()))
    with dense_launch._on(data.device):
        dense_launch.launch(
            unpack.unpack_kernel,
            (offset.numel(),),
            unpack.packed_of(data, vocab_size, grid),
            offset.contiguous(),
            top.contiguous(),
            None if k_eff is None else k_eff.contiguous(),
            ids,
            logprobs,
            kept,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
