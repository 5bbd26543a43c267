"""The data sets of the examples, as tensors; nothing is downloaded."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Split:
    """Inputs (N, ...) fp32 and labels (N,) int64, of training and of the held-out part."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def first(self, train: int, test: int) -> Split:
        """A part of it, for a quick run."""
        return Split(self.x[:train], self.y[:train], self.test_x[:test], self.test_y[:test])


def fashion_mnist(folder: Path | None = None) -> Split:
    """60,000 and 10,000 pictures (N, 1, 28, 28) of ten kinds of clothes, scaled to mean 0 and deviation 1.

    Args:
        folder: of the four files; that of the Debian package by default.

    Raises:
        FileNotFoundError: they are not there.
    """
    folder = folder or FASHION_MNIST
    train_x = _idx(folder / "train-images-idx3-ubyte.gz").float()
    test_x = _idx(folder / "t10k-images-idx3-ubyte.gz").float()
    mean, deviation = train_x.mean(), train_x.std()
    return Split(
        ((train_x - mean) / deviation)[:, None],
        _idx(folder / "train-labels-idx1-ubyte.gz").long(),
        ((test_x - mean) / deviation)[:, None],
        _idx(folder / "t10k-labels-idx1-ubyte.gz").long(),
    )


def digits(seed: int) -> Split:
    """scikit-learn's 1,797 digits (N, 64) in [0, 1], split in half at random.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        msg = 'the digits come with scikit-learn, which is not installed: pip install "kdfast[examples]"'
        raise ModuleNotFoundError(msg, name="sklearn") from error
    pictures, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pictures / 16.0).float(), torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    return Split(x[train], y[train], x[test], y[test])


def _idx(path: Path) -> Tensor:
    """A file of the MNIST family: two zero bytes, the type (8: bytes), the number of dimensions, sizes, values."""
    if not path.exists():
        msg = f"{path} is missing: install Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist)"
        raise FileNotFoundError(msg)
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    sizes = np.frombuffer(content, ">u4", dimensions, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(sizes.tolist()).copy())
