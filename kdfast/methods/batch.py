"""How a batch is split into what the models take and what the losses take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

#: Fields of a mapping that are for the losses, not for the models.
FIELDS = ("labels", "start_positions", "end_positions", "weights", "token_mask", "index", "targets", "id")


@dataclass(frozen=True)
class Inputs:
    """One batch, split.

    Attributes:
        args: positional arguments of the models.
        kwargs: keyword arguments of the models.
        labels: (...) int64, or None.
        weights: (...) per token, or None.
        mask: (B, S) bool, the tokens of the models' input that are not padding, or None.
        token_mask: (...) bool, the positions of the logits that are to count, in the place of ``mask``, or None.
        decoder_mask: (B, S') bool, of an encoder-decoder model the decoder's tokens, or None.
        positions: (B, S) int64 ``position_ids``, which begin anew with each document of a packed row, or None.
        index: (B,) int64 positions in the data set, or None.
        targets: a cached teacher's targets, or None.
        keys: keys of the samples in a cache, or None.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    index: Tensor | None = None
    targets: Any = None
    keys: Any = None
    token_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("mask", "token_mask", "decoder_mask"):  # tokenizers give them as integers
            mask = getattr(self, name)
            if mask is not None and mask.dtype != torch.bool:
                object.__setattr__(self, name, mask.bool())


#: A function of a batch.
Split: TypeAlias = Callable[[Any], Inputs]


def split_batch(batch: Any) -> Inputs:
    """Splits the usual batches.

    A mapping: ``labels``, ``weights``, ``token_mask``, ``index``, ``targets`` and ``id`` are for the losses, the rest
    for the models, by name; ``attention_mask``, ``decoder_attention_mask`` and ``position_ids`` are for both;
    ``start_positions`` and ``end_positions`` of an answer in a text are labels (B, 2). A tuple or list of up to three:
    inputs, labels, index. A tensor: inputs.

    Raises:
        TypeError: a batch of another form.
    """
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Tensor):
        return Inputs(args=(batch,))
    if isinstance(batch, Mapping):
        return Inputs(
            kwargs={name: value for name, value in batch.items() if name not in FIELDS},
            labels=_labels(batch),
            weights=batch.get("weights"),
            mask=_mask(batch.get("attention_mask")),
            index=batch.get("index"),
            targets=batch.get("targets"),
            keys=batch.get("id"),
            token_mask=batch.get("token_mask"),
            decoder_mask=_mask(batch.get("decoder_attention_mask")),
            positions=batch.get("position_ids"),
        )
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3:
        x, labels, index = (*batch, None, None)[:3]
        if isinstance(x, Mapping):
            return replace(split_batch(x), labels=labels, index=index)
        return Inputs(args=(x,), labels=labels, index=index)
    msg = (
        "a batch must be a mapping, a tensor, or (inputs, labels) with an optional index, got "
        f"{type(batch).__name__}: pass "
        "Distiller(split=) a function that returns kdfast.methods.Inputs"
    )
    raise TypeError(msg)


def _labels(batch: Mapping[str, Any]) -> Any:
    start, end = batch.get("start_positions"), batch.get("end_positions")
    if batch.get("labels") is not None or not isinstance(start, Tensor) or not isinstance(end, Tensor):
        return batch.get("labels")
    return torch.stack([start.flatten(), end.flatten()], 1)


def _mask(given: Any) -> Tensor | None:
    """One of tokens, (B, S); others, as (B, 1, S, S) of what each query sees, say nothing of padding alone."""
    return given if isinstance(given, Tensor) and given.dim() == 2 else None


def accepted(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a model's ``forward`` has, all of them where it takes ``**kwargs``."""
    if not kwargs:  # a scripted model tells no signature
        return {}
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in parameters}
