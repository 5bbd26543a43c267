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
    base: float
    new: float

    @property
    def change(self) -> float:
        """The ratio now over the ratio then: 1 is no change, below 1 is slower."""
        return self.new / self.base

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
            if then is not None and now is not None:
                rows.append(Row(new.case.name, variant, against, then, now))
    return rows


def better(rows: Sequence[Row], again: Sequence[Row]) -> list[Row]:
    """The rows, each with the higher ratio of two measurements: what fails then failed twice."""
    retried = {(row.case, row.variant, row.against): row for row in again}
    return [max(row, retried.get((row.case, row.variant, row.against), row), key=lambda r: r.new) for row in rows]


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
