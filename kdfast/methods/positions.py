"""Which positions of the logits count: one rule, for the losses, for their denominators and for reports.

A position counts where its label is not -100 and where it is a token's. Which positions are tokens' is what
``token_mask`` says; without one the attention mask, where it has the logits' axes and belongs to them: in an
encoder-decoder model that is the decoder's, never the source's. With ``causal`` position i predicts token i + 1, so
both must be tokens, and of one document: in packed rows another one begins where ``position_ids`` do not rise.

So neither what stands in padding nor its side or amount changes a value, nor what a document is packed with.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.methods.batch import Inputs, accepted
from kdfast.methods.layers import unwrapped
from kdfast.methods.step import IGNORED

_PACKED_POSITIONS = 4  # (4, B, S): those of the text, then three of images, in a vision-language model's packed rows


def encoder_decoder(model: nn.Module | None, inputs: Inputs) -> bool:
    """Whether the logits are a decoder's, whose positions are not those of ``input_ids``."""
    config = None if model is None else getattr(unwrapped(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or any(
        name.startswith("decoder_input") for name in inputs.kwargs
    )


def arguments(model: nn.Module, inputs: Inputs, unlabelled: int | None = None) -> dict[str, Any]:
    """What a model is called with by name: of the batch what its ``forward`` takes, never the labels.

    An encoder-decoder model that predicts tokens, and whose decoder's inputs are not there, gets them made of the
    labels (B, S), as it would do itself if the labels were passed to it: it would then compute a loss of its own as
    well. Its own ``prepare_decoder_input_ids_from_labels`` makes them, or, where it has none, its configuration's
    ``decoder_start_token_id`` stands before them.

    Raises:
        ValueError: labels may be ``unlabelled``, which is no token that a decoder could see; a model without either.
    """
    given = dict(inputs.kwargs)
    labels = inputs.labels
    there = any(name.startswith("decoder_input") for name in given)
    if labels is None or labels.dim() != 2 or labels.is_floating_point() or not _predicts_tokens(unwrapped(model)):
        return accepted(unwrapped(model), given)
    if not there and encoder_decoder(model, inputs):
        if unlabelled is not None:
            msg = f"labels may be {unlabelled}, which is no token that a decoder could see: pass decoder_input_ids too"
            raise ValueError(msg)
        given["decoder_input_ids"] = _decoder_inputs(unwrapped(model), labels)
    return accepted(unwrapped(model), given)


def _predicts_tokens(model: Any) -> bool:
    """Whether labels are tokens: neither classes nor the ends of a span."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return True
    return hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        made: Tensor = prepare(labels=labels)
        return made
    start, pad = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        msg = (
            f"{type(model).__name__} is called without labels, and its configuration has no decoder_start_token_id or "
            "no pad_token_id to make the decoder's inputs of them: pass decoder_input_ids too"
        )
        raise ValueError(msg)
    before = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=start)
    return before.masked_fill(before == IGNORED, pad)


def tokens_of_logits(inputs: Inputs, *, two_sided: bool) -> Tensor | None:
    """The mask (B, S) bool of the axis that the logits are on; None where none is said to be that."""
    if inputs.token_mask is not None:
        return inputs.token_mask
    return inputs.decoder_mask if two_sided else inputs.mask


def documents(position_ids: Any) -> Tensor | None:
    """(B, S) int64, the number of each token's document in its row; None where no positions are given."""
    if not isinstance(position_ids, Tensor):
        return None
    if position_ids.dim() == 3 and len(position_ids) == _PACKED_POSITIONS:
        position_ids = position_ids[0]
    if position_ids.dim() != 2:
        return None
    begins = position_ids[:, 1:] <= position_ids[:, :-1]
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0))


def predicting(
    places: torch.Size, tokens: Tensor | None, document: Tensor | None, *, causal: bool, device: torch.device
) -> Tensor | None:
    """Which positions of the logits are about a token, whatever the labels say.

    Args:
        places: shape of the logits but for V.
        tokens: (B, S) bool, or None: all.
        document: (B, S) of each token, or None: one a row.
        causal: position i is about token i + 1.
        device: where it is wanted.

    Returns:
        ``places`` bool, with ``causal`` False at the last position; None where all count.
    """
    # A mask that has other axes is of something else: the tokens of a text that is classified as a whole.
    counts = tokens.to(device) if tokens is not None and tokens.shape == places else None
    if not causal or len(places) != 2:
        return counts
    if counts is None:
        counts = torch.ones(places, dtype=torch.bool, device=device)
    after = counts[:, :-1] & counts[:, 1:]
    if document is not None and document.shape[1] == places[1] and len(document) in (1, places[0]):
        after = after & (document[:, 1:] == document[:, :-1]).to(device)
    return torch.nn.functional.pad(after, (0, 1), value=False)


def is_span(raw: Any) -> bool:
    """Whether a model returned where an answer begins and ends, logits (B, 2, S) over the tokens of its text."""
    return (isinstance(raw, Mapping) and "start_logits" in raw) or hasattr(raw, "start_logits")


def within_text(logits: Any, raw: Any, tokens: Tensor | None) -> Any:
    """Logits of a span with -inf at padding, where no answer is; others as they are.

    Args:
        logits: of a model.
        raw: what it returned.
        tokens: (B, S) bool, or None: no padding.
    """
    if tokens is None or not is_span(raw) or not isinstance(logits, Tensor):
        return logits
    return logits.masked_fill(~tokens.to(logits.device)[:, None, :], -math.inf)


def count_items(inputs: Inputs, *, causal: bool, two_sided: bool, unlabelled: int | None = None) -> Tensor:
    """How much of a batch counts, 0-d, before a model has seen it: what ``num_items`` is a sum of.

    Positions, or their weights, with a label that is not -100; without labels those that are tokens'; examples where
    there is nothing of tokens.

    Args:
        inputs: the batch.
        causal: logits at position i are compared with the label at i + 1.
        two_sided: of an encoder-decoder model.
        unlabelled: see :class:`kdfast.Distiller`.
    """
    labels, tokens = inputs.labels, tokens_of_logits(inputs, two_sided=two_sided)
    # Class probabilities, (..., V); of a regression (B,), or (B, n) of n numbers each.
    whole = labels is not None and labels.is_floating_point()
    of = _in_place_of_labels(inputs, tokens, two_sided=two_sided) if labels is None else labels
    places = of.shape[:-1] if whole and of.dim() > 1 else of.shape
    document = None if two_sided else documents(inputs.positions)
    counts = predicting(places, tokens, document, causal=causal, device=of.device)
    kept = torch.ones(places, dtype=torch.bool, device=of.device)
    if labels is not None and not whole:
        kept = labels != IGNORED
    amount = kept if inputs.weights is None else kept * inputs.weights
    if causal and len(places) == 2:
        amount = torch.nn.functional.pad(amount[:, 1:], (0, 1))
    return (amount if counts is None else torch.where(counts, amount, 0)).sum()


def _in_place_of_labels(inputs: Inputs, tokens: Tensor | None, *, two_sided: bool) -> Tensor:
    """A tensor of the shape that labels would have: tokens, or one a sample."""
    ids, embedded = (("decoder_" if two_sided else "") + name for name in ("input_ids", "inputs_embeds"))
    for found in (tokens, inputs.weights, inputs.kwargs.get(ids)):
        if isinstance(found, Tensor):
            return found
    if isinstance(inputs.kwargs.get(embedded), Tensor):
        each: Tensor = inputs.kwargs[embedded][..., 0]
        return each
    first = next(x for x in (*inputs.args, *inputs.kwargs.values()) if isinstance(x, Tensor))
    return first.flatten(1)[:, 0] if first.dim() > 1 else first


def placed(targets: Any, tokens: Tensor | None) -> Any:
    """Stored targets, whose row i is of a sample's token i, at the positions that the tokens have in the batch.

    Args:
        targets: (B, S', K). Those of another length than the batch, and those that have entries in the first rows of
            each sample alone, are as :func:`kdfast.cache.collate` makes them; others are where they belong.
        tokens: (B, S) bool; None: no padding.
    """
    if tokens is None or tokens.dim() != 2 or len(targets.shape) != 3 or len(tokens) != targets.shape[0]:
        return targets
    tokens = tokens.to(_device(targets))
    rows = (tokens.cumsum(1) - 1).clamp(0, max(targets.shape[1] - 1, 0))
    if tokens.shape == targets.shape[:2]:
        if targets.k_eff is None:  # every position has entries: a model's, run on this batch
            return targets
        place = torch.arange(tokens.shape[1], device=tokens.device)
        first = ((targets.k_eff > 0) == (place < tokens.sum(1, keepdim=True))).all(1, keepdim=True)
        rows = torch.where(first, rows, place)
    return targets[torch.arange(len(tokens), device=tokens.device)[:, None], rows]


def _device(targets: Any) -> torch.device:
    device: torch.device = targets.device if hasattr(targets, "device") else targets.ids.device
    return device


def refuse_cut_sequences() -> None:
    """Raises where Accelerate cuts sequences over ranks, which have the label of i + 1 somewhere else.

    Raises:
        ValueError: context or sequence parallelism.
    """
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    config = None if state is None else state._shared_state.get("parallelism_config")
    for kind, name in (("cp", "context"), ("sp", "sequence")):
        if getattr(config, f"{kind}_enabled", False):
            msg = (
                f"causal=True under {name} parallelism ({kind}_size > 1): the label of position i + 1 may be on "
                "another rank: shift labels before the sequences are cut, and give causal=False"
            )
            raise ValueError(msg)


def warn_of_copies(inputs: Inputs, *, stacklevel: int) -> None:
    """Warns where labels are the tokens that a model sees at the same positions, which it would learn to copy.

    They are what language models are given by convention, to be shifted by who computes the loss. Looks at values.
    """
    ids, labels = inputs.kwargs.get("input_ids"), inputs.labels
    if not isinstance(ids, Tensor) or labels is None or labels.shape != ids.shape or ids.dim() < 2:
        return
    labels = labels.to(ids.device)
    kept = labels != IGNORED
    if bool((torch.where(kept, labels == ids, True).all() & kept.any()).item()):
        msg = (
            "labels are input_ids themselves, so that each token is its own label: a model that predicts the next one "
            "wants causal=True"
        )
        warnings.warn(msg, stacklevel=stacklevel + 1)


def masked(labels: Tensor, counts: Tensor | None) -> Tensor:
    """Labels whose positions do not count are -100; class probabilities are left to the weights."""
    if counts is None or labels.is_floating_point() or labels.shape != counts.shape:
        return labels
    return labels.masked_fill(~counts.to(labels.device), IGNORED)
