"""Packed targets on a GPU; of their values nothing is looked at there, and nothing beyond ``data`` is read."""

from __future__ import annotations

import importlib
import importlib.util

from torch import Tensor

from kdfast.spec.packed import unpacked_like


def unpack(
    data: Tensor, offset: Tensor, top: Tensor, k_eff: Tensor | None, kept: int, vocab_size: int, grid: int
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of packed tokens, as :class:`kdfast.PackedTargets` has their fields.

    Raises:
        RuntimeError: no Triton.
    """
    if importlib.util.find_spec("triton") is None:
        msg = "packed targets are unpacked on a GPU by Triton, which is not installed: unpack() them on the CPU first"
        raise RuntimeError(msg)
    ids, logprobs = unpacked_like(offset, kept)
    launcher = importlib.import_module("kdfast.kernels.triton.unpack_launch")
    launcher.run(data, offset, top, k_eff, vocab_size, grid, ids, logprobs)
    return ids, logprobs
