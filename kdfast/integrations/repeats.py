"""Samples that stand in an evaluation's last batches a second time, so that every rank has as many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdfast.methods.batch import split_batch
from kdfast.methods.step import IGNORED

_LABELS = ("labels", "start_positions", "end_positions")


def without_repeats(batch: Mapping[str, Any], accelerator: Any, *, two_sided: bool) -> Mapping[str, Any]:
    """A batch, of a loader that Accelerate has prepared, in which none of them counts.

    Args:
        batch: whose rows are samples.
        accelerator: of ``accelerate``.
        two_sided: of an encoder-decoder model.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    split = split_batch(batch)
    first = next(x for x in (split.labels, *split.kwargs.values(), *split.args) if isinstance(x, Tensor))
    place = torch.arange(len(first), device=first.device) + len(first) * accelerator.process_index
    kept = place < state.remainder
    if split.labels is not None and not split.labels.is_floating_point():
        names = [name for name in _LABELS if batch.get(name) is not None]
        return {**batch, **{name: batch[name].masked_fill(~_beside(kept, batch[name]), IGNORED) for name in names}}
    tokens = split.decoder_mask if two_sided else split.mask
    if tokens is not None and split.labels is None:
        return {**batch, "token_mask": (tokens if split.token_mask is None else split.token_mask) & kept[:, None]}
    weights = kept.float() if split.weights is None else split.weights * _beside(kept, split.weights)
    return {**batch, "weights": weights}


def _beside(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (x.dim() - 1))
