"""The search: settings proposed one after another, each run with the same seeds."""

from __future__ import annotations

import json
import math
import numbers
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from kdfast.tuning.pruning import PairedPruner, end, place
from kdfast.tuning.space import Space, TuneError, format_value

STUDY_NAME = "study.log"

#: Told of a run's progress: the optimizer step, and the metric at it. May stop the run.
Report = Callable[[int, float], None]


class Objective(Protocol):
    """Trains one student and measures it."""

    def __call__(self, settings: dict[str, Any], seed: int, report: Report) -> float:
        """Returns the metric on validation data; the seed settles weights and order of the batches."""


class Interrupted(Exception):
    """The search was asked to stop; what is finished is on disk."""


class ObjectiveError(TuneError, TypeError):
    """The objective is no function, or what it returns or reports is no number."""


class Diverged(Exception):
    """A run's metric is not finite."""


@dataclass(frozen=True)
class Tried:
    """Settings, and what came out with the first of the seeds, in their order."""

    number: int
    settings: dict[str, Any]
    values: list[float]
    state: str  # "complete", "pruned" or "diverged"

    @property
    def mean(self) -> float:
        """Over the seeds that were run."""
        return statistics.fmean(self.values)


class Search:
    """A study on disk.

    Args:
        folder: where its journal lies.
        objective: trains one student.
        space: what may be chosen.
        seeds: every trial runs with these, in this order.
        maximize: whether more of the metric is better.
        identity: what must be the same for a search to go on, by name.
        resume: go on with the one in the folder.
        interrupted: asked at each report and before each run.
        watch: told in words what runs, when it begins and at each report.

    Raises:
        TuneError: a study is in the folder and ``resume`` is not set, or none is and it is; one of other settings.
    """

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        space: Space,
        seeds: Sequence[int],
        *,
        maximize: bool,
        identity: Mapping[str, Any],
        resume: bool,
        interrupted: Callable[[], bool],
        watch: Callable[[str], None],
    ) -> None:
        self.objective, self.space, self.seeds = objective, space, tuple(seeds)
        self.name = str(identity.get("objective", ""))
        self.maximize, self.interrupted, self.watch = maximize, interrupted, watch
        path = folder / STUDY_NAME
        check_folder(folder, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name="kdfast tune",
            direction="maximize" if maximize else "minimize",
            load_if_exists=resume,
            pruner=PairedPruner(),
        )
        self._identify(identity, path)
        # A sampler that goes on must not propose what it proposed at first.
        self.study.sampler = TPESampler(seed=self.seeds[0] + len(self.study.trials))
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):  # cut off: its finished seeds are kept
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.study.enqueue_trial(trial.params, user_attrs={"values": trial.user_attrs.get("values", [])})

    def run(self, trials: int) -> Iterator[Tried]:
        """Tries settings until there are so many trials, and yields each one.

        Raises:
            Interrupted: it was asked to stop.
            ObjectiveError: the objective did not return a number.
        """
        while len(self.tried()) < trials:
            trial = self.study.ask({**self.space.searched})
            yield self._try(trial)

    def tried(self) -> list[Tried]:
        """All finished trials; one that was cut off is not among them."""
        found = (_tried(trial, self.space.fixed) for trial in self.study.get_trials(deepcopy=False))
        return [one for one in found if one is not None]

    def ranked(self) -> list[Tried]:
        """The trials that ran with every seed, best first."""
        whole = [one for one in self.tried() if one.state == "complete"]
        return sorted(whole, key=lambda one: -one.mean if self.maximize else one.mean)

    def confirmed(self, settings: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[float]:
        """Runs settings once more with other seeds, and yields each value; NaN where a run diverged."""
        key = json.dumps(settings, sort_keys=True)
        for seed in seeds:
            stored = self.study.user_attrs.get("confirmed", {})
            known = stored.get(key, {})
            if str(seed) not in known:
                try:
                    value: float | None = self._measure(dict(settings), seed, self._checked_report, f"seed {seed}")
                except Diverged:
                    value = None
                known = known | {str(seed): value}
                self.study.set_user_attr("confirmed", stored | {key: known})
            value = known[str(seed)]
            yield math.nan if value is None else value

    def _try(self, trial: Trial) -> Tried:
        values = list(trial.user_attrs.get("values", []))
        for i in range(len(values)):
            trial.report(statistics.fmean(values[: i + 1]), end(i))
        state = TrialState.COMPLETE
        for i in range(len(values), len(self.seeds)):
            if i and trial.should_prune():
                state = TrialState.PRUNED
                break

            def report(step: int, value: float, i: int = i) -> None:
                self._checked_report(step, value)
                trial.report(value, place(i, step))
                if trial.should_prune():
                    raise optuna.TrialPruned

            try:
                settings = self.space.fixed | trial.params
                what = f"trial {trial.number}, seed {self.seeds[i]}"
                values.append(self._measure(settings, self.seeds[i], report, what))
            except optuna.TrialPruned:
                state = TrialState.PRUNED
                break
            except Diverged:
                trial.set_user_attr("diverged", True)
                state = TrialState.FAIL
                break
            trial.set_user_attr("values", values)
            trial.report(statistics.fmean(values), end(i))
        mean = statistics.fmean(values) if state == TrialState.COMPLETE else None
        frozen = self.study.tell(trial, mean, state=state)
        tried = _tried(frozen, self.space.fixed)
        assert tried is not None
        return tried

    def _measure(self, settings: dict[str, Any], seed: int, report: Report, what: str) -> float:
        self._stop_if_asked()
        self.watch(what)

        def watched(step: int, value: float) -> None:
            value = self._number(value, "report")
            report(step, value)
            self.watch(f"{what}, step {step}: {format_value(value)}")

        value = self._number(self.objective(settings, seed, watched), "return")
        if not math.isfinite(value):
            raise Diverged
        return value

    def _number(self, value: Any, verb: str) -> float:
        """A metric as a float; a tensor or an array of one element is one, too."""
        shape = tuple(getattr(value, "shape", ()))
        try:
            if not isinstance(value, bool | str | bytes) and math.prod(shape) == 1:
                return float(value.item() if shape else value)
        except (TypeError, ValueError, RuntimeError):  # whatever says that there is no number in it
            pass
        got = f"{type(value).__name__} {value!r}"[:80] if not shape else f"{type(value).__name__} of shape {shape}"
        msg = f"objective {self.name} must {verb} a number, the metric, got {got}"
        raise ObjectiveError(msg)

    def _stop_if_asked(self) -> None:
        if self.interrupted():
            raise Interrupted

    def _checked_report(self, step: int, value: float) -> None:
        self._stop_if_asked()
        if not isinstance(step, numbers.Real) or step < 0 or not float(step).is_integer():
            msg = f"objective {self.name}: a step must be a whole number from 0, got {step!r}"
            raise ObjectiveError(msg)
        if not math.isfinite(value):
            raise Diverged

    def _identify(self, identity: Mapping[str, Any], path: Path) -> None:
        stored = self.study.user_attrs.get("identity")
        wanted = json.loads(json.dumps(identity))
        if stored is None:
            self.study.set_user_attr("identity", wanted)
        elif stored != wanted:
            each = ", ".join(
                f"{name} {stored.get(name)} there and {wanted.get(name)} now"
                for name in sorted({*stored, *wanted})
                if stored.get(name) != wanted.get(name)
            )
            msg = f"--resume: {path} is of another search ({each}): repeat those, or name another folder with --out"
            raise TuneError(msg)


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raises TuneError where a search is in the way, or the one to go on with is missing."""
    exists = (folder / STUDY_NAME).exists()
    if exists and not resume:
        msg = f"{folder} holds a search: go on with --resume, or name another folder with --out"
        raise TuneError(msg)
    if resume and not exists:
        msg = f"--resume: {folder} holds no search; leave --resume away to start one, or name its folder with --out"
        raise TuneError(msg)


def _tried(trial: FrozenTrial, fixed: Mapping[str, Any]) -> Tried | None:
    diverged = bool(trial.user_attrs.get("diverged"))
    if not trial.state.is_finished() or (trial.state == TrialState.FAIL and not diverged):
        return None
    state = "diverged" if diverged else "pruned" if trial.state == TrialState.PRUNED else "complete"
    return Tried(trial.number, {**fixed, **trial.params}, list(trial.user_attrs.get("values", [])), state)
