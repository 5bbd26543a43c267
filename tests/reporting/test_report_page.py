"""kdfast.report: its page, its JSON, the command line, the documentation."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import report_models
import torch
from report_models import loader
from torch import nn

import kdfast

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


@pytest.fixture
def classifier():
    return report_models.classifier()


def test_page_and_json_carry_the_same_figures(classifier, tmp_path):
    x, y, teacher, student, baseline = classifier
    report = kdfast.report(
        {"one": student, "two <b>": baseline}, teacher, loader(x, y), rounds=1, out=tmp_path, title="A & B"
    )
    assert json.loads((tmp_path / "report.json").read_text()) == report.figures
    page = (tmp_path / "report.html").read_text()
    assert page == report.html()
    assert "<title>A &amp; B</title>" in page
    assert "two &lt;b&gt;" in page
    assert "<b></td>" not in page
    text = re.sub(r"<[^>]+>", "", page)
    for model in report.figures["models"]:
        assert f"{100 * model['task']['accuracy']['value']:.1f} %" in text
        assert f"{model['task']['nats']['value']:.4f}" in text
        assert f"{model['calibration']['ece']:.4f}" in text
        assert f"{model['parameters']:,}" in text
        if model["role"] == "student":
            assert f"{model['against_teacher']['kl']['value']:.4f}" in text
            for part in ("inherited", "corrected", "introduced"):
                assert f"{model['errors'][part]['count']} of {model['errors'][part]['of']}" in text
    for bucket in report.figures["entropy_buckets"]:
        assert f"{bucket['models']['one']['kl']['value']:.4f}" in text
    for pair in report.figures["similarity"]["models"]["one"]["pairs"]:
        assert f"{pair['cka']:.3f}" in text
    assert "no label-only student was given" in text.lower()
    assert not re.findall(r"https?:", page)
    assert not re.findall(r"<(?:script|link|iframe|object)\b", page)
    assert all(s.startswith("data:image/") for s in re.findall(r'src="([^"]{0,26})', page))
    assert report._repr_html_().startswith("<iframe srcdoc=")
    lines = str(report).splitlines()
    assert f"{100 * report.figures['models'][0]['task']['accuracy']['value']:.1f} %" in lines[3]


def test_images_and_descriptions(tmp_path):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(48, 3)

        def forward(self, x):
            return self.fc(x.flatten(1))

    batch = [(torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1]))]
    options = {"rounds": 0, "examples": 2, "classes": ["ant", "bee", "cat"]}
    found = kdfast.report(Pixels(), Pixels(), batch, **options)
    entry = found.figures["examples"]["student"][0]
    assert entry["image"].startswith("data:image/png;base64,")
    assert entry["label"] in {"ant", "bee", "cat"}
    assert entry["image"] in found.html()
    told = kdfast.report(Pixels(), Pixels(), batch, describe=lambda x: f"<{tuple(x.shape)}>", **options)
    assert told.figures["examples"]["student"][0]["text"] == "<(3, 4, 4)>"
    assert "&lt;(3, 4, 4)&gt;" in told.html()
    with pytest.raises(TypeError, match="describe must return a text or a tensor to draw, got int"):
        kdfast.report(Pixels(), Pixels(), batch, describe=len, **options)


def python(code, cwd, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240, cwd=cwd, **kwargs
    )


def test_without_the_extra_figures_work_and_the_page_names_it(tmp_path):
    code = (
        "import sys\nsys.modules['jinja2'] = sys.modules['matplotlib'] = None\nimport torch, kdfast\n"
        "t = torch.nn.Linear(3, 4); x = [(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))]\n"
        "r = kdfast.report(t, t, x, rounds=0); print(r)\n"
        "for make in (lambda: r.save('here'), lambda: kdfast.report(t, t, x, rounds=0, out='here')):\n"
        "    try: make()\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('pip install "kdfast[docs]"') == 2
    assert not (tmp_path / "here").exists()
    done = python("import sys, kdfast; print({'jinja2', 'matplotlib', 'PIL'} & set(sys.modules))", tmp_path)
    assert done.stdout.strip() == "set()"


FACTORY = """
import torch
from collections import namedtuple
torch.manual_seed(0)
def options():
    x = torch.randn(24, 3)
    return dict(student=torch.nn.Linear(3, 4), teacher=torch.nn.Linear(3, 4), loader=[(x, x.argmax(-1))], rounds=1)
def named():
    return namedtuple("Made", "student teacher loader")(**{k: v for k, v in options().items() if k != "rounds"})
def lacking():
    return {"student": 1}
def more():
    return options() | {"colour": "red"}
def nothing():
    return None
def faulty():
    return options() | {"top_k": 0}
def package():
    import a_package_that_is_not_there
def broken():
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError("of the model itself")
    return options() | {"student": Broken()}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer", reason="the demo extra is not installed")
    from kdfast.cli import main

    (tmp_path / "the_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "the_factory", raising=False)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["kdfast", "report", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return call


def test_command_writes_the_report(command, tmp_path):
    code, output, _ = command("--factory", "the_factory:options", "--out", "here", "--title", "Mine")
    assert code == 0
    assert output.startswith("Mine: 24 examples")
    assert "report: here/report.html" in output
    assert (tmp_path / "here" / "report.html").is_file()
    code, output, _ = command("--factory", "the_factory:named", "--out", "there", "--json")
    assert code == 0
    assert json.loads(output) == json.loads((tmp_path / "there" / "report.json").read_text())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("the_factory", "--factory must be module:function"),
        ("no_factory:options", "there is no module 'no_factory'"),
        ("the_factory:dream", "has no function 'dream'"),
        ("the_factory:nothing", "it must return a mapping or a NamedTuple of student, teacher, loader"),
        ("the_factory:lacking", "lacks teacher, loader"),
        ("the_factory:more", "has colour, which kdfast.report has not"),
        ("the_factory:faulty", "top_k must be an int of at least 1"),
        ("the_factory:package", "it needs the package 'a_package_that_is_not_there'"),
    ],
)
def test_command_tells_what_is_wrong(command, factory, message):
    code, _, errors = command("--factory", factory)
    assert code == 2
    assert message in errors


def test_command_shows_where_a_model_of_the_user_fails(tmp_path):
    pytest.importorskip("typer", reason="the demo extra is not installed")
    (tmp_path / "the_factory.py").write_text(FACTORY)
    code = (
        "import sys; sys.argv[1:] = ['report', '--factory', 'the_factory:broken']; from kdfast.cli import main; main()"
    )
    done = python(code, tmp_path)
    assert done.returncode == 1
    assert "of the model itself" in done.stderr
    assert "Traceback" in done.stderr


def test_docstring_example():
    module = importlib.import_module("kdfast.reporting.report")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, scope)
    assert (tmp_path / "distillation-report" / "report.html").is_file()
    assert scope["found"].figures["task"] == "language model"
    assert "label" in capsys.readouterr().out
