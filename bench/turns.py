"""Calls measured in turns, as every comparison here is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def ms_in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call by round, each round starting one further; a first round warms up and is dropped."""
    names, times = list(calls), {name: [] for name in calls}
    for index in range(rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            result = calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
            del result  # its memory is not the next one's concern
    return {name: values[1:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))
