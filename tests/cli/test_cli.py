"""The command line: help, wrong use, missing extras, interruption."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytest.importorskip("typer", reason="the demo extra is not installed")

from kdfast.cli import COMMANDS, Command, main

MAIN = "from kdfast.cli import main; main()"


@pytest.fixture
def kdfast(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code and what it printed."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["kdfast", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return call


def test_help_lists_the_commands(kdfast):
    code, output, _ = kdfast("--help")
    assert code == 0
    assert all(name in output for name in COMMANDS)


def test_demo_help_names_its_options(kdfast):
    code, output, _ = kdfast("demo", "--help")
    assert code == 0
    for option in (
        "--quick",
        "--seed",
        "--seeds",
        "--out",
        "--resume",
        "--restart",
        "--temperature",
        "--alpha",
        "--online",
    ):
        assert option in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--fast"], "--fast"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["dance"], "dance"),
        (["demo", "--alpha", "2"], "alpha must be between"),
        (["demo", "--divergence", "kl"], "expected one of"),
        (["demo", "--divergence", "tvd"], "add --online"),
        (["demo", "--resume", "--restart"], "contradict"),
        (["demo", "--tokens", "10"], "train_sequences must be at least 1"),
        (["demo", "--quick", "--resume"], "does not exist"),
    ],
)
def test_wrong_use_is_told_and_exits_2(kdfast, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = kdfast(*arguments)
    assert code == 2
    assert message in errors


@pytest.mark.parametrize("package", ["typer", "rich", "tokenizers"])
def test_missing_package_names_the_extra(package, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; {MAIN}"
    command = [sys.executable, "-c", code, "demo", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert f'"{package}", which is not installed: pip install "kdfast[demo]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_command_leaves_the_others_alone(kdfast, monkeypatch):
    monkeypatch.setitem(COMMANDS, "dream", Command("a_package_that_is_not_there", "sleep"))
    code, output, _ = kdfast("--help")
    assert code == 0
    assert 'pip install "kdfast[sleep]"' in output
    code, _, errors = kdfast("dream")
    assert code == 2
    assert 'pip install "kdfast[sleep]"' in errors


def test_ctrl_c_leaves_a_checkpoint_and_130(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", MAIN, "demo", "--quick", "--steps", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("teacher labels the text"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "kdfast demo --quick --seed 0 --seeds 1 --steps 400 --resume" in output
    assert "Traceback" not in errors
    assert (tmp_path / "kdfast-report" / "checkpoint.pt").is_file()
