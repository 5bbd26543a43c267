"""Samples on their way from a GPU to the host, so that the GPU's job does not wait for its copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from kdfast.cache.keys import TokenIds
from kdfast.spec.sparse import SparseTargets


class Event(Protocol):
    """What torch.cuda.Event has: a point in a device's stream."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> None:
        """Waits until it has."""


#: Starts copies of tensors to the host: the copies, and the event after which they hold what they are to hold.
Copier: TypeAlias = Callable[[SparseTargets, "Tensor | None"], "tuple[SparseTargets, Tensor | None, Event]"]


class Staged(NamedTuple):
    """A sample whose copy has begun."""

    key: str
    targets: SparseTargets
    token_ids: TokenIds | None
    seed: int | None
    done: Event


def copy_to_host(targets: SparseTargets, token_ids: Tensor | None) -> tuple[SparseTargets, Tensor | None, Event]:
    """Starts copies into pinned memory on the current stream of the targets' device."""

    def pinned(value: Tensor) -> Tensor:
        out = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
        return out.copy_(value.detach(), non_blocking=True)

    with torch.cuda.device(targets.ids.device):
        copied = targets.map(pinned)
        tokens = token_ids if token_ids is None else pinned(token_ids)
        done = torch.cuda.Event()
        done.record()
    return copied, tokens, done


class Staging:
    """A bounded queue of samples that are being copied, which leave it in the order in which they came.

    Args:
        depth: samples in flight at most; the next one waits for the oldest.
        copier: how copies are started.
    """

    def __init__(self, *, depth: int = 8, copier: Copier = copy_to_host) -> None:
        self._depth = depth
        self._copier = copier
        self._flying: deque[Staged] = deque()

    def __len__(self) -> int:
        return len(self._flying)

    def __contains__(self, key: str) -> bool:
        return any(staged.key == key for staged in self._flying)

    def put(self, key: str, targets: SparseTargets, token_ids: TokenIds | None, seed: int | None) -> None:
        """Starts the copy of a sample."""
        on_device = isinstance(token_ids, Tensor) and token_ids.device.type != "cpu"
        copied, tokens, done = self._copier(targets, token_ids if on_device else None)  # type: ignore[arg-type]
        self._flying.append(Staged(key, copied, tokens if on_device else token_ids, seed, done))

    def arrived(self, *, everything: bool = False) -> Iterator[Staged]:
        """Takes those out that are on the host.

        Args:
            everything: wait for all of them; otherwise only for as many as are too many.
        """
        while self._flying and (everything or len(self._flying) > self._depth or self._flying[0].done.query()):
            staged = self._flying.popleft()
            staged.done.synchronize()
            yield staged
