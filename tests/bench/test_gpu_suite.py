"""`python -m bench.gpu`: what a run records of those who fail, are missing or come too late. No timings."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from machine import INTERPRETING

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed wheel
pytest.importorskip("bench.gpu", reason="bench/ is not part of this source tree")

from bench.gpu import __main__ as suite
from bench.gpu import autotune, errors, jobs
from bench.gpu.tables import markdown, summary
from bench.gpu.timing import Clock, captured, launches, measure


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
    names, cases = zip(*suite.cases(rehearse=rehearse), strict=True)
    assert names[: len(suite.OPERATORS)] == suite.OPERATORS
    assert len({case.name for case in cases}) == len(cases)
    assert any(case.vocab % 2 for case in cases)
    assert any(getattr(case, "k", 64) == 1 for case in cases)


def right_by(value, tolerance=1e-2):
    error = {"value": value, "index": [0, 3], "got": "1.0", "want": "2.0"}
    return {"kdfast": error, "eager": error, "tolerance": tolerance}


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
            result("fine", 2.0, errors=right_by(1e-3)),
            result("declined", None, floor_bytes=None),
            result("unchecked", 5.0, errors_note="Traceback\n\nRuntimeError: why\n"),
        ],
        "not_run": ["late"],
    }
    text = markdown(results)
    assert "| fine | peer | 4.000 | 0.00 | 2.00 |" in text
    assert "- unchecked: peer takes 0.80 of kdfast's time" in text
    assert "bare products takes" not in text
    assert "- late" in text
    assert "| fine | 1.00e-03 | [0, 3] | 1.0e-02 | 1.00e-03 |" in text
    assert "| unchecked | RuntimeError: why |" in text
    assert "| declined | declined | - |" in summary(results)
    assert "| fine | 2.000 | 0.00 | bare products 0.50; peer 2.00 |" in summary(results)


def test_the_worst_element_and_what_is_right():
    want = torch.tensor([[1.0, -4.0], [2.0, 0.0]], dtype=torch.float64)
    got = want.float()
    got[1, 0] += 0.5
    worst = errors.worst(got, want)
    assert (worst["value"], worst["index"], worst["got"], worst["want"]) == (0.125, [1, 0], "2.5", "2.0")
    got[0, 1] = float("nan")
    assert errors.worst(got, want)["value"] is None
    assert errors.worst(got, want)["index"] == [0, 1]
    assert suite.right(right_by(1e-3))
    assert not suite.right(right_by(0.9))
    assert not suite.right(right_by(None))
    assert not suite.right({})


def outcome(**result):
    return jobs.Outcome("bench.gpu.dense|x", jobs.DONE, result)


@pytest.fixture
def run(tmp_path):
    """A run of the suite that has found nothing so far."""
    return suite.Suite(suite._arguments(["--out", str(tmp_path), "--rehearse"]))


@pytest.mark.parametrize("found", [right_by(0.9), right_by(None), {}])
def test_a_wrong_gradient_is_a_failure(run, found):
    assert not run.judge("a case", outcome(errors=found))
    run.results["cases"].append(result("a case", 1.0, errors=found))
    assert not suite.complete(run.results)
    run.write()
    assert "**a case**" in (run.out / "REPORT.md").read_text()
    assert run.judge("another", outcome(errors=right_by(1e-3)))


def test_an_empty_list_is_a_failure(run):
    assert not suite.complete(run.results)
    run.measure("key timings", jobs.Runner(run.out, {}, float("inf")), [])
    assert "the list is empty" in run.results["failures"][0]["why"]


def test_launches_and_graphs_are_counted(clock):
    assert launches(clock, lambda: None) == {"triton": 0, "device": None}
    assert captured(clock, lambda: None)["note"] == "needs a GPU"


def test_the_table_of_tiles_takes_the_fastest():
    shipped = Path(suite.ROOT, "kernels", "triton", "tiles.json")
    text, said = autotune.table(shipped, "interpreter", {"light|512|1": 2.0, "light|1024|4": 1.0})
    want = json.loads(shipped.read_text())
    want["dense"]["interpreter"]["light"] = [1024, 4]
    assert json.loads(text) == want
    assert said == ["tiles.json, dense, interpreter, light: [512, 1] to [1024, 4], 1.000 ms in the place of 2.000"]
    assert autotune.table(shipped, "interpreter", {})[0] == shipped.read_text()


WORKER = """
import json, os, sys, time
out, items = sys.argv[sys.argv.index("--out") + 1], sys.argv[sys.argv.index("--") + 1 :]
with open(out, "a") as stream:
    for item in items:
        print(json.dumps({"item": item}), file=stream, flush=True)
        print(json.dumps({"item": item, "result": {"before": item}}), file=stream, flush=True)
        if item.startswith("abort"):
            os.abort()
        if item.startswith("hang"):
            time.sleep(1e6)
        if item.startswith("late"):
            stream.write('{"item": ')
            stream.flush()
            os._exit(3)
        print(json.dumps({"item": item, "state": "done", "note": "", "seconds": 0.0}), file=stream, flush=True)
"""


@pytest.mark.parametrize("per_process", [1, 9])
@pytest.mark.parametrize("workers", [1, 3])
def test_who_dies_or_hangs_costs_itself_alone(tmp_path, monkeypatch, per_process, workers):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(jobs, "WORKER", worker)
    items = ["a", "b", "abort 1", "c", "d", "hang 1", "e", "f", "late 1"]
    runner = jobs.Runner(tmp_path, dict(os.environ), time.monotonic() + 120)
    found = {o.item: o for o in runner.run("x", items, limit=5.0, workers=workers, per_process=per_process)}
    assert {item: found[item].state for item in items} == {
        **dict.fromkeys("abcdef", jobs.DONE),
        **{"abort 1": jobs.CRASHED, "hang 1": jobs.TIMED_OUT, "late 1": jobs.CRASHED},
    }
    assert all(found[item].result == {"before": item} for item in items)
    assert "SIGABRT" in found["abort 1"].note
    assert "exit status 3" in found["late 1"].note


def test_nothing_begins_after_the_deadline(tmp_path):
    found = list(jobs.Runner(tmp_path, dict(os.environ), 0.0).run("x", ["a", "b"], limit=5.0))
    assert [(o.state, o.note) for o in found] == [(jobs.NOT_RUN, jobs.LATE)] * 2


@pytest.mark.skipif(INTERPRETING, reason="its processes choose the interpreter themselves: once is enough")
def test_a_rehearsal_with_faults_brings_the_others_home(tmp_path):
    """Every third process aborts or hangs, and what was found lies in the folder all the same."""
    words = ["--rehearse", "--installed", "--sabotage", "3", "--only", "packed", "--limit", "45", "--rounds", "1"]
    assert suite.main(["--out", str(tmp_path), "--no-tests", *words]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    items = sum(phase["items"] for phase in results["phases"].values())
    states = [state for phase in results["phases"].values() for state in phase["states"].items()]
    done = sum(n for state, n in states if state == jobs.DONE)
    lost = {f["what"]: f["why"] for f in results["failures"]}
    assert done == items - items // 3
    assert len(lost) == items // 3
    assert all("SIGABRT" in why or "nothing for 45 s" in why for why in lost.values())
    assert all(case["right"] for case in results["cases"] if case["state"] == jobs.DONE)
    report = (tmp_path / "REPORT.md").read_text()
    assert all(what in report for what in lost)


@pytest.mark.skipif(not INTERPRETING, reason="runs with TRITON_INTERPRET=1: the kernels need it on a CPU")
@pytest.mark.parametrize("name", suite.OPERATORS)
def test_every_operator_is_rehearsed(name, tmp_path):
    """Its first case in a process of the suite, and the others' gradients."""
    items = [f"{name}|{case.name}" for case in importlib.import_module(name).cases(rehearse=True)]
    run = suite.Suite(suite._arguments(["--out", str(tmp_path), "--rehearse", "--rounds", "1"]))
    environment = dict(os.environ, TRITON_INTERPRET="1", KDFAST_BACKEND="triton", PYTHONSAFEPATH="1")
    runner = jobs.Runner(tmp_path, environment, float("inf"), rehearse=True)
    run.measure("key timings", runner, items[:1])
    for found in run.phase("smoke", "smoke", items[1:], runner, per_process=len(items)):
        run.judge(found.item, found)
    assert not run.results["failures"]
    (case,) = run.results["cases"]
    assert case["right"]
    assert case["timings"]["kdfast"]["milliseconds"] > 0
    assert case["launches"]["triton"] > 0
    assert suite.complete(run.results)
