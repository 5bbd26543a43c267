"""Attention of transformers: heads split, scores, and which pairs of tokens count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.methods.feature.pairs import Layer, layers_of
from kdfast.methods.feature.tensors import check_mask, without_padding
from kdfast.methods.step import Outputs


def check_heads(heads: int, argument: str) -> int:
    """Checks a number of heads.

    Raises:
        ValueError: it is not positive.
    """
    if heads < 1:
        msg = f"{argument} must be at least 1, got {heads}"
        raise ValueError(msg)
    return heads


def projections(outputs: Outputs, patterns: Sequence[str], count: int, who: str) -> list[tuple[Layer, ...]]:
    """The queries and keys, and values, of each of a model's attention layers.

    Args:
        outputs: the model's.
        patterns: ``count`` of them, or one of a projection that makes queries, keys and values one after another.
        count: 2 or 3.
        who: for messages.

    Raises:
        ValueError: patterns that name unlike numbers of layers, or a fused projection that three does not divide.
    """
    if len(patterns) == 1:
        found = []
        for layer in layers_of(outputs, patterns):
            if layer.tensor.dim() != 3 or layer.tensor.shape[2] % 3:
                msg = (
                    f"{who} {layer.name} is {tuple(layer.tensor.shape)}, and a projection to all of queries, keys and "
                    f'values is (B, S, 3 H): name them one by one, as "layer.5.attention.self.{{query,key,value}}"'
                )
                raise ValueError(msg)
            parts = layer.tensor.chunk(3, dim=2)[:count]
            names = ("queries", "keys", "values")
            found.append(
                tuple(
                    layer._replace(tensor=x, name=f"{layer.name} {what}") for x, what in zip(parts, names, strict=False)
                )
            )
        return found
    sides = [layers_of(outputs, [pattern]) for pattern in patterns]
    if len({len(side) for side in sides}) > 1:
        numbers = ", ".join(f"{pattern!r} {len(side)}" for pattern, side in zip(patterns, sides, strict=True))
        msg = f"{who}: the patterns name unlike numbers of layers: {numbers}"
        raise ValueError(msg)
    return list(zip(*sides, strict=True))


def split_heads(layer: Layer, heads: int, who: str, mask: Tensor | None) -> Tensor:
    """(B, S, H) as (B, heads, S, H / heads), with zeros at padded tokens.

    Raises:
        ValueError: H is not divisible by the number of heads, or the layer or mask is of another shape.
    """
    x = layer.tensor
    if x.dim() != 3 or x.shape[2] % heads:
        msg = (
            f"{who} {layer.name} is {tuple(x.shape)}, and (B, S, H) is needed with H divisible by {heads} heads: name "
            'the query, key and value projections, as "encoder.layer.5.attention.self.{query,key,value}"'
        )
        raise ValueError(msg)
    if mask is not None:
        check_mask(mask, layer, x.shape[1])
        mask = mask.to(x.device)
    x = without_padding(x, mask)
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def scores(a: Tensor, b: Tensor) -> Tensor:
    """Scores a b' / sqrt(d), (B, A, S, S), of heads (B, A, S, d)."""
    return a @ b.mT / math.sqrt(a.shape[-1])


def query_key_scores(query: Layer, key: Layer, heads: int, who: str, mask: Tensor | None) -> Layer:
    """Scores (B, A, S, S) of a layer's queries and keys.

    Raises:
        ValueError: widths that differ or that the number of heads does not divide.
    """
    if query.tensor.shape != key.tensor.shape:
        msg = (
            f"{who} {query.name} is {tuple(query.tensor.shape)}, {key.name} is {tuple(key.tensor.shape)}: queries and "
            "keys must be of one shape, which those of grouped-query attention are not"
        )
        raise ValueError(msg)
    q, k = (split_heads(layer, heads, who, mask) for layer in (query, key))
    return query._replace(tensor=scores(q, k), name=f"{query.name} with {key.name}")


def visible(
    mask: Tensor | None, documents: Tensor | None, length: int, causal: bool, device: torch.device
) -> Tensor | None:
    """Which keys a query sees, broadcastable to (B, A, S, S).

    Tokens that count, in packed rows those of its own document, and none later where ``causal``.
    """
    seen = None if mask is None else mask[:, None, None, :]
    if documents is not None and documents.shape[1] == length:
        own = documents.to(device)
        own = own[:, None, :, None] == own[:, None, None, :]
        seen = own if seen is None else seen & own
    if causal:
        before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        seen = before if seen is None else seen & before
    return seen
