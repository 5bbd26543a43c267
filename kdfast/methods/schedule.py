"""Settings that change over training: a temperature, alpha, or the weight of a loss.

A setting is a number, or a callable of the optimizer step (from 0) that returns a number or a 0-d tensor. What stands
here are the schedules of the literature; ``lambda step: ...`` is as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from kdfast.spec.problem import _scalar

Setting: TypeAlias = float | Callable[[int], "float | Tensor"]


def value(setting: Setting, step: int) -> float | Tensor:
    """What a setting is at an optimizer step.

    Raises:
        TypeError: a schedule that returned neither a number nor a 0-d tensor.
        ValueError: one that returned a number that is not finite.
    """
    return _number(f"what {setting!r} returns", setting(step)) if callable(setting) else setting


def checked(
    name: str, setting: Setting, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> Setting:
    """The setting, where it is a schedule, a 0-d tensor or a finite number in [low, high] (or above low).

    Raises:
        TypeError: of another kind.
        ValueError: a number out of range.
    """
    if not callable(setting):
        if low == -math.inf:
            _number(name, setting)
        else:
            _scalar(name, setting, low, high, open_low=open_low)
    return setting


def _number(name: str, given: float | Tensor) -> float | Tensor:
    if isinstance(given, float) and not math.isfinite(given):
        msg = f"{name} must be a finite number, got {given}"
        raise ValueError(msg)
    return _scalar(name, given, -math.inf)


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in equal steps, then ``end``.

    Args:
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: > 0, optimizer steps.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: ``steps`` is not positive, or a value is not finite.

    Example:
        >>> [Linear(0.0, 1.0, steps=4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        _number("start", self.start)
        _number("end", self.end)

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine, then ``end``: end + (start - end) (1 + cos(pi step / steps)) / 2.

    Args:
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: > 0, optimizer steps.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: ``steps`` is not positive, or a value is not finite.

    Example:
        >>> [round(Cosine(1.0, 0.0, steps=4)(step), 3) for step in (0, 1, 2, 4, 9)]
        [1.0, 0.854, 0.5, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        _number("start", self.start)
        _number("end", self.end)

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True)
class WarmUp:
    """Linear from 0 over the first ``steps``, then what ``then`` says of the steps since.

    Args:
        then: number or schedule that follows; its step 0 is the last of the warm-up.
        steps: > 0, optimizer steps.

    Raises:
        TypeError: ``then`` is neither a number nor a schedule, or ``steps`` no number.
        ValueError: ``steps`` is not positive, or ``then`` is not finite.

    Example:
        >>> [WarmUp(8.0, steps=4)(step) for step in (0, 1, 4, 9)]
        [0.0, 2.0, 8.0, 8.0]
        >>> WarmUp(Linear(8.0, 0.0, steps=4), steps=4)(6)
        4.0
    """

    then: float | Callable[[int], float]
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        checked("then", self.then)

    def __call__(self, step: int) -> float:
        after = self.then(max(step - self.steps, 0)) if callable(self.then) else self.then
        return after * min(step / self.steps, 1.0)


def _check_steps(steps: int) -> None:
    _scalar("steps", steps, open_low=True)
