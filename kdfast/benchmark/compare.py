"""The gate: are kdfast's ratios what they were? Times of two runs are never compared, ratios within a run are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdfast.benchmark.competitors import EAGER
from kdfast.benchmark.errors import BenchError
from kdfast.benchmark.results import AGAINST, CaseResult, Run

#: What a gate looks at unless told otherwise: the speed-up over eager. Eager runs the same code in both runs, and takes
#: page faults as kdfast does, so it slows down with the machine; torch.compile's code changes with torch and compiler,
#: and the triad takes no page faults.
DEFAULT_GATES = (EAGER,)


@dataclass(frozen=True)
class Row:
    """One ratio of one variant of kdfast in one case, then and now; higher is better."""

    case: str
    variant: str
    against: str
    base: float  # CaseResult.ratio
    new: float
    base_best: float  # CaseResult.best_ratio
    new_best: float

    @property
    def by_median(self) -> float:
        """The median ratio now over the one then: 1 is no change, below 1 is slower."""
        return self.new / self.base

    @property
    def by_best(self) -> float:
        """The same of the best rounds."""
        return self.new_best / self.base_best

    @property
    def change(self) -> float:
        """The higher of the two: slower code lowers both, a neighbour's job seldom does.

        With five jobs on each core, code compared with itself came out as low as 0.31 by the median alone, and 0.76 by
        the higher of the two.
        """
        return max(self.by_median, self.by_best)

    def fails(self, fail_below: float | None, gates: Sequence[str]) -> bool:
        """It is gated, and below the limit."""
        return fail_below is not None and self.against in gates and self.change < fail_below


def compare(base: Run, new: Run) -> list[Row]:
    """Every ratio that both runs hold.

    Raises:
        BenchError: there is none.
    """
    rows = [row for name in new.cases if name in base.cases for row in compare_case(base.cases[name], new.cases[name])]
    if not rows:
        msg = (
            f"no ratio in common: the base holds {_listed(base.cases)}, the new run {_listed(new.cases)}; "
            f"a ratio needs kdfast and one of {', '.join(AGAINST)} in both"
        )
        raise BenchError(msg)
    return rows


def compare_case(base: CaseResult, new: CaseResult) -> list[Row]:
    """The ratios that two results of one case share."""
    rows = []
    for variant in new.variants:
        for against in AGAINST:
            then, now = base.ratio(variant, against), new.ratio(variant, against)
            best_then, best_now = base.best_ratio(variant, against), new.best_ratio(variant, against)
            if then is None or now is None or best_then is None or best_now is None:
                continue
            rows.append(Row(new.case.name, variant, against, then, now, best_then, best_now))
    return rows


def better(rows: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """The rows, each from the better of two measurements: what fails then failed twice."""
    retried = {(row.case, row.variant, row.against): row for row in again}
    return [max(row, retried.get((row.case, row.variant, row.against), row), key=lambda r: r.change) for row in rows]


def require_gated(rows: Sequence[Row], gates: Sequence[str]) -> None:
    """A gate that looks at nothing would always pass.

    Raises:
        BenchError: no row is against one of the gates.
    """
    for gate in gates:
        if not any(row.against == gate for row in rows):
            msg = f"--gate {gate}: no case has a ratio against {gate} in both runs, so the gate would check nothing"
            raise BenchError(msg)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
