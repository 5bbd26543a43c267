"""Settings that do worse than others at the same place of the same seed are dropped."""

from __future__ import annotations

import statistics

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

SEED_STRIDE = 1 << 40  # steps that a seed's places are apart, above any number of optimizer steps


def place(seed_index: int, step: int) -> int:
    """Where a value was found: so many steps into the run with that seed."""
    return seed_index * SEED_STRIDE + step


def end(seed_index: int) -> int:
    """The place where the run with that seed is over."""
    return place(seed_index + 1, -1)


class PairedPruner(BasePruner):
    """Compares a trial with the others that came as far, at the same step of the same seed.

    At the end of a seed the value is the trial's mean so far, and one that is worse than the median of the others is
    dropped; within a run it is the run's own, and must be worse than three quarters of theirs, as curves may cross.
    Optuna's own median pruner takes the best value that a trial has reported so far, which here may be of another,
    easier seed.

    Args:
        least: others that must have come as far, 1 or more.
    """

    def __init__(self, least: int = 4) -> None:
        self.least = least

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to drop the trial where it now is."""
        here = trial.last_step
        if here is None:
            return False
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        others = [
            sign * other.intermediate_values[here]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and other.state.is_finished() and here in other.intermediate_values
        ]
        if len(others) < self.least:
            return False
        quartiles = statistics.quantiles(others, n=4, method="inclusive")
        limit = quartiles[1] if (here + 1) % SEED_STRIDE == 0 else quartiles[2]
        return sign * trial.intermediate_values[here] > limit
