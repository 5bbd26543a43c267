"""Which of several processes takes which document."""

from __future__ import annotations

import heapq

#: A document of more than this part of a process's even share of the data is for all processes.
_LARGE = 0.25


class Turns:
    """Deals documents out by their sizes, which every process knows without looking inside.

    Each goes to the process that has least so far, so that no process has more than its even share and one document. A
    large one would leave the others idle, and goes to all: its samples are dealt out in place of it.

    Args:
        rank: of this process.
        world: number of processes.
        total: size of all documents, in any unit.
    """

    def __init__(self, rank: int, world: int, total: int) -> None:
        self._rank = rank
        self._total = max(1, total)
        self._large = self._total * _LARGE / world if world > 1 else self._total
        self._loads = [(0, other) for other in range(world)]
        self._dealt = 0
        #: Whether the last one was given to all.
        self.shared = False

    @property
    def read(self) -> float:
        """Share of the data that lies before the end of the last one, 0 to 1."""
        return min(1.0, self._dealt / self._total)

    def take(self, size: int) -> bool:
        """Whether the next document, of this size, is for this process."""
        self._dealt += size
        self.shared = size > self._large
        if self.shared:
            return True
        load, rank = self._loads[0]
        heapq.heapreplace(self._loads, (load + max(1, size), rank))
        return rank == self._rank
