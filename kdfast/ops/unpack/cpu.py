"""Packed targets on the CPU, by the decoder that the cache's reader has."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.spec.packed import unpacked_like
from kdfast.views import _core, view


def unpack(
    data: Tensor, offset: Tensor, top: Tensor, k_eff: Tensor | None, kept: int, vocab_size: int, grid: int
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of packed tokens, as :class:`kdfast.PackedTargets` has their fields.

    Raises:
        ValueError: tokens that cannot have been packed.
    """
    ids, logprobs = unpacked_like(offset, kept)
    data, offset, top = data.contiguous(), offset.contiguous(), top.contiguous()
    k_eff = None if k_eff is None else k_eff.contiguous()
    _core.unpack(
        data=view(data),
        offset=view(offset),
        top=view(top),
        k_eff=None if k_eff is None else view(k_eff),
        vocab_size=vocab_size,
        grid=grid,
        ids=view(ids.view(-1, kept)),
        logprobs=view(logprobs.view(-1, kept)),
        threads=torch.get_num_threads(),
    )
    return ids, logprobs
