"""How a batch is split into what the models take and what the losses take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

#: Fields of a mapping that are for the losses, not for the models.
FIELDS = ("labels", "weights", "token_mask", "index", "targets", "id")


@dataclass(frozen=True)
class Inputs:
    """One batch, split.

    Attributes:
        args: positional arguments of the models.
        kwargs: keyword arguments of the models.
        labels: (...) int64, or None.
        weights: (...) per token, or None.
        mask: (B, S) bool, the tokens that are not padding, or None.
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


#: A function of a batch.
Split: TypeAlias = Callable[[Any], Inputs]


def split_batch(batch: Any) -> Inputs:
    """Splits the usual batches.

    A mapping: ``labels``, ``weights``, ``token_mask``, ``index``, ``targets`` and ``id`` are for the losses, the rest
    for the models, by name; ``attention_mask`` is for both. A tuple or list of up to three: inputs, labels, index. A
    tensor: inputs.

    Raises:
        TypeError: a batch of another form.
    """
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Tensor):
        return Inputs(args=(batch,))
    if isinstance(batch, Mapping):
        mask = batch.get("token_mask", batch.get("attention_mask"))
        return Inputs(
            kwargs={name: value for name, value in batch.items() if name not in FIELDS},
            labels=batch.get("labels"),
            weights=batch.get("weights"),
            mask=mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            index=batch.get("index"),
            targets=batch.get("targets"),
            keys=batch.get("id"),
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


def accepted(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a model's ``forward`` has, all of them where it takes ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in parameters}
