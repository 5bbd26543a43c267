"""A trainer's collator, beside which the columns for a Distiller's losses are collated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.dataset import collate

#: Fields of a sample that no trainer's collator knows.
OWN = ("targets", "id", "index", "weights", "token_mask")


class Collator:
    """Gives a trainer's collator the fields that it knows, and collates the losses' own beside them.

    ``targets`` of a cache are stacked with the rows of each sample first: a Distiller puts them where the batch's
    tokens are, whichever side is padded. ``weights`` and ``token_mask`` of a sample's tokens are put there here.

    Args:
        collator: the trainer's.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):  # of one that is being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: list[Any]) -> Any:
        """One batch of samples.

        Raises:
            ValueError: a sample has not one of ``weights`` or ``token_mask`` for each of its tokens; samples that the
                collator puts into one row, which have targets, weights or masks.
        """
        there = [name for name in OWN if isinstance(features[0], Mapping) and name in features[0]]
        if not there:
            return self.collator(features)
        batch = self.collator([{k: v for k, v in f.items() if k not in there} for f in features])
        tokens = batch.get("attention_mask")
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and len(ids) != len(features):
            msg = (
                f"the collator made {len(ids)} rows of {len(features)} samples that have {', '.join(there)}: what is "
                "known by sample cannot be packed, give packing=False and padding_free=False"
            )
            raise ValueError(msg)
        for name in there:
            values = [f[name] for f in features]
            if name == "targets":
                batch[name] = collate([{"targets": one} for one in values])["targets"]
            elif name == "id":
                batch[name] = values
            else:
                batch[name] = _at_tokens(name, [torch.as_tensor(one) for one in values], tokens)
        return batch


def _at_tokens(name: str, values: Sequence[Tensor], tokens: Tensor | None) -> Tensor:
    """Values of each sample's tokens, where the tokens are in the batch; values of whole samples, stacked."""
    if any(one.dim() != 1 for one in values) or tokens is None or tokens.dim() != 2:
        return torch.stack(list(values))
    out = values[0].new_zeros(tokens.shape)
    for row, one, there in zip(out, values, tokens.bool(), strict=True):
        if len(one) != int(there.sum()):
            msg = f"{name} has {len(one)} values of a sample with {int(there.sum())} tokens in the batch"
            raise ValueError(msg)
        row[there] = one
    return out
