"""Places that cannot be written are found before the work, by every command, and trying leaves nothing behind."""

from __future__ import annotations

import os
import stat
import sys

import pytest
import torch
from torch import nn

import kdfast
from kdfast.reporting.outputs import check_file, check_folder


def tree(path):
    """Every file below, with content and time of change."""
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in sorted(path.rglob("*"))}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder" / "report.html").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("folder", "it is a folder"),
        ("nowhere/file", "there is no folder"),
        ("file/below", "there is no folder"),
        ("/proc/kdfast", "cannot be written"),
    ],
)
def test_files(places, path, reason):
    before = tree(places)
    with pytest.raises(OSError, match=reason) as caught:
        check_file(places / path, "--json")
    assert str(caught.value).startswith(f"--json {places / path} cannot be written")
    for good in ("file", "new"):
        check_file(places / good, "--json")
    assert tree(places) == before


@pytest.mark.parametrize(
    ("path", "reason"),
    [("file", "is no folder"), ("file/a/b", "is no folder"), ("/proc/kdfast/a", "cannot be written")],
)
def test_folders(places, path, reason):
    before = tree(places)
    with pytest.raises(OSError, match=reason) as caught:
        check_folder(places / path, "--out")
    assert f"--out {places / path} cannot be written" in str(caught.value)
    with pytest.raises(OSError, match=r"report\.html.*it is a folder"):
        check_folder(places / "folder", "--out", ["report.html"])
    for good in ("folder", "new", "new/below"):
        check_folder(places / good, "--out", ["report.json"])
    assert tree(places) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_rights(places):
    (places / "folder").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="Permission denied"):
        check_folder(places / "folder" / "new", "--out")
    (places / "file").chmod(stat.S_IRUSR)
    with pytest.raises(OSError, match="Permission denied"):
        check_file(places / "file", "--json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_opened(places):
    os.mkfifo(places / "pipe")
    check_file(places / "pipe", "--json")  # opening it would wait for its reader


def test_the_report_runs_no_model_for_a_place_that_is_none(places):
    class Never(nn.Linear):
        def forward(self, x):
            raise AssertionError("the models ran")

    batch = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]))]
    with pytest.raises(OSError, match=r"out .*file cannot be written"):
        kdfast.report(Never(3, 4), Never(3, 4), batch, out=places / "file")


FACTORY = """
def work(*_):
    raise AssertionError("the work began")
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--out", "file"],
        ["report", "--factory", "mine:work", "--out", "file/below"],
        ["tune", "--factory", "mine:work", "--space", "t=1:2", "--out", "file"],
        ["bench", "--quick", "--json", "nowhere/file"],
        ["bench", "--quick", "--markdown", "folder"],
        ["cache", "info", "cache", "--plot", "nowhere/p.png"],
        ["cache", "build", "file", "text.txt", "--factory", "mine:work"],
        ["cache", "merge", "cache", "--into", "file"],
        ["cache", "export", "cache", "nowhere/file"],
        ["cache", "import", "some.parquet", "file"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_command(places, arguments, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="the tune extra is not installed")
    pytest.importorskip("pyarrow", reason="the cache extra is not installed")
    from kdfast.cli import main

    (places / "mine.py").write_text(FACTORY)
    (places / "text.txt").write_text("text")
    monkeypatch.chdir(places)
    monkeypatch.setattr("sys.argv", ["kdfast", *arguments])
    before = tree(places)
    with pytest.raises(SystemExit) as caught:
        main()
    sys.modules.pop("mine", None)
    path = arguments[-1] if arguments[1] != "build" else "file"
    errors = capsys.readouterr().err
    assert caught.value.code == 2, errors
    assert f"{path} cannot be written" in errors
    assert tree(places) == before
