"""Times and memory of competitors that take turns, and the bandwidth of the device's own copy."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

#: Bytes of the buffer that is written between two timings, so that no competitor finds its inputs in the cache.
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """One competitor of one case."""

    milliseconds: float | None  # median; None where it did not run
    spread: float | None  # (longest - shortest) / median
    peak_bytes: int | None  # beyond what was allocated before a step
    note: str  # why it did not run
    failed: bool = False  # it should have run


class Clock:
    """Milliseconds of device work by events, or of the wall on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1 << 20, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Fill the caches with something else."""
        self._flush.zero_()

    def time(self, step: Callable[[], object]) -> float:
        """One step, from a cold cache."""
        self.flush()
        if not self.on_gpu:
            begin = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - begin)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, step: Callable[[], object]) -> int | None:
        """Bytes that a step allocates at most; None where nobody counts them."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self) -> float:
        """Bytes per second of a device-to-device copy, read and written counted."""
        size = (2 << 30) if self.on_gpu else (64 << 20)
        a = torch.empty(size, dtype=torch.uint8, device=self.device).random_(0, 255)
        b = torch.empty_like(a)
        times = [self.time(lambda: b.copy_(a)) for _ in range(12)]
        return 2 * size / (statistics.median(times[2:]) * 1e-3)


def measure(
    clock: Clock,
    steps: dict[str, Callable[[], object] | str],
    rounds: int,
    release: Callable[[], None],
    deadline: float = float("inf"),
) -> dict[str, Timing]:
    """Every step, interleaved; a string in the place of a step says why there is none.

    ``release`` gives back what a step leaves behind, so that the next one's memory is its own. After ``deadline``, in
    seconds of ``time.monotonic``, no further round begins.

    A step that fails, for want of memory say, is recorded with its error and leaves the others alone.
    """
    out: dict[str, Timing] = {}
    times: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    running: dict[str, Callable[[], object]] = {}
    for name, step in steps.items():
        if isinstance(step, str):
            out[name] = Timing(None, None, None, step)
            continue
        try:
            for _ in range(2):  # compilation, and the allocator's first blocks
                step()
            release()
            peaks[name] = clock.peak(step)
            running[name], times[name] = step, []
        except Exception as error:
            out[name] = failed(error)
        release()
        _free(clock)
    for index in range(rounds):
        if index > 0 and time.monotonic() > deadline:
            break
        for name, step in list(running.items()):
            release()
            try:
                times[name].append(clock.time(step))
            except Exception as error:
                out[name] = failed(error)
                del running[name]
                _free(clock)
    for name in running:
        middle = statistics.median(times[name])
        out[name] = Timing(middle, (max(times[name]) - min(times[name])) / middle, peaks[name], "")
    return {name: out[name] for name in steps}


def said(error: Exception) -> str:
    """An error in a line that fits a table."""
    line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}".replace("|", "/")


def failed(error: Exception) -> Timing:
    """What is recorded in the place of times."""
    return Timing(None, None, None, said(error), failed=True)


def _free(clock: Clock) -> None:
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()


def launches(clock: Clock, step: Callable[[], object]) -> dict[str, int | str | None]:
    """Kernels of a warm step: those of Triton that kdfast launches, and all that the device ran.

    The second is None on a CPU, and a text where the profiler does not serve.
    """
    from kdfast.kernels.triton import dense_launch

    ours, launch = 0, dense_launch.launch

    def counting(*args: Any, **options: Any) -> None:
        nonlocal ours
        ours += 1
        launch(*args, **options)

    with mock.patch.object(dense_launch, "launch", counting):
        step()
    if not clock.on_gpu:
        return {"triton": ours, "device": None}
    try:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {"triton": ours, "device": len(on_device)}
    except Exception as error:  # such as counters that the machine does not grant
        return {"triton": ours, "device": said(error)}


def captured(clock: Clock, step: Callable[[], object], rounds: int = 7) -> dict[str, float | str | None]:
    """Milliseconds of a step that a CUDA graph has recorded: device work without the host's share of launches."""
    if not clock.on_gpu:
        return {"milliseconds": None, "note": "needs a GPU"}
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()  # what it returns stays, or its memory would be used again
        graph.replay()
        middle = statistics.median(clock.time(graph.replay) for _ in range(rounds))
        del kept, graph
        _free(clock)
        return {"milliseconds": middle, "note": ""}
    except Exception as error:  # a step that copies from pageable memory, or looks at a value
        return {"milliseconds": None, "note": said(error)}
