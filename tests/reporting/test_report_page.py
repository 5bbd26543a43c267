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
from kdfast.reporting import page, plots
from kdfast.reporting.page import bucket_labels

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


@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "says", "accuracy"),
    [
        ("near", "far", "Distillation helped student", "+"),
        ("far", "near", "Distillation did not help student", "-"),
        ("near", "near", "Whether distillation helped student cannot be told", "+"),
    ],
)
def test_the_lead_begins_with_the_verdict(language, first, second, says, accuracy):
    """By accuracy of a classifier, by cross-entropy of a language model."""
    labels = torch.randint(0, 5, (200, 3) if language else (200,))
    sure = 4.0 * nn.functional.one_hot(labels, 5).float()
    tables = {"near": sure + torch.randn_like(sure), "far": torch.randn_like(sure)}
    models = {name: report_models.Table(tables[name]) for name in tables}
    batch = [(torch.arange(200), labels)]
    report = kdfast.report(
        models[first], report_models.Table(sure), batch, baseline=models[second], rounds=0, layers=()
    )
    leads = re.findall(r'<p class="lead"><b>(.*?)</b></p>', report.html())
    assert len(leads) == 1
    sign = {"+": "-", "-": "+"}[accuracy] if language and first != second else accuracy  # fewer nats are better
    assert leads[0].startswith(f"{says}: {sign}")
    unit = "nats a token" if language else "points of accuracy"
    chance = "which chance may explain." if first == second else "more than chance explains."
    assert f"{unit} against labels only, {chance}" in leads[0]
    assert str(report).endswith(leads[0])


def test_the_verdict_without_a_label_only_student_or_labels():
    labels = torch.randint(0, 5, (200,))
    sure = 4.0 * nn.functional.one_hot(labels, 5).float()
    near, far = sure + torch.randn_like(sure), torch.randn_like(sure)
    batch, options = torch.arange(200), {"rounds": 0, "layers": ()}

    def lead(student, teacher, loader, **more):
        models = {name: report_models.Table(table) for name, table in more.items()}
        made = kdfast.report(report_models.Table(student), report_models.Table(teacher), loader, **options, **models)
        return str(made).splitlines()[-1]

    assert lead(far, sure, [(batch, labels)]).startswith("student is behind its teacher: -")
    assert lead(sure, far, [(batch, labels)]).startswith("student is better than its teacher: +")
    assert lead(sure, sure, [(batch, labels)]).startswith("student cannot be told from its teacher: +0.0")
    assert re.match(r"student predicts what its teacher predicts at \d+\.\d % \[.*\] of the", lead(near, sure, [batch]))
    assert lead(near, sure, [batch], baseline=far).startswith("Distillation brought student closer to its teacher: -")
    assert "no closer to its teacher: +" in lead(far, sure, [batch], baseline=near)


def test_buckets_have_labels_that_differ(classifier):
    buckets = [(0.0, 0.0), (1.0001, 1.0002), (1.0002, 1.00031), (1.00032, 1.00033)]
    labels = bucket_labels([{"low": low, "high": high} for low, high in buckets])
    assert labels == ["0", "1.0001 to 1.0002", "1.0002 to 1.00031", "1.00032 to 1.00033"]
    assert bucket_labels([{"low": 0.1, "high": 0.52}, {"low": 0.53, "high": 2.0}]) == ["0.1 to 0.52", "0.53 to 2"]
    x, y, teacher, student, _ = classifier
    found = kdfast.report(student, teacher, loader(x, y), rounds=0)
    for label in bucket_labels(found.figures["entropy_buckets"]):
        assert found.html().count(f"<td>{label}</td>") == 1


def test_a_model_has_one_colour_on_every_page(classifier, monkeypatch):
    """Grey is the teacher, orange labels only; parts and lines to compare with have no model's colour."""
    drawn = {}
    x, y, teacher, student, baseline = classifier
    report = kdfast.report({"one": student, "two": student}, teacher, loader(x, y), baseline=baseline, rounds=0)
    monkeypatch.setattr(
        page.plots, "interval_bars", lambda title, form, rows, most=None: drawn.update({r.name: r.colour for r in rows})
    )
    page.render(report.figures)
    assert drawn == {
        "teacher": plots.TEACHER,
        "labels only": plots.LABELS_ONLY,
        "one": plots.DISTILLED[0],
        "two": plots.DISTILLED[1],
    }
    models = {plots.TEACHER, plots.LABELS_ONLY, *plots.DISTILLED}
    assert len(models) == 2 + len(plots.DISTILLED)
    assert not models & {*plots.PARTS, plots.INK}


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
def streamed():
    made = options()
    return made | {"loader": (batch for batch in made["loader"] * 5)}
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


def test_command_shows_how_far_it_is(command):
    """On the other stream: what is printed at the end stays alone."""
    code, output, errors = command("--factory", "the_factory:options", "--out", "here [b]", "--json")
    assert code == 0
    json.loads(output)
    assert errors.splitlines() == [
        "making the models and the data: the_factory:options",
        "batches through all models: 1/1",
        "timing the models, and drawing the page",
    ]
    code, output, errors = command("--factory", "the_factory:streamed", "--out", "here [b]")
    assert code == 0
    assert "report: here [b]/report.html" in output
    assert re.findall(r"batches through all models: (\d+)", errors) == ["1", "2", "4"]


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
