"""What a search may choose: ``temperature=1:8:log``, ``layers=1:6:int``, ``divergence=forward_kl,jsd``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

Distribution: TypeAlias = CategoricalDistribution | FloatDistribution | IntDistribution


class TuneError(ValueError):
    """The search cannot start, go on or end as asked; the message says what to change."""


@dataclass(frozen=True)
class Space:
    """Settings that are searched, and those that every run has alike."""

    searched: dict[str, Distribution]
    fixed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.searched:
            msg = "there is nothing to search: name a range or a list, as temperature=1:8:log or divergence=jsd,tvd"
            raise TuneError(msg)

    def probes(self) -> list[dict[str, Any]]:
        """Settings at the ends of every range and with every choice, the others at their first."""
        ends = {
            name: list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]
            for name, one in self.searched.items()
        }
        first = self.fixed | {name: values[0] for name, values in ends.items()}
        return [first | {name: value} for name, values in ends.items() for value in values]

    def ranges(self) -> dict[str, dict[str, Any]]:
        """``choices`` of each searched setting, or its ``low``, ``high`` and whether its scale is ``log``."""
        return {
            name: {"choices": list(one.choices)}
            if isinstance(one, CategoricalDistribution)
            else {"low": one.low, "high": one.high, "log": one.log}
            for name, one in self.searched.items()
        }

    def described(self) -> dict[str, str]:
        """Each setting in the form that :func:`parse_space` reads."""
        return {name: _text(one) for name, one in self.searched.items()} | {
            name: format_value(one) for name, one in self.fixed.items()
        }


def parse_space(texts: Sequence[str]) -> Space:
    """Reads settings.

    Args:
        texts: each ``name=low:high``, with ``:log`` where ratios matter, not differences, and ``:int`` for whole
            numbers; ``name=a,b,c`` for a choice, of numbers or words; or ``name=value`` for one that is not searched.

    Raises:
        TuneError: a text that is none of these, a name given twice, an empty range.
    """
    searched: dict[str, Distribution] = {}
    fixed: dict[str, Any] = {}
    for text in texts:
        name, value = _split(text)
        if name in searched or name in fixed:
            msg = f"{name} is given twice"
            raise TuneError(msg)
        if ":" in value:
            searched[name] = _range(text, *value.split(":"))
        elif "," in value:
            choices = [parse_value(one) for one in value.split(",")]
            if len(set(choices)) < len(choices):
                msg = f"{text}: the same choice twice"
                raise TuneError(msg)
            searched[name] = CategoricalDistribution(choices)
        else:
            fixed[name] = parse_value(value)
    return Space(searched, fixed)


def parse_settings(text: str) -> dict[str, Any]:
    """Reads one value for each setting, ``temperature=4,alpha=0.9``.

    Raises:
        TuneError: a part that is not name=value, or a name given twice.
    """
    pairs = [_split(part) for part in text.split(",")]
    if len({name for name, _ in pairs}) < len(pairs):
        msg = f"{text}: a name is given twice"
        raise TuneError(msg)
    return {name: parse_value(value) for name, value in pairs}


def parse_value(text: str) -> Any:
    """A whole number, a number, true or false, or the word itself."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def format_value(value: Any) -> str:
    """The value in few digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_settings(settings: dict[str, Any]) -> str:
    """Name and value of each, as a sentence has them."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


def position(searched: Mapping[str, Any], value: Any) -> float:
    """Where a value lies in its range, from 0 to 1; a choice is in the middle of its share.

    Args:
        searched: one of :meth:`Space.ranges`.
        value: of that setting.
    """
    if "choices" in searched:
        return (list(searched["choices"]).index(value) + 0.5) / len(searched["choices"])
    low, high, scale = searched["low"], searched["high"], math.log if searched["log"] else float
    return (scale(value) - scale(low)) / (scale(high) - scale(low))


def _split(text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not name or not equals or not value:
        msg = f"{text!r} is not name=value, as temperature=1:8:log, divergence=jsd,tvd or alpha=0.9"
        raise TuneError(msg)
    return name, value


def _range(text: str, *parts: str) -> Distribution:
    low, high, *flags = (part.strip() for part in parts)
    unknown = set(flags) - {"log", "int"}
    if unknown:
        msg = f"{text}: {', '.join(sorted(unknown))} is neither log nor int"
        raise TuneError(msg)
    whole, log = "int" in flags, "log" in flags
    try:
        ends = (int(low), int(high)) if whole else (float(low), float(high))
    except ValueError:
        msg = f"{text}: {low} and {high} must be {'whole ' * whole}numbers"
        raise TuneError(msg) from None
    if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        msg = f"{text}: the first number must be below the second, both finite"
        raise TuneError(msg)
    if log and ends[0] <= 0:
        msg = f"{text}: log needs numbers above 0"
        raise TuneError(msg)
    if whole:
        return IntDistribution(int(ends[0]), int(ends[1]), log=log)
    return FloatDistribution(float(ends[0]), float(ends[1]), log=log)


def _text(one: Distribution) -> str:
    if isinstance(one, CategoricalDistribution):
        return ",".join(format_value(choice) for choice in one.choices)
    flags = ":log" * one.log + ":int" * isinstance(one, IntDistribution)
    return f"{format_value(one.low)}:{format_value(one.high)}{flags}"
