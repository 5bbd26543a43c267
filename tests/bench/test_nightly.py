"""`python -m bench.nightly`: every part comes to a verdict, whatever the others do. No timings."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # behind the installed wheel
nightly = pytest.importorskip("bench.nightly", reason="bench/ is not part of this source tree")

FAKES = {
    "Says two things": nightly.Part("echo 3 passed; echo noise; echo 4 passed; echo 3 passed", 1, r"\d+ passed"),
    "fails": nightly.Part("echo 1 passed; exit 3", 1, r"\d+ passed"),
    "hangs | with a child": nightly.Part("sleep 1000 & sleep 1000", 0),
    "says nothing": nightly.Part("read -r line || true", 1),
}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Calls the command over parts that are none; returns exit code and what the file has."""
    monkeypatch.setattr(nightly, "PARTS", FAKES)
    file = tmp_path / "a folder that is new" / "nightly.json"

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nightly", "--logs", str(tmp_path / "logs"), "--json", str(file), *words])
        return nightly.main(), nightly.read(file)

    return call


def test_every_part_has_a_verdict(command, tmp_path, capsys):
    code, results = command()
    assert code == 1
    assert {name: r.verdict for name, r in results.items()} == {
        "Says two things": "passed",
        "fails": "exit status 3",
        "hangs | with a child": "more than 0 minutes",
        "says nothing": "passed",
    }
    assert [r.said for r in results.values()] == [["3 passed", "4 passed"], ["1 passed"], [], []]
    assert (tmp_path / "logs" / "says-two-things.log").read_text().count("passed") == 3
    assert "fails: exit status 3; 1 passed" in capsys.readouterr().out


def test_some_parts_replace_their_results_alone(command, monkeypatch):
    before = command()[1]
    monkeypatch.setitem(FAKES, "fails", nightly.Part("echo 2 passed", 1, r"\d+ passed"))
    code, after = command("--only", "fails")
    assert code == 0
    assert list(after) == list(before)
    assert after["fails"].said == ["2 passed"]
    assert after["says nothing"] == before["says nothing"]


def test_the_table_has_a_row_for_each(command):
    text = nightly.listing(command()[1])
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(FAKES)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert "| passed; 3 passed; 4 passed |" in rows[0]


def test_an_unknown_part_is_named(command, capsys):
    with pytest.raises(SystemExit):
        command("--only", "nonsense")
    assert "'nonsense'" in capsys.readouterr().err


def test_its_commands_name_what_is_there():
    """Modules, files and targets of make."""
    targets = re.findall(r"^([\w./$()-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    presets = [p["name"] for p in json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"]]
    for part in nightly.PARTS.values():
        for target in re.findall(r"(?<!c)make ([a-z-]+)", part.command):
            assert target in targets
        for preset in re.findall(r"--preset (\S+)", part.command):
            assert preset in presets
        for module in re.findall(r"-m ((?:bench|examples)(?:\.\w+)+)", part.command):
            assert importlib.util.find_spec(module)
        for path in re.findall(r"(?:tests|csrc)/[\w/.]+", part.command):
            assert (ROOT / path).exists()
