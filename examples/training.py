"""What every training loop needs besides its loss: batches, progress, accuracy, and where to keep a teacher."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


def batches(count: int, size: int, epochs: int, seed: int, title: str = "") -> Iterator[Tensor]:
    """Rows (size,) int64 of the batches of so many epochs, shuffled by the seed, with a progress bar on a terminal.

    The last rows of an epoch that do not fill a batch are left for the next order.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    per_epoch = count // size
    columns = (TextColumn("{task.description:<34}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (title and console.is_terminal), transient=True) as progress:
        task = progress.add_task(title, total=epochs * per_epoch)
        for _ in range(epochs):
            order = torch.randperm(count, generator=generator)
            for i in range(per_epoch):
                yield order[i * size : (i + 1) * size]
                progress.advance(task)


def outputs(model: nn.Module, x: Tensor, size: int = 1000) -> Tensor:
    """Logits of many inputs, in eval mode and without gradient."""
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part) for part in x.split(size)])
    return found.clone()  # an inference tensor could not be saved for backward


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent of the inputs whose largest logit is the label's."""
    return 100.0 * (outputs(model, x).argmax(-1) == y).double().mean().item()


def parameters(model: nn.Module) -> int:
    """How many numbers the model has learned."""
    return sum(p.numel() for p in model.parameters())


def latency(models: Sequence[nn.Module], x: Tensor, rounds: int = 30) -> list[float]:
    """Median milliseconds of a forward pass of each model over one batch, measured by turns."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for model in models:
            model.eval()
            model(x)
        for _ in range(rounds):
            for model, taken in zip(models, seconds, strict=True):
                started = time.perf_counter()
                model(x)
                taken.append(time.perf_counter() - started)
    return [1e3 * statistics.median(taken) for taken in seconds]


def kept(name: str, make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """A model that is trained once and then read from the cache folder.

    Args:
        name: of the file; names everything that the weights depend on.
        make: the untrained model.
        train: trains it in place.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdfast-examples"
    path = folder / f"{name}.pt"
    model = make()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(path)
    return model.eval()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample deviation, as 83.16 +- 0.16; of one value, the value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: half a cosine down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
