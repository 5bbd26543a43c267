"""Means of a Distiller's terms between two lines of a trainer's log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdfast.distiller import Distiller
from kdfast.methods.batch import Inputs
from kdfast.methods.step import IGNORED

#: What the metrics of a loss are called where language models are trained.
CALLED = {"accuracy": "mean_token_accuracy", "student_entropy": "entropy"}


class Means:
    """Means of terms, weighted by how much of each batch counts; nothing is synchronised before they are asked for.

    Args:
        distiller: whose terms they are.
    """

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._counts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, terms: Mapping[str, Tensor], batch: Any) -> None:
        """Adds the terms of one batch, means of it, 0-d, which mean nothing where nothing counts.

        Args:
            terms: by name.
            batch: of which they are.
        """
        d = self.distiller
        count = labelled = d.count_items(batch)
        if d.unlabelled is not None:
            labelled = d.count_items(_without(d.split(batch), d.unlabelled))
        for name, term in terms.items():
            loss, _, part = name.partition(".")
            of_labels = part == "accuracy" or (loss in d.losses and d.losses[loss].labelled_only)
            weight = (labelled if of_labels else count).to(term.device, torch.float32)
            self._counts[name].append(weight)
            self._sums[name].append(torch.where(weight > 0, term.detach().float() * weight, 0.0))

    def take(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, by name; of a term of which nothing counted on any rank, none.

        The first loss's metrics have the names of :data:`CALLED`.

        Args:
            total: the sum of a tensor over all ranks; every one of them has to come here.
        """
        names = list(self._sums)
        if not names:
            return {}
        parts = [torch.stack(kept[name]).sum() for kept in (self._sums, self._counts) for name in names]
        numbers = total(torch.stack(parts)).tolist()
        self.clear()
        found: dict[str, float] = {}
        for name, mean, count in zip(names, numbers[: len(names)], numbers[len(names) :], strict=True):
            if count:
                called = CALLED.get(name.rpartition(".")[2], name)
                found[name if called in found else called] = mean / count
        return found

    def clear(self) -> None:
        """Forgets what was added."""
        self._sums.clear()
        self._counts.clear()


def _without(inputs: Inputs, unlabelled: int) -> Inputs:
    """A batch whose tokens without a hard label do not count."""
    labels = inputs.labels
    if labels is None or labels.is_floating_point():
        return inputs
    return replace(inputs, labels=labels.masked_fill(labels == unlabelled, IGNORED))
