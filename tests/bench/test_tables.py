"""The tables of README and docs are those of the recorded runs, and runs are read back as they were written."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # behind the installed wheel
tables = pytest.importorskip("bench.tables", reason="bench/ is not part of this source tree")

turns = importlib.import_module("bench.turns")

if not (ROOT / tables.RESULTS).is_dir():
    pytest.skip("bench/results is not part of this source tree", allow_module_level=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the pages and of the runs."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for folder in ("docs", tables.RESULTS):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """Calls the command; returns its exit code."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tables", *map(str, arguments)])
        return tables.main()

    return call


def test_no_table_is_stale(run):
    assert run("--check") == 0, "run python -m bench.tables"


def test_every_table_stands_somewhere():
    marked = re.findall(r"bench:begin (\S+)", "".join(page.read_text() for page in tables.pages(ROOT)))
    assert sorted(marked) == sorted(tables.REGIONS)


def test_a_changed_run_makes_its_pages_stale(run, checkout, capsys):
    assert run("--check", "--root", checkout) == 0
    for file in (checkout / tables.RESULTS).glob("*/sparse.json"):
        data = json.loads(file.read_text())
        for section in data.values():
            section["rounds_ms"]["jsd, T = 1"] = [1e6 for _ in section["rounds_ms"]["jsd, T = 1"]]
        file.write_text(json.dumps(data))
    assert run("--check", "--root", checkout) == 1
    assert "large-vocabulary.md: stale" in capsys.readouterr().out
    assert run("--root", checkout) == 0
    assert run("--check", "--root", checkout) == 0


def test_without_runs_the_page_says_so(run, checkout):
    shutil.rmtree(checkout / tables.RESULTS)
    assert run("--root", checkout) == 0
    assert "No run is recorded." in (checkout / "README.md").read_text()


def test_a_marker_without_its_end_is_an_error(checkout):
    with pytest.raises(ValueError, match="markers"):
        tables.rewritten("<!-- bench:begin sparse -->\nno end", checkout)


def fails():
    msg = "no compiler\nand a trace"
    raise RuntimeError(msg)


def test_turns_are_read_back(tmp_path):
    calls = {"a": lambda: sum(range(100)), "b": lambda: None, "broken": fails, "absent": "x is not installed"}
    found = turns.take_turns(calls, 2, {"rows": 3})
    assert {name: len(rounds) for name, rounds in found.rounds_ms.items()} == {"a": 2, "b": 2}
    assert found.missing == {"broken": "RuntimeError: no compiler", "absent": "x is not installed"}
    file = tmp_path / "turns.json"
    turns.write(file, "one", found)
    turns.write(file, "two", found)
    assert turns.read(file) == {"one": found, "two": found}
    assert "Not measured: absent: x is not installed" in turns.listing(found, "b")


def test_ratios_are_taken_within_a_round_and_sums_too():
    found = turns.Turns({}, {}, {"a": [1.0, 10.0, 100.0], "b": [30.0, 300.0, 2900.0]}, {}, {})
    assert found.ratio("b", "a") == 30
    assert found.ratio("a + b", "a") == 31
    assert found.ms("a + b") == 310
