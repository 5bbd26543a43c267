"""Measures the competitors of a case in turns, after checking that they compute the same thing."""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdfast.benchmark.cases import Case
from kdfast.benchmark.competitors import COMPETITORS, EAGER, KDFAST, Competitor, Step, Workload
from kdfast.benchmark.errors import WrongResultError
from kdfast.benchmark.process import minor_page_faults, peak_extra_bytes
from kdfast.benchmark.results import CaseResult, Timing

#: Two right implementations differ by less: relative error of the loss, and per token that of the gradient in the
#: 2-norm. bf16 gradients are rounded to 8 bits, eager's twice: once for each of its two terms.
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}

#: A round repeats a short step until it has spent this long on it, so that one interruption does not make the round.
ROUND_SECONDS = 0.05
MOST_STEPS = 25


def measure(
    case: Case, competitors: Sequence[Competitor], *, rounds: int, say: Callable[[str], None] = lambda text: None
) -> CaseResult:
    """Times every competitor of a case, interleaved.

    Each round goes once through all competitors, starting one further than the round before, so that what one leaves
    behind in caches and allocator does not always meet the same successor. Compilation and warm-up come before the
    first round, peak memory (which perturbs the allocator) after the last.

    Args:
        case: the work.
        competitors: the first is the one that the others are checked against; it is itself checked against eager even
            where that is not to be measured.
        rounds: how many; their median is the result.
        say: is told what is going on.

    Raises:
        WrongResultError: a competitor's loss or gradient is not that of the first.
    """
    work = Workload(case)
    steps: dict[str, Step] = {}
    first_step_s: dict[str, float] = {}
    skipped: dict[str, str] = {}
    truth: tuple[Tensor, Tensor] | None = None
    measured = {competitor.name for competitor in competitors}
    unmeasured = [c for c in COMPETITORS if c.name == EAGER and c.name not in measured]
    for competitor in (*competitors, *unmeasured):
        say(f"{case.name}: {competitor.name}, first step")
        try:
            with warnings.catch_warnings():
                if competitor.optional:
                    warnings.simplefilter("ignore")  # what a compiler has to say of the competitor
                step = competitor.build(work)
                step.prepare()
                start = time.perf_counter()
                loss = step.run()
                first_step_s[competitor.name] = time.perf_counter() - start
        except Exception as error:  # whatever a compiler that is missing or does not know this Python raises
            if not competitor.optional:
                raise
            skipped[competitor.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        if competitor.name in measured:
            steps[competitor.name] = step
        gradient = step.gradient()
        if loss is not None and gradient is not None:
            if truth is None:
                truth = loss, gradient.clone()
            check_same(case, competitor.name, (loss, gradient), truth)
    del truth  # as large as the gradient, and done with
    repeats = {name: _warm_up(step) for name, step in steps.items()}
    rounds_ms: dict[str, list[float]] = {name: [] for name in steps}
    faults: dict[str, list[int]] = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            say(f"{case.name}: round {index + 1} of {rounds}")
            first = index % len(names)
            for name in names[first:] + names[:first]:
                ms, new_faults = _round(steps[name], repeats[name])
                rounds_ms[name].append(ms)
                faults[name] += new_faults
    finally:
        gc.enable()
    timings = {
        name: Timing(
            rounds_ms=rounds_ms[name],
            page_faults=statistics.median(faults[name]) if faults[name] else None,
            peak_bytes=_peak_bytes(step),
            first_step_s=first_step_s[name],
        )
        for name, step in steps.items()
    }
    return CaseResult(case, timings, skipped)


def check_same(case: Case, name: str, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Raises unless two pairs of loss (0-d) and gradient (rows, vocab) agree.

    Raises:
        WrongResultError: with the larger of the two errors and what is allowed.
    """
    loss_error = abs(got[0].item() - expected[0].item()) / abs(expected[0].item())
    allowed = GRADIENT_TOLERANCE[case.dtype]
    gradient_error = gradient_difference(got[1], expected[1])
    if loss_error <= LOSS_TOLERANCE and gradient_error <= allowed:  # false for a NaN
        return
    msg = (
        f"{case.name}: {name} and {KDFAST} do not compute the same: the losses {got[0].item():.7g} and "
        f"{expected[0].item():.7g} differ by {loss_error:.1e} (allowed {LOSS_TOLERANCE:.0e}), the gradients of a token "
        f"by up to {gradient_error:.1e} (allowed {allowed:.0e}); no time is reported for a wrong result"
    )
    raise WrongResultError(msg)


def gradient_difference(got: Tensor, expected: Tensor) -> float:
    """The largest over the tokens of norm(got - expected) / norm(expected), (rows, vocab) each; NaN if any is."""
    block = max(1, 2**22 // expected.shape[-1])  # rows at a time, so that the fp32 copies stay small
    errors = []
    for a, b in zip(torch.split(got, block), torch.split(expected, block), strict=True):
        reference = b.float()
        errors.append((a.float() - reference).norm(dim=-1) / reference.norm(dim=-1))
    return torch.cat(errors).max().item()


def _timed(step: Step) -> float:
    step.prepare()
    start = time.perf_counter()
    step.run()
    return (time.perf_counter() - start) * 1e3


def _warm_up(step: Step) -> int:
    """Takes the second step, and where that is short a third; returns how many make a round."""
    ms = _timed(step)
    if ms < ROUND_SECONDS * 1e3:
        ms = min(ms, _timed(step))
    return min(MOST_STEPS, math.ceil(ROUND_SECONDS * 1e3 / ms))


def _round(step: Step, repeats: int) -> tuple[float, list[int]]:
    """The median time of some steps, ms, and the minor page faults of each; none where they are not counted."""
    times, faults = [], []
    for _ in range(repeats):
        step.prepare()
        before = minor_page_faults()
        start = time.perf_counter()
        step.run()
        times.append((time.perf_counter() - start) * 1e3)
        after = minor_page_faults()
        if before is not None and after is not None:
            faults.append(after - before)
    return statistics.median(times), faults


def _peak_bytes(step: Step) -> int | None:
    step.prepare()
    return peak_extra_bytes(step.run)
