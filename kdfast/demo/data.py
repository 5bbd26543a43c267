"""Batches of token sequences in an order that depends on the seed alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def places(tokens: int, context: int, count: int) -> Tensor:
    """Returns the numbers of the sequences that `sequences` cuts out of a stream of so many tokens.

    A stream is a row of sequences of `context` + 1 tokens, numbered from 0; the number is the name of the same text
    however many are asked for.
    """
    whole = tokens // (context + 1)
    count = min(count, whole)
    return torch.arange(count) * whole // max(1, count)


def sequences(stream: Tensor, context: int, count: int) -> Tensor:
    """Cuts evenly spaced, non-overlapping sequences out of a stream.

    Args:
        stream: (N,) int64 token ids.
        context: tokens a model reads at once; a sequence holds one more, the last token's label.
        count: sequences wanted; all that fit when fewer do.

    Returns:
        (min(count, N // (context + 1)), context + 1) int64.

    Raises:
        ValueError: not one sequence fits.
    """
    length = context + 1
    whole = stream[: stream.numel() // length * length].view(-1, length)
    if not len(whole):
        msg = f"stream holds {stream.numel()} tokens, fewer than one sequence of {length}"
        raise ValueError(msg)
    return whole[places(stream.numel(), context, count)]


def batch_order(count: int, batch: int, steps: int, seed: int) -> Tensor:
    """Orders samples for training: one shuffled pass after another, no sample twice before all were seen once.

    Returns:
        (steps, batch) int64 sample indices below count.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * batch / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return order[: steps * batch].view(steps, batch)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Returns the share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
