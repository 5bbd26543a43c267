"""The whole of it: search, confirmation on fresh seeds, recommendation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdfast.demo.display import Display
from kdfast.reporting.environment import environment
from kdfast.reporting.outputs import check_folder as check_writable
from kdfast.reporting.words import counted
from kdfast.tuning.result import at_the_edge, confirmation, not_told_apart, sentence, trials
from kdfast.tuning.search import STUDY_NAME, Objective, ObjectiveError, Search, Tried, check_folder
from kdfast.tuning.space import Space, TuneError, format_settings, format_value

RESULTS_NAME = "tune.json"
PAGE_NAME = "tune.html"


def tune(
    objective: Objective,
    space: Space,
    *,
    out: Path,
    display: Display,
    name: str,
    metric: str,
    maximize: bool = False,
    baseline: Mapping[str, Any] | None = None,
    trial_count: int = 20,
    seed: int = 0,
    seeds: int = 3,
    confirm_seeds: int = 5,
    finalists: int = 3,
    quick: bool = False,
    resume: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Searches settings and writes ``tune.json`` and ``tune.html`` into a folder, beside the study's journal.

    Every trial runs with the same seeds in the same order, so that two trials differ by their settings alone. The best
    few, and the baseline, run once more with seeds that no trial had; what is recommended and how sure it is follow
    from these.

    Args:
        objective: trains one student and returns its metric.
        space: what may be chosen.
        out: the folder, made where it does not exist.
        display: receives the progress.
        name: of the objective; a search goes on with the one that it began with.
        metric: its name, with its unit.
        maximize: whether more of it is better.
        baseline: settings to be beaten, of the same names as the space's; those it fixes may be left away.
        trial_count: settings tried.
        seed: the first seed.
        seeds: of each trial.
        confirm_seeds: fresh ones for the finalists and the baseline, counted on from the trials'.
        finalists: best trials that are run with them.
        quick: recorded in the results: the figures mean nothing.
        resume: go on with the folder's search; ``trial_count``, ``confirm_seeds`` and ``finalists`` may have grown.
        interrupted: asked at each report and before each run; once it says yes, the search stops.
        prepare: called before the first run, once the arguments are known to be right; what takes long goes here.

    Returns:
        The results, as written to ``tune.json``.

    Raises:
        TuneError: a folder that cannot be written; a search that is missing, in the way or of other settings; a
            baseline of other names; no trial that ran to its end.
        ObjectiveError: the objective is no function, or returns or reports what is no number; a TuneError, too.
        Interrupted: ``interrupted`` said yes.
    """
    started = time.perf_counter()
    beaten = None if baseline is None else _baseline(space, baseline)
    if not callable(objective):
        msg = f"objective {name} must be a function of (settings, seed, report), got {type(objective).__name__}"
        raise ObjectiveError(msg)
    check_folder(out, resume=resume)
    try:
        check_writable(out, "--out", (RESULTS_NAME, PAGE_NAME, STUDY_NAME))
    except OSError as error:
        raise TuneError(str(error)) from error
    prepare()
    search = Search(
        out,
        objective,
        space,
        range(seed, seed + seeds),
        maximize=maximize,
        identity={
            "objective": name,
            "space": space.described(),
            "seeds": [seed, seeds],
            "maximize": maximize,
            "quick": quick,
        },
        resume=resume,
        interrupted=interrupted,
        watch=lambda text: display.advance(done, text),
    )
    display.task("search", trial_count)
    done = len(search.tried())
    display.advance(done)
    for one in search.run(trial_count):
        done += 1
        display.note(_line(one, seeds))
        display.advance(done)
    ranked = _different(search.ranked())[:finalists]
    if not ranked:
        msg = f"of {counted(trial_count, 'trial')} none ran to its end: all diverged"
        raise TuneError(msg)
    fresh = range(seed + seeds, seed + seeds + confirm_seeds)
    rows = []
    candidates = [one.settings for one in ranked] + ([] if beaten is None else [beaten])
    display.task("fresh seeds", len(candidates) * confirm_seeds)
    done = 0
    for settings in candidates:
        values = []
        for value in search.confirmed(settings, fresh):
            values.append(value)
            done += 1
            display.advance(done, format_settings(settings))
        rows.append({"settings": settings, "values": values})
    if beaten is not None:
        reference = rows.pop()
    tried = trials(search.tried(), ranked[0])
    figures: dict[str, Any] = {
        "kind": "kdfast tune",
        "quick": quick,
        "objective": name,
        "metric": metric,
        "maximize": maximize,
        "space": space.described(),
        "searched": space.ranges(),
        "seeds": list(search.seeds),
        "confirm_seeds": list(fresh),
        "environment": environment(),
        "best": ranked[0].number,
        "trials": tried,
        "not_told_apart": not_told_apart(tried, ranked[0].number, space.searched, rows, maximize=maximize),
        "at_the_edge": at_the_edge(ranked[0].settings, space.ranges()),
        "recommendation": confirmation(rows, None if beaten is None else reference, maximize=maximize),
        "seconds": time.perf_counter() - started,
    }
    figures["sentence"] = sentence(figures)
    _write(figures, out)
    return figures


def _write(figures: dict[str, Any], out: Path) -> None:
    from kdfast.tuning.page import render

    text = json.dumps(_without_nan(figures), indent=1, allow_nan=False)
    (out / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")
    (out / PAGE_NAME).write_text(render(json.loads(text)), encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a diverged run's value is null."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124


def _baseline(space: Space, baseline: Mapping[str, Any]) -> dict[str, Any]:
    names = {*space.searched, *space.fixed}
    missing, unknown = sorted(set(space.searched) - set(baseline)), sorted(set(baseline) - names)
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which --space has not"
        msg = f"the baseline {wrong}"
        raise TuneError(msg)
    return {**space.fixed, **{name: baseline[name] for name in [*space.fixed, *space.searched] if name in baseline}}


def _different(ranked: list[Tried]) -> list[Tried]:
    """Without those whose settings an earlier one has."""
    kept: list[Tried] = []
    for one in ranked:
        if all(one.settings != other.settings for other in kept):
            kept.append(one)
    return kept


def _line(one: Tried, seeds: int) -> str:
    text = (
        f"{format_value(one.mean)} over {len(one.values)} of {counted(seeds, 'seed')}"
        if one.values
        else "within the first seed"
    )
    state = "" if one.state == "complete" else f", {one.state}"
    return f"trial {one.number}: {format_settings(one.settings)}: {text}{state}"
