"""Teachers of the job's tests, found by ``--factory cache_teachers:name`` in processes of their own."""

from __future__ import annotations

import os
import signal
import time

import torch

from kdfast import LMHead

V, H = 300, 16


class Tiny:
    """Logits from a token and the mean of those before it: causal, the same whatever stands beside it in a batch."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.embedding = torch.randn(V, H, generator=generator)
        self.weight = torch.randn(V, H, generator=generator)

    def hidden(self, input_ids):
        x = self.embedding[input_ids]
        return x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    def __call__(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        assert (input_ids[attention_mask == 0] == 0).all()
        return self.hidden(input_ids) @ self.weight.T


def dense():
    return Tiny()


def head():
    tiny = Tiny()
    return lambda ids, mask: LMHead(tiny.hidden(ids), tiny.weight)


def interrupted():
    """Ctrl-C in the third batch, while INTERRUPTED is set."""
    tiny, calls = Tiny(), []

    def forward(ids, mask):
        calls.append(1)
        if len(calls) == 4 and "INTERRUPTED" in os.environ:  # the first asks for the vocabulary
            os.kill(os.getpid(), signal.SIGINT)
        return tiny(ids, mask)

    return forward


def nan():
    return lambda ids, mask: torch.full((*ids.shape, V), float("nan"))


def transposed():
    return lambda ids, mask: torch.zeros(V, *ids.shape)


def nothing():
    return None


def broken():
    """Raises in the fifth batch."""
    tiny, calls = Tiny(), []

    def forward(ids, mask):
        calls.append(1)
        if len(calls) == 6:
            msg = "the teacher broke"
            raise RuntimeError(msg)
        return tiny(ids, mask)

    return forward


def slow():
    """A fifth of a second for a batch."""
    tiny = Tiny()

    def forward(ids, mask):
        time.sleep(0.2)
        return tiny(ids, mask)

    return forward


def gone():
    """The process dies in the first batch."""
    tiny, calls = Tiny(), []

    def forward(ids, mask):
        calls.append(1)
        if len(calls) == 2:
            os._exit(3)
        return tiny(ids, mask)

    return forward
