"""What a search came to: its trials beside the best one, and the best one on seeds that did not choose it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from kdfast.reporting.uncertainty import mean, student_t
from kdfast.reporting.words import counted
from kdfast.tuning.search import Tried
from kdfast.tuning.space import format_settings, format_value, position

EDGE = 0.07  # of a range


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval, by Student's t; as :func:`kdfast.reporting.uncertainty.mean`."""
    return mean(torch.tensor(values, dtype=torch.float64), torch.arange(len(values)))


def trials(tried: Iterable[Tried], best: Tried) -> list[dict[str, Any]]:
    """Each trial, with its mean difference from the best one over the seeds that both were run with.

    A trial that was dropped early has fewer seeds than others: means over different seeds are not comparable, these
    differences are.
    """
    rows = []
    for one in tried:
        differences = [mine - its for mine, its in zip(one.values, best.values, strict=False)]
        rows.append(
            {
                "number": one.number,
                "settings": one.settings,
                "state": one.state,
                "values": one.values,
                "mean": one.mean if one.values else None,
                "from_best": estimate(differences) if differences else None,
            }
        )
    return rows


def not_told_apart(
    rows: Iterable[Mapping[str, Any]],
    best: int,
    names: Iterable[str],
    finalists: Sequence[Mapping[str, Any]] = (),
    *,
    maximize: bool,
) -> dict[str, list[Any]]:
    """Values of each setting among the whole trials whose difference from the best may be chance.

    A few seeds say little of one trial's noise: the interval of its own three differences would hold settings that are
    worse by any measure. A trial is left out, too, where it is worse with every seed and by more than chance explains
    at the noise of all differences from the best that are no larger than its own, and of the finalists' on fresh seeds.

    Args:
        rows: as of :func:`trials`.
        best: number of the best one.
        names: of the settings.
        finalists: settings and ``values`` on fresh seeds, the best first.
        maximize: whether more of the metric is better.
    """
    sign = -1.0 if maximize else 1.0
    whole = {row["number"]: row for row in rows if row["state"] == "complete"}
    first = torch.tensor(whole[best]["values"], dtype=torch.float64)
    worse = {n: sign * (torch.tensor(row["values"], dtype=torch.float64) - first) for n, row in whole.items()}
    fresh = [sign * torch.tensor(_differences(one, finalists[0]), dtype=torch.float64) for one in finalists[1:]]
    noise = _Noise()
    for one in fresh:
        noise.add(one)
    near = []
    for number in sorted(worse, key=lambda n: float(worse[n].mean())):
        if number != best:
            noise.add(worse[number])
        plainly = _worse(whole[number]["from_best"], maximize=maximize) or noise.below(worse[number])
        if number == best or not plainly:
            near.append(whole[number]["settings"])
    return {name: sorted({settings[name] for settings in near}, key=_order) for name in names}


class _Noise:
    """The variance of paired differences about their means, from as many as were added."""

    def __init__(self) -> None:
        self.squares, self.freedom = 0.0, 0

    def add(self, differences: torch.Tensor) -> None:
        if len(differences) > 1 and bool(differences.isfinite().all()):
            self.squares += float((differences - differences.mean()).square().sum())
            self.freedom += len(differences) - 1

    def below(self, differences: torch.Tensor) -> bool:
        """Whether 0 is below all of them, and below their mean by more than this noise explains."""
        if not self.freedom or not bool((differences > 0).all()):
            return False
        half = student_t(self.freedom) * math.sqrt(self.squares / self.freedom / len(differences))
        return float(differences.mean()) > half


def confirmation(
    finalists: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any] | None, *, maximize: bool
) -> dict[str, Any]:
    """What to use, and how sure that is.

    The search's best trial is the best of many, so its own mean is too good; on fresh seeds it is not. The first
    finalist is that trial, chosen before these seeds were run: its difference from the baseline is not biased by the
    choice.

    Args:
        finalists: each with settings and ``values``, one for each fresh seed, NaN where a run diverged; the search's
            best first.
        baseline: the same of the settings to be beaten.
        maximize: whether more of the metric is better.

    Returns:
        ``settings`` to use, ``choice`` ("best" or "baseline"), ``verdict`` of the best against the baseline ("better",
        "not told apart", "worse" or "no baseline") and every finalist's ``mean``, ``from_best`` and, where there is a
        baseline, ``from_baseline``, each with an interval.
    """
    best = finalists[0]

    def row(one: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **one,
            "mean": estimate(one["values"]),
            "from_best": None if one is best else estimate(_differences(one, best)),
            "from_baseline": None if baseline is None else estimate(_differences(one, baseline)),
        }

    rows = [row(one) for one in finalists]
    verdict = "no baseline" if baseline is None else _verdict(rows[0]["from_baseline"], maximize=maximize)
    keep = baseline is not None and verdict != "better"
    chosen = baseline if keep else best
    assert chosen is not None
    return {
        "settings": dict(chosen["settings"]),
        "choice": "baseline" if keep else "best",
        "verdict": verdict,
        "finalists": rows,
        "baseline": None if baseline is None else {**baseline, "mean": estimate(baseline["values"])},
    }


def sentence(figures: Mapping[str, Any]) -> str:
    """The recommendation in words."""
    found = figures["recommendation"]
    best = found["finalists"][0]
    use = format_settings(found["settings"])
    seeds = f"over {counted(len(figures['confirm_seeds']), 'fresh paired seed')}"
    unit = f"{figures['metric']}, {'more' if figures['maximize'] else 'less'} is better"
    if found["verdict"] == "no baseline":
        text = f"Use {use}: {_with_interval(best['mean'])} ({unit}) {seeds}."
        return f"{text} Without a baseline, nothing says what the search gained."
    difference = f"{_with_interval(best['from_baseline'], sign=True)} ({unit}) {seeds}"
    if found["verdict"] == "better":
        return f"Use {use}: it differs from the baseline by {difference}, better by more than chance explains."
    tried = format_settings(best["settings"])
    why = "which chance may explain" if found["verdict"] == "not told apart" else "worse by more than chance explains"
    return f"Keep the baseline, {use}. The search's best, {tried}, differs from it by {difference}, {why}."


def at_the_edge(settings: Mapping[str, Any], searched: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Ranges at whose ends settings lie: what is beyond may be better."""
    found = []
    for name, held in searched.items():
        if "choices" not in held:
            where = position(held, settings[name])
            if min(where, 1 - where) < EDGE:
                found.append(f"{name} is at the {'lower' if where < EDGE else 'upper'} end of its range")
    return found


def near_sentences(figures: Mapping[str, Any]) -> list[str]:
    """For each setting, the values that the search could not tell from the best."""
    lines = []
    for name, values in figures["not_told_apart"].items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(values) and len(values) > 2:
            lines.append(f"{name} {format_value(numbers[0])} to {format_value(numbers[-1])}")
        else:
            lines.append(f"{name} {' or '.join(map(format_value, values))}")
    return lines


def _with_interval(one: Mapping[str, Any], *, sign: bool = False) -> str:
    if one["value"] is None:
        return "unknown, as a run diverged"
    form = "{:+.4g}" if sign else "{:.5g}"
    text = form.format(one["value"])
    if one["low"] is None:
        return f"{text} (one seed: no interval)"
    return f"{text} [{form.format(one['low'])}, {form.format(one['high'])}]"


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    return [a - b for a, b in zip(one["values"], other["values"], strict=True)]


def _verdict(difference: Mapping[str, Any], *, maximize: bool) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return "not told apart"
    return "better" if (low > 0) == maximize else "worse"


def _worse(difference: Mapping[str, Any], *, maximize: bool) -> bool:
    return _verdict(difference, maximize=maximize) == "worse"


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers before words."""
    return (True, str(value)) if isinstance(value, str) else (False, value)
