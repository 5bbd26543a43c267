"""What a model costs: parameters, bytes on disk, time."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from kdfast.methods.batch import Inputs
from kdfast.methods.layers import unwrapped
from kdfast.reporting.measure import Model

ROUND = 0.01  # seconds: a shorter forward pass is repeated, and its median taken
MOST_REPEATS = 25
LONGEST = 4.0  # seconds of timing in all, warm-up apart; three rounds are taken whatever they need


def size(module: nn.Module) -> dict[str, Any]:
    """Parameters, the bytes that torch.save makes of the state_dict, and the dtypes of the parameters."""
    inner = unwrapped(module)
    stream = _Counted()
    torch.save(inner.state_dict(), cast(IO[bytes], stream))
    return {
        "parameters": sum(p.numel() for p in inner.parameters()),
        "bytes": stream.bytes,
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in inner.parameters()}),
    }


class _Counted(io.RawIOBase):
    """A file that keeps nothing but its length."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        n = len(memoryview(data).cast("B"))
        self.bytes += n
        return n


def latency(models: Sequence[Model], inputs: Inputs, examples: int, rounds: int) -> dict[str, Any]:
    """Times a forward pass over one batch, all models by turns.

    A round goes once through all models, starting one further than the round before. Inputs are on the models' devices
    beforehand, and a device is waited for.

    Args:
        models: the teacher first.
        inputs: the batch.
        examples: in it.
        rounds: at most; fewer, but three, where they take more than ``LONGEST`` seconds.

    Returns:
        The batch's shape, the rounds, and by model: device, milliseconds of a batch and of an example, and for all but
        the teacher (teacher's time / its own); each the median over the rounds, ``low`` and ``high`` their quartiles.
    """
    passes = [_timed(model.bound(inputs), model.device) for model in models]
    for one in passes:
        one()
    warm = [one() for one in passes]
    repeats = [max(1, min(MOST_REPEATS, int(ROUND / max(seconds, 1e-9)))) for seconds in warm]
    needed = sum(seconds * n for seconds, n in zip(warm, repeats, strict=True))
    rounds = max(min(rounds, 3), min(rounds, int(LONGEST / max(needed, 1e-9))))
    times = [[0.0] * rounds for _ in models]
    for index in range(rounds):
        for turn in range(len(models)):
            which = (index + turn) % len(models)
            times[which][index] = statistics.median(passes[which]() for _ in range(repeats[which]))
    found: dict[str, Any] = {}
    for model, seconds in zip(models, times, strict=True):
        row: dict[str, Any] = {
            "device": _device_name(model.device),
            "ms_per_batch": _quartiles([1e3 * s for s in seconds]),
            "ms_per_example": _quartiles([1e3 * s / examples for s in seconds]),
        }
        if model.role != "teacher":
            row["times_as_fast"] = _quartiles([a / b for a, b in zip(times[0], seconds, strict=True)])
        found[model.name] = row
    return {
        "examples": examples,
        "shape": _shape(inputs),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "models": found,
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    ordered = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {"value": ordered[1], "low": ordered[0], "high": ordered[2]}


def _timed(forward: Callable[[], object], device: torch.device | None) -> Callable[[], float]:
    def run() -> float:
        _wait(device)
        started = time.perf_counter()
        forward()
        _wait(device)
        return time.perf_counter() - started

    return run


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _device_name(device: torch.device | None) -> str:
    if device is None or device.type == "cpu":
        return "CPU"
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(device)


def _shape(inputs: Inputs) -> list[int] | None:
    kwargs: Mapping[str, Any] = inputs.kwargs
    first = next((x for x in (*inputs.args, *kwargs.values()) if isinstance(x, Tensor)), None)
    return None if first is None else list(first.shape)
