"""A cached teacher's targets of a batch, where its tokens are."""

from __future__ import annotations

from torch import Tensor

from kdfast.cache.dataset import collate
from kdfast.cache.reader import Reader
from kdfast.methods.batch import Inputs
from kdfast.methods.positions import placed
from kdfast.spec.packed import PackedTargets
from kdfast.spec.sparse import SparseTargets


def stored(reader: Reader, inputs: Inputs, *, two_sided: bool) -> SparseTargets | PackedTargets:
    """Targets that came with the batch, or else are read by its keys.

    Args:
        reader: the cache.
        inputs: the batch.
        two_sided: of an encoder-decoder model, whose decoder's tokens the targets are of.

    Raises:
        KeyError: neither targets nor keys.
    """
    padding = inputs.decoder_mask if two_sided else inputs.mask
    if inputs.targets is not None:
        found: SparseTargets | PackedTargets = placed(inputs.targets, padding)
        return found
    if inputs.keys is None:
        msg = 'a cached teacher needs the batch\'s "targets" (kdfast.cache.Dataset) or its keys in "id"'
        raise KeyError(msg)
    padding = inputs.token_mask if padding is None else padding
    keys = inputs.keys.tolist() if isinstance(inputs.keys, Tensor) else list(inputs.keys)
    # Of an encoder-decoder model the distributions are of the decoder's tokens, which are not the input's.
    tokens = None if two_sided else inputs.kwargs.get("input_ids")
    if tokens is not None and padding is not None:
        tokens = [row[there] for row, there in zip(tokens, padding, strict=True)]
    read = reader.read([str(key) for key in keys], None if tokens is None else list(tokens))
    stacked: SparseTargets = placed(collate([{"targets": one} for one in read])["targets"], padding)
    return stacked
