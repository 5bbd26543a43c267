"""The command line: help, wrong use, missing extras, interruption."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the demo extra is not installed")

import kdfast as package
from kdfast.cli import COMMANDS, SHARING, Command, main
from kdfast.cli.terminal import again, console, program
from kdfast.reporting.words import counted

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


def test_the_list_of_commands_needs_no_torch(tmp_path):
    code = f"import sys\ntry:\n    {MAIN}\nfinally:\n    print('torch' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "False False"
    assert all(command.summary in done.stdout for command in COMMANDS.values())


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


def test_text_that_is_printed_is_no_markup(monkeypatch):
    """rich takes [triton] for a style and :warning: for a picture, in lines, tables and their titles."""
    from rich.table import Table

    text = 'pip install "kdfast[triton]" into [/tmp/a] :warning: [bold]x[/bold]'
    table = Table(title=text, width=120)
    table.add_column(text)
    table.add_row(text)
    monkeypatch.setenv("COLUMNS", "130")
    terminal = console()
    terminal.file = io.StringIO()
    terminal.print(text)
    terminal.print(table)
    assert terminal.file.getvalue().count(text) == 4


def test_no_command_has_a_console_of_its_own():
    """Nor a column of a progress bar that reads markup."""
    folder = Path(inspect.getfile(package)).parent
    found = {
        f"{file.relative_to(folder)}: {line.strip()}"
        for file in folder.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"(?<!-> )(?<!: )\bConsole\(|TextColumn\((?!.*markup=False)", line) and file.name != "terminal.py"
    }
    assert not found


def test_doctor_names_the_extra_with_its_brackets(kdfast, monkeypatch):
    from kdfast.ops._registry import Backends, BackendStatus

    rows = (BackendStatus("triton", False, False, 'no triton: pip install "kdfast[triton]"'),)
    answer = Backends(rows)
    monkeypatch.setattr("kdfast.cli.doctor.backends", lambda _: answer)
    code, output, _ = kdfast("doctor")
    assert code == 0
    assert 'pip install "kdfast[triton]"' in output


def test_doctor_as_json(kdfast):
    code, output, _ = kdfast("doctor", "--json", "--dtype", "bf16")
    assert code == 0
    found = json.loads(output)
    assert found["versions"]["kdfast"] == package.__version__
    assert found["call"] == {"divergence": "forward_kl", "dtype": "bf16", "device": "cpu", "teachers": 1}
    assert [row["name"] for row in found["backends"] if row["chosen"]] == ["cpu"]
    assert {"cpu", "triton", "reference"} <= {row["name"] for row in found["backends"]}


def test_version(kdfast):
    assert kdfast("--version")[:2] == (0, f"kdfast {package.__version__}\n")


@pytest.mark.parametrize("command", ["demo", "tune"])
def test_defaults_are_shown_as_they_are(kdfast, command):
    from kdfast.cli import tune
    from kdfast.demo.settings import DemoSettings

    output = " ".join(kdfast(command, "--help")[1].split())
    if command == "tune":
        for name, value in tune.COUNTS.items():
            assert re.search(rf"--{name} \S.*?\[default: \({value}; {tune.QUICK[name]} with --quick\)", output)
        from kdfast.tuning.demo import SPACE

        assert f"[default: (of the demonstration {', '.join(SPACE)})]" in output
        return
    whole, quick = DemoSettings(), DemoSettings().shrunk()
    for name in ("temperature", "alpha", "divergence"):
        assert re.search(rf"--{name} \S.*?\[default: \({getattr(whole, name)}\)\]", output)
    for name, of in (("steps", lambda s: s.steps), ("tokens", lambda s: s.train_sequences * s.context)):
        assert re.search(rf"--{name} \S.*?\[default: \({of(whole)}; {of(quick)} with --quick\)\]", output)


def test_the_resume_line_starts_the_program_that_printed_it(monkeypatch, tmp_path):
    """`make demo` runs .venv/bin/kdfast, which is in nobody's PATH."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / ".venv" / "bin" / "kdfast"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\necho started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for started in (".venv/bin/kdfast", str(script)):
        monkeypatch.setattr("sys.argv", [started, "demo"])
        assert program() == [".venv/bin/kdfast"]
    line = again("demo", {"--quick": True, "--online": False, "--steps": None, "--out": "a b", "--space": ["x", "y"]})
    assert line == ".venv/bin/kdfast demo --quick --out 'a b' --space x --space y"
    assert subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout == "started\n"
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    assert program() == ["kdfast"]
    monkeypatch.setattr("sys.argv", ["/somewhere/kdfast/__main__.py"])
    assert program() == [sys.executable, "-m", "kdfast"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says what it has read")
@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_the_demonstration_shares_the_machine(given, policy, tmp_path):
    """Threads that spin while they wait make a busy machine stand still; a user's own choice stays."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables |= {"OMP_DISPLAY_ENV": "true"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    assert set(SHARING) == {"demo", "tune"}
    for command in SHARING:
        done = subprocess.run(
            [sys.executable, "-c", MAIN, command, "--resume", "--out", "none"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=tmp_path,
            env=variables,
        )
        assert done.returncode == 2
        assert re.search(r"OMP_WAIT_POLICY\W+= '(\w+)'", done.stderr)[1] == policy


def test_numbers_in_sentences():
    assert counted(1, "seed") == "1 seed"
    assert counted(0, "seed") == "0 seeds"
    assert counted(1200, "batch", "batches") == "1,200 batches"
