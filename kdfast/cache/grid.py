"""The grid that log-probabilities are rounded to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

from kdfast.cache.error import JobError

#: Steps of 2^-grid nats, or those that the temperatures ask for.
Grid: TypeAlias = int | Literal["auto"]

LEAST, MOST = 2, 10
_STEP = 2.0**-4  # of a temperature: see grid_for


def grid_for(grid: Grid, temperatures: Iterable[float]) -> int:
    """The grid, where it is "auto" the coarsest on which a step is at most a sixteenth of each temperature.

    At temperature T a step of s nats moves log q_T by s / T, and the mean KL divergence of what is stored from what was
    given grows with the square of that: below 1e-4 nats for s / T = 1/16. Temperatures above 1 ask for no more than 1
    does, at which every cache is exact; those below 2^-6 for more than there is.

    Raises:
        ValueError: another word, a number that is not 2 to 10, or a temperature that is not above 0.
    """
    if grid == "auto":
        least = min([1.0, *temperatures])
        if not least > 0:
            msg = f"temperatures must be above 0, got {least:g}"
            raise ValueError(msg)
        return min(MOST, math.ceil(-math.log2(least) - math.log2(_STEP) - 1e-9))
    if isinstance(grid, bool) or not isinstance(grid, int) or not LEAST <= grid <= MOST:
        msg = f'grid must be "auto", or {LEAST} to {MOST}, got {grid!r}'
        raise ValueError(msg)
    return grid


def grid_from(text: str) -> Grid:
    """The grid that the option ``--grid`` says.

    Raises:
        JobError: it is neither "auto" nor a number from 2 to 10.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or not LEAST <= int(text) <= MOST:
        msg = f"--grid must be auto, or {LEAST} to {MOST}, got {text!r}"
        raise JobError(msg)
    return int(text)
