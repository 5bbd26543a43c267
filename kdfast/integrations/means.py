"""Means of a Distiller's terms between two lines of a trainer's log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: What the metrics of a loss are called where language models are trained.
CALLED = {"accuracy": "mean_token_accuracy", "student_entropy": "entropy"}


class Means:
    """Means of terms, weighted by how much of each batch counts; nothing is synchronised before they are asked for."""

    def __init__(self) -> None:
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: list[Tensor] = []

    def add(self, terms: Mapping[str, Tensor], count: Tensor) -> None:
        """Adds the terms of one batch.

        Args:
            terms: means of it, 0-d, which mean nothing where nothing counts.
            count: how much of it counts, 0-d.
        """
        count = count.detach().float()
        self._counts.append(count)
        for name, term in terms.items():
            weighted = term.detach().float().to(count.device) * count
            self._terms[name].append(torch.where(count > 0, weighted, 0.0))

    def take(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, by name; none if nothing was added, or nothing counted on any rank.

        The first loss's metrics have the names of :data:`CALLED`.

        Args:
            total: the sum of a tensor over all ranks; every one of them has to come here.
        """
        if not self._counts:
            return {}
        names = list(self._terms)
        sums = [torch.stack(self._terms[name]).sum() for name in names]
        counted, *means = total(torch.stack([torch.stack(self._counts).sum(), *sums])).tolist()
        self.clear()
        if not counted:
            return {}
        found: dict[str, float] = {}
        for name, mean in zip(names, means, strict=True):
            called = CALLED.get(name.rpartition(".")[2], name)
            found[name if called in found else called] = mean / counted
        return found

    def clear(self) -> None:
        """Forgets what was added."""
        self._terms.clear()
        self._counts.clear()
