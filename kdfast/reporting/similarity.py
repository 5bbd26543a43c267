"""Linear CKA between the layers of models, from mini-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FEWEST = 4  # rows that the estimator needs
BLOCK = 32  # rows that small batches are gathered up to: fewer make it noisy
MOST = 512  # rows of a block; its Gram matrices have the square of it


def u_centred(x: Tensor) -> Tensor:
    """The Gram matrix of rows, centred so that the mean of its entries' products estimates HSIC without bias.

    With K = X X^T but 0 on its diagonal, row sums r and sum s: K_ij - (r_i + r_j) / (n - 2) + s / ((n - 1)(n - 2)) for
    i != j, and 0 for i == j.

    Args:
        x: (n, d), n >= 4.

    Returns:
        (n, n) fp64, on the CPU.

    Source:
        Song et al., "Feature selection via dependence maximization", JMLR 13, 2012; in this form Szekely and Rizzo,
        "Partial distance correlation with methods for dissimilarities", arXiv 1310.2926.
    """
    n = len(x)
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        x = x - x.mean(0)  # changes nothing but the rounding
        gram = (x @ x.T).cpu().double()
    gram.fill_diagonal_(0.0)
    rows = gram.sum(1)
    gram -= (rows[:, None] + rows[None, :]) / (n - 2)
    gram += rows.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0.0)


class MiniBatchCKA:
    """CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of linear kernels, each HSIC averaged over blocks of rows.

    Every block's HSIC is the unbiased estimate, sum of the products of :func:`u_centred` entries / (n (n - 3)), so that
    the average does not depend on the size of the blocks but by chance; CKA itself may come out slightly below 0.
    1 for representations that are equal up to rotation, scale and offset; a general linear map changes it.

    Args:
        teacher: names of the teacher's layers.
        others: names of the layers of each model that is compared with it.

    Attributes:
        rows: rows seen so far.
        blocks: blocks that they came in.

    Source:
        Kornblith et al., "Similarity of neural network representations revisited", arXiv 1905.00414; in mini-batches:
        Nguyen et al., "Do wide and deep networks learn the same things?", arXiv 2010.15327.
    """

    def __init__(self, teacher: Sequence[str], others: Mapping[str, Sequence[str]]) -> None:
        self.teacher = tuple(teacher)
        self.others = {name: tuple(layers) for name, layers in others.items()}
        self.rows = 0
        self.blocks = 0
        self._cross = {name: _zeros(len(layers), len(self.teacher)) for name, layers in self.others.items()}
        self._own = {name: _zeros(len(layers)) for name, layers in self.others.items()}
        self._teacher = _zeros(len(self.teacher))
        self._waiting: list[list[list[Tensor]]] = []

    def add(self, teacher: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]) -> None:
        """Takes one batch.

        Args:
            teacher: (n, d) of each of the teacher's layers.
            others: of each other model's layers likewise; the same n rows, any d.
        """
        batch = [list(teacher), *(list(others[name]) for name in self.others)]
        if self._waiting and _widths(self._waiting[-1]) != _widths(batch):
            self.flush()
        self._waiting.append(batch)
        if sum(len(waiting[0][0]) for waiting in self._waiting) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        """Takes the rows that were too few for a block by themselves; fewer than four are left out."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        joined = [[torch.cat(parts) for parts in zip(*model, strict=True)] for model in zip(*waiting, strict=True)]
        n = len(joined[0][0])
        if n < FEWEST:
            return
        if n > MOST:
            spread = torch.arange(MOST, device="cpu") * n // MOST
            joined = [[x[spread.to(x.device)] for x in model] for model in joined]
            n = MOST
        scale = 1.0 / (n * (n - 3))
        centred = [torch.stack([u_centred(x.flatten(1)).flatten() for x in model]) for model in joined]
        self._teacher += scale * centred[0].square().sum(1)
        for name, own in zip(self.others, centred[1:], strict=True):
            self._own[name] += scale * own.square().sum(1)
            self._cross[name] += scale * (own @ centred[0].T)
        self.rows += n
        self.blocks += 1

    def values(self, name: str) -> list[list[float | None]]:
        """CKA of a model's layers (rows) with the teacher's (columns); None where one does not vary.

        Args:
            name: one of ``others``.
        """
        scale = (self._own[name][:, None] * self._teacher[None, :]).sqrt()
        found = torch.where(scale > 0, self._cross[name] / scale, torch.nan)
        return [[None if math.isnan(x) else x for x in row] for row in found.tolist()]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def _widths(batch: Sequence[Sequence[Tensor]]) -> list[torch.Size]:
    return [x.shape[1:] for model in batch for x in model]
