"""A trainer's collator, beside which the columns for a Distiller's losses are collated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.dataset import collate
from kdfast.methods.step import IGNORED
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets

#: Fields of a sample that no trainer's collator knows.
OWN = ("targets", "id", "index", "weights", "token_mask")


class Collator:
    """Gives a trainer's collator the fields that it knows, and collates the losses' own beside them.

    ``targets`` of a cache are stacked with the rows of each sample first: a Distiller puts them where the batch's
    tokens are, whichever side is padded. ``weights`` and ``token_mask`` of a sample's tokens are put there here.

    Args:
        collator: the trainer's.
        two_sided: tokens are the labels of an encoder-decoder model, not those of its input.
        keyed: ``id`` is a key of a cache; else it is left out, as other columns that nobody knows.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], *, two_sided: bool = False, keyed: bool = True) -> None:
        self.collator = collator
        self.two_sided = two_sided
        self.keyed = keyed

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
        if self.collator is collate:  # which knows them
            return collate(features)
        there = [name for name in OWN if isinstance(features[0], Mapping) and name in features[0]]
        if not there:
            return self.collator(features)
        batch = self.collator([{k: v for k, v in f.items() if k not in there} for f in features])
        there = [name for name in there if name != "id" or self.keyed]
        tokens = batch["labels"] != IGNORED if self.two_sided and "labels" in batch else batch.get("attention_mask")
        ids = batch.get("input_ids")
        if there and isinstance(ids, Tensor) and len(ids) != len(features):
            msg = (
                f"the collator made {len(ids)} rows of {len(features)} samples that have {', '.join(there)}: what is "
                "known by sample cannot be packed, give packing=False and padding_free=False"
            )
            raise ValueError(msg)
        for name in there:
            values = [f[name] for f in features]
            if name == "targets":
                if not isinstance(values[0], (SparseTargets, PackedTargets)):
                    msg = (
                        f"the column 'targets' is a cached teacher's, got {type(values[0]).__name__}: rename or drop it"
                    )
                    raise ValueError(msg)
                batch[name] = collate([{"targets": one} for one in values])["targets"]
            elif name == "id":
                batch[name] = values
            else:
                batch[name] = _at_tokens(name, values, tokens)
        return batch


def _at_tokens(name: str, given: Sequence[Any], tokens: Tensor | None) -> Tensor:
    """Values of each sample's tokens, where the tokens are in the batch; values of whole samples, stacked."""
    try:
        values = [torch.as_tensor(one) for one in given]
    except (TypeError, ValueError) as error:
        msg = f"the column {name!r} is the losses', and must hold numbers: rename or drop it if it is something else"
        raise ValueError(msg) from error
    if any(one.dim() != 1 for one in values) or tokens is None or tokens.dim() != 2:
        if len({one.shape for one in values}) > 1:
            msg = f"{name} differs in length between samples, and the batch has no attention_mask to place it by"
            raise ValueError(msg)
        return torch.stack(values)
    out = values[0].new_zeros(tokens.shape)
    for row, one, there in zip(out, values, tokens.bool(), strict=True):
        if len(one) != int(there.sum()):
            msg = f"{name} has {len(one)} values of a sample with {int(there.sum())} tokens in the batch"
            raise ValueError(msg)
        row[there] = one
    return out
