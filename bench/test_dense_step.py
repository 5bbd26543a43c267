"""The declared cases under pytest-benchmark: `python -m pytest bench`, one group per case of the quick selection.

`kdfast bench` measures the same steps interleaved, which is what ratios should be taken from; this is for who wants
pytest-benchmark's statistics, history and plots of single competitors.
"""

from __future__ import annotations

import warnings

import pytest

from kdfast.benchmark import cases, competitors
from kdfast.benchmark.measure import check_same

pytest.importorskip("pytest_benchmark", reason="the bench extra is not installed")

ROUNDS = 5


@pytest.fixture(scope="module", params=cases.QUICK, ids=lambda case: case.name)
def work(request):
    return competitors.Workload(request.param)


@pytest.fixture(scope="module")
def expected(work):
    """Loss and gradient of kdfast."""
    step = competitors.COMPETITORS[0].build(work)
    step.prepare()
    loss = step.run()
    return loss, step.gradient().clone()


@pytest.mark.parametrize("competitor", competitors.COMPETITORS, ids=lambda competitor: competitor.name)
def test_step(benchmark, work, expected, competitor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's, on what it does to the competitor
        step = competitor.build(work)
        step.prepare()
        loss = step.run()
    if loss is not None:
        check_same(work.case, competitor.name, (loss, step.gradient()), expected)
    benchmark.group = work.case.name
    benchmark.extra_info["floor_bytes"] = work.case.floor_bytes
    benchmark.pedantic(step.run, setup=step.prepare, rounds=ROUNDS, warmup_rounds=1)
