"""Means, shares and their paired differences, each with a 95 % interval.

Positions of one example (tokens of a sequence) are not independent, and examples are taken to be: the standard error of
a mean is that of the ratio (sum of values) / (number of positions) over examples, and Student's t gives the interval.
Shares of examples that hold one position each have Wilson's interval, and their differences Agresti and Min's, which
are right near 0 and 1 and where two models never differ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
NORMAL = 1.959963984540054  # its quantile, two-sided


def student_t(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t, by its integral over theta = atan(t / sqrt(freedom))."""
    if freedom > 2000:
        return NORMAL  # which differs by less than 0.1 %
    theta = np.linspace(0.0, math.pi / 2, 20001)
    density = np.cos(theta) ** (freedom - 1)
    below = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(float(np.interp(LEVEL, below / below[-1], theta)))


def single(example: Tensor) -> bool:
    """Whether every example holds one position at most."""
    return len(example) == 0 or int(torch.bincount(example).max()) == 1


def mean(values: Tensor, example: Tensor, *, least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """The mean over positions.

    Args:
        values: (N,) one number a position.
        example: (N,) int64 number of the example that a position is of.
        least: no value is below it, nor is the interval.
        most: nor above.

    Returns:
        value, its standard error ``se``, and its interval ``low`` to ``high``; these are None where fewer than two
        examples leave them unknown. All are None where there is no position, or where some values are infinite or
        undefined, whose number is then ``infinite``.
    """
    values = values.double()
    unknown: dict[str, Any] = dict.fromkeys(("value", "se", "low", "high"))
    infinite = int((~values.isfinite()).sum())
    if infinite or not len(values):
        return unknown | ({"infinite": infinite} if infinite else {})
    counts = torch.bincount(example).double()
    sums = torch.bincount(example, weights=values)
    value = (sums.sum() / counts.sum()).item()
    m = int((counts > 0).sum())
    if m < 2:
        return unknown | {"value": value}
    residual = sums - value * counts
    se = math.sqrt(m / (m - 1) * residual.square().sum().item()) / counts.sum().item()
    half = student_t(m - 1) * se
    return {"value": value, "se": se, "low": max(least, value - half), "high": min(most, value + half)}


def share(hits: Tensor, example: Tensor) -> dict[str, Any]:
    """The share of positions that hit; as :func:`mean`, with both counts.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    n, count = len(hits), int(hits.sum())
    if not n or not single(example):
        return mean(hits, example, least=0.0, most=1.0) | {"count": count, "of": n}
    p, z2 = count / n, NORMAL**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return {
        "value": p,
        "se": math.sqrt(p * (1 - p) / n),
        "low": 0.0 if count == 0 else centre - half,
        "high": 1.0 if count == n else centre + half,
        "count": count,
        "of": n,
    }


def share_difference(first: Tensor, second: Tensor, example: Tensor) -> dict[str, Any]:
    """Share of hits of the first less that of the second, over the same positions.

    Source:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 24, 2005: half an observation is added to each of the four cells.
    """
    first, second = first.bool(), second.bool()
    only_first, only_second, n = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    counts: dict[str, Any] = {"only_first": only_first, "only_second": only_second, "of": n}
    if not n or not single(example):
        return mean(first.double() - second.double(), example, least=-1.0, most=1.0) | counts
    b, c, total = only_first + 0.5, only_second + 0.5, n + 2
    half = NORMAL * math.sqrt(b + c - (b - c) ** 2 / total) / total
    value = (only_first - only_second) / n
    return {
        "value": value,
        "se": math.sqrt(only_first + only_second - n * value**2) / n,
        "low": max(-1.0, (b - c) / total - half),
        "high": min(1.0, (b - c) / total + half),
        **counts,
        "mcnemar_p": mcnemar(only_first, only_second),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p that two models are right equally often: of those that one alone gets, half are either's.

    Source:
        McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12, 1947.
    """
    n, least = only_first + only_second, min(only_first, only_second)
    k = torch.arange(least + 1, dtype=torch.float64, device="cpu")
    log_pmf = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return min(1.0, 2 * log_pmf.exp().sum().item())
