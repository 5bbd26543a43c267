"""`python -m bench.gpu`: what a run records of those who fail, are missing or come too late. No timings."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from machine import INTERPRETING

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed wheel
pytest.importorskip("bench.gpu", reason="bench/ is not part of this source tree")

from bench.gpu import __main__ as suite
from bench.gpu.tables import markdown, summary
from bench.gpu.timing import Clock, measure


@pytest.fixture
def clock():
    return Clock(torch.device("cpu"))


def fails():
    msg = "no memory | at all\nand a trace"
    raise RuntimeError(msg)


def test_who_fails_or_is_missing_leaves_the_others_alone(clock):
    released = []
    steps = {"kdfast": lambda: None, "broken": fails, "absent": "x is not installed"}
    found = measure(clock, steps, 2, lambda: released.append(1))
    assert list(found) == list(steps)
    assert found["kdfast"].milliseconds is not None
    assert (found["broken"].note, found["broken"].failed) == ("RuntimeError: no memory / at all", True)
    assert (found["absent"].note, found["absent"].failed) == ("x is not installed", False)
    assert len(released) >= 4


def test_no_round_begins_after_the_deadline(clock):
    calls = []
    measure(clock, {"kdfast": lambda: calls.append(1)}, 50, lambda: None, deadline=0.0)
    assert len(calls) <= 4  # two to warm up, one for the peak, one round


@pytest.mark.parametrize("rehearse", [True, False])
def test_operators_take_turns(rehearse):
    names, cases = zip(*suite._cases(rehearse=rehearse), strict=True)
    assert names[: len(suite.OPERATORS)] == suite.OPERATORS
    assert len({case.name for case in cases}) == len(cases)


def result(name, kdfast, *, errors=None, errors_note="", floor_bytes=12):
    timing = {"milliseconds": kdfast, "spread": 0.1, "peak_bytes": None, "note": "", "failed": False}
    if kdfast is None:
        timing |= {"spread": None, "note": "declined"}
    others = {"bare products": timing | {"milliseconds": 1.0}, "peer": timing | {"milliseconds": 4.0, "spread": 0.0}}
    return {
        "name": name,
        "floor_bytes": floor_bytes,
        "timings": {"kdfast": timing, **others},
        "errors": errors or {},
        "errors_note": errors_note,
    }


def test_tables_hold_what_ran_and_what_did_not():
    results = {
        "machine": {"device": "a device", "torch": "2", "triton": "3", "commit": "c"},
        "tests": "1 passed",
        "copy_bytes_per_second": 1e12,
        "cases": [
            result("fine", 2.0, errors={"kdfast": 1e-3, "eager": 2e-3}),
            result("declined", None, floor_bytes=None),
            result("unchecked", 5.0, errors_note="RuntimeError: why"),
        ],
        "not_run": ["late"],
    }
    text = markdown(results)
    assert "| fine | peer | 4.000 | 0.00 | 2.00 |" in text
    assert "- unchecked: peer takes 0.80 of kdfast's time" in text
    assert "bare products takes" not in text
    assert "- late" in text
    assert "| fine | 1.00e-03 | 2.00e-03 |" in text
    assert "| unchecked | RuntimeError: why |" in text
    assert "| declined | declined | - |" in summary(results)
    assert "| fine | 2.000 | 0.00 | bare products 0.50; peer 2.00 |" in summary(results)
    assert not suite._complete(results)
    assert suite._complete(results | {"cases": results["cases"][:2]})


@pytest.mark.skipif(not INTERPRETING, reason="runs with TRITON_INTERPRET=1: the kernels need it on a CPU")
@pytest.mark.parametrize("name", suite.OPERATORS)
def test_every_operator_is_rehearsed(name, clock):
    module = importlib.import_module(name)
    for case in module.cases(rehearse=True):
        entry = suite._measure_case(module, case, clock, 1, float("inf"))
        json.dumps(entry)
        ours = entry["timings"]["kdfast"]
        assert not ours["failed"], ours["note"]
        assert not entry["errors_note"]
        if entry["errors"]:
            assert entry["errors"]["kdfast"] <= 2 * entry["errors"]["eager"] + 1e-6
