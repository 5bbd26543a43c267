"""The demonstration job, end to end on few steps, and its parts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

pytest.importorskip("tokenizers", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")

import torch
import torch.nn.functional as F
from rich.console import Console

from kdfast.demo import checkpoint, corpus, evaluate, teacher
from kdfast.demo.checkpoint import Interrupted
from kdfast.demo.data import batch_order, learning_rate_factor, sequences
from kdfast.demo.display import Display, results_table
from kdfast.demo.model import GPT, GPTConfig
from kdfast.demo.run import REPORT_NAME, RESULTS_NAME, run_demo
from kdfast.demo.settings import DemoError, DemoSettings
from kdfast.demo.tokenizer import END_OF_FILE, VOCAB_SIZE, encode, train_tokenizer
from kdfast.demo.train_teacher import held_out_nats

TINY = replace(
    DemoSettings().shrunk(),
    steps=24,
    batch=4,
    train_sequences=48,
    held_out_sequences=16,
    calibration_sequences=4,
    probe_sequences=4,
    probe_every=8,
    checkpoint_every=8,
    warmup=4,
)


def run(settings, out, **options):
    with (out.parent / f"{out.name}.log").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=200)
        with Display(console) as display:
            return run_demo(settings, out, display, **options)


@pytest.fixture(scope="module")
def small_library():
    """An eighth of the corpus for the runs: reading and encoding all of it takes longer than they do."""
    library = corpus.load_corpus()
    part = corpus.Corpus(library.train[::8], library.held_out[::4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdfast.demo.run.load_corpus", lambda: part)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_library):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "report"
    return out, run(TINY, out)


def stop_after(calls):
    count = 0

    def interrupted():
        nonlocal count
        count += 1
        return count >= calls

    return interrupted


def outcome(results):
    """Everything that must not depend on whether the run was interrupted: all but times and speeds."""
    students = [{key: value for key, value in run.items() if key != "seconds"} for run in results["students"]]
    return {"students": students, "teacher": results["teacher"]["evaluation"], "settings": results["settings"]}


def test_run_writes_finite_results(whole):
    out, results = whole
    assert json.loads((out / RESULTS_NAME).read_text(encoding="utf-8")) == results
    assert [run["method"] for run in results["students"]] == ["labels", "forward_kl", TINY.divergence]
    assert results["quick"] is True
    assert results["teacher"]["parameters"] >= 5 * results["student"]["parameters"]

    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, float) else []

    found = numbers(results)
    assert len(found) > 200
    assert all(math.isfinite(number) for number in found)


def test_students_improve(whole):
    _, results = whole
    for student in results["students"]:
        before, after = student["probes"]["hard"][0], student["probes"]["hard"][-1]
        assert before == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)  # a fresh model is close to uniform
        assert after < before - 0.5
        assert student["evaluation"]["nats"] < before - 0.5
        assert len(student["history"]["hard"]) == TINY.steps
        assert len(student["history"]["soft"]) == (0 if student["method"] == "labels" else TINY.steps)


def test_teacher_is_better_than_any_student(whole):
    _, results = whole
    nats = results["teacher"]["evaluation"]["nats"]
    assert nats < min(student["evaluation"]["nats"] for student in results["students"])
    assert nats == pytest.approx(results["teacher"]["training"]["figures"]["held_out_nats"], abs=0.5)


def test_log_shows_both_terms(whole):
    out, results = whole
    log = (out.parent / f"{out.name}.log").read_text(encoding="utf-8")
    assert re.search(r"forward_kl: 24/24 soft \d+\.\d+  hard \d+\.\d+ nats", log)
    assert re.search(r"labels only: 24/24 soft +-", log)
    table = results_table(results)
    assert table.row_count == 4
    assert "quick" in str(table.title)


def test_report_needs_no_network(whole):
    out, _ = whole
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    assert not re.findall(r"https?:", page)
    assert not re.findall(r"<(?:script|link|iframe|object)\b", page)
    sources = re.findall(r'src="([^"]{0,26})', page)
    assert sources == ["data:image/svg+xml;base64,"] * 5
    assert "Quick run." in page


@pytest.mark.parametrize(
    ("calls", "finished", "training"),
    [(3, 0, False), (30, 0, True), (85, 2, True)],
    ids=["labelling", "first student", "last student"],
)
def test_resume_equals_uninterrupted(whole, tmp_path, calls, finished, training):
    _, expected = whole
    out = tmp_path / "report"
    with pytest.raises(Interrupted):
        run(TINY, out, interrupted=stop_after(calls))
    progress = checkpoint.load(out, TINY)
    assert len(progress.finished) == finished
    assert (progress.current is not None) is training
    assert not (out / REPORT_NAME).exists()
    with pytest.raises(DemoError, match="--resume"):
        run(TINY, out)
    with pytest.raises(DemoError, match=r"temperature 1.0 there and 2.0 now"):
        run(replace(TINY, temperature=2.0), out, resume=True)
    resumed = run(TINY, out, resume=True)
    assert outcome(resumed) == outcome(expected)
    assert not (out / checkpoint.FILE_NAME).exists()


def test_damaged_or_missing_checkpoint(tmp_path):
    with pytest.raises(DemoError, match="does not exist"):
        checkpoint.load(tmp_path, TINY)
    checkpoint.save(tmp_path, TINY, checkpoint.Progress(seconds=3.0))
    assert checkpoint.load(tmp_path, TINY).seconds == 3.0
    path = tmp_path / checkpoint.FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DemoError, match="cannot be read"):
        checkpoint.load(tmp_path, TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"alpha": 1.5}, "alpha must be between"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"divergence": "kl"}, "unknown name 'kl'"),
        ({"divergence": "forward_kl"}, "name another"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(DemoError, match=message):
        replace(TINY, **change)


def test_split_is_disjoint_and_fixed():
    library = corpus.load_corpus()
    train = {file.name for file in library.train}
    held_out = {file.name for file in library.held_out}
    assert not train & held_out
    assert not {file.text for file in library.train} & {file.text for file in library.held_out}
    assert len(held_out) / len(train | held_out) == pytest.approx(corpus.HELD_OUT_PERCENT / 100, abs=0.05)
    # By name alone, so these hold for every Python version; the shipped teacher was trained on this split.
    expected = {"pprint.py": True, "turtle.py": True, "warnings.py": True, "ast.py": False, "typing.py": False}
    assert {name: corpus.is_held_out(name) for name in expected} == expected
    assert corpus.is_held_out("re.py") == corpus.is_held_out("re/__init__.py")


def test_corpus_skips_what_is_not_the_library(tmp_path):
    for name in ("a.py", "site-packages/b.py", "x/test/c.py", "encodings/d.py", "_sysconfigdata_x.py", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(FileNotFoundError, match="1 usable"):
        corpus.load_corpus(tmp_path)


def test_shipped_teacher_matches_its_record():
    model, tokenizer, record = teacher.load_teacher()
    assert tokenizer.get_vocab_size() == record["config"]["vocab_size"] >= 4096
    assert model.parameter_count() == record["figures"]["parameters"]
    folder = teacher.TEACHER_FOLDER
    assert (folder / "teacher.safetensors").stat().st_size <= 12_000_000
    text = corpus.SourceFile("x.py", "def f(x: int) -> str:\n    return 'ü' * x\n")
    ids = encode(tokenizer, [text])
    assert tokenizer.decode(ids[:-1].tolist()) == text.text
    assert tokenizer.id_to_token(int(ids[-1])) == END_OF_FILE
    assert held_out_nats(model, encode(tokenizer, [text])[None]) < math.log(VOCAB_SIZE)


def test_tokenizer_is_trained_on_what_it_is_given():
    tokenizer = train_tokenizer([corpus.SourceFile("a.py", "lorem ipsum " * 50)], vocab_size=300)
    assert tokenizer.get_vocab_size() <= 300
    assert len(tokenizer.encode("lorem ipsum lorem").ids) == 3


def test_labels_need_memory(monkeypatch):
    monkeypatch.setattr(teacher, "available_memory", lambda: 1000)
    model = GPT(GPTConfig(64, 8, 1, 1, 16))
    with pytest.raises(DemoError, match="--tokens"):
        teacher.label(model, torch.zeros(2, 17, dtype=torch.int64), lambda _done, _total: None)


def test_model_is_causal():
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 16, 2, 2, 12)).eval()
    ids = torch.randint(32, (2, 12))
    changed = ids.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 32
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-4
    assert model.parameter_count() == sum(value.numel() for value in model.state_dict().values())
    with pytest.raises(ValueError, match="multiple"):
        GPTConfig(32, 18, 1, 2, 12)


def test_sequences_and_order():
    stream = torch.arange(100)
    cut = sequences(stream, 9, 4)
    assert cut.shape == (4, 10)
    assert cut[:, 0].tolist() == [0, 20, 50, 70]
    assert (cut.diff(dim=1) == 1).all()
    with pytest.raises(ValueError, match="fewer than one sequence"):
        sequences(stream, 100, 1)
    order = batch_order(10, 4, 5, seed=1)
    assert order.shape == (5, 4)
    assert sorted(order.flatten()[:10].tolist()) == list(range(10))
    assert torch.equal(order, batch_order(10, 4, 5, seed=1))
    assert not torch.equal(order, batch_order(10, 4, 5, seed=2))
    factors = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert factors[9] == 1.0
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[10:] == sorted(factors[10:], reverse=True)


class Scaled(torch.nn.Module):
    """A model whose logits are the logarithms of known probabilities times a factor."""

    def __init__(self, logits, factor):
        super().__init__()
        self.logits, self.factor = logits, factor

    def forward(self, ids):
        return self.factor * self.logits.expand(*ids.shape, -1)


def test_calibration_of_a_model_that_is_too_sure():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    probabilities = logits.softmax(-1)
    ids = torch.multinomial(probabilities, 200 * 65, replacement=True, generator=generator).view(200, 65)
    score, top1 = evaluate.evaluate(Scaled(logits, 3.0), ids, None, 100, lambda: None)
    assert score.fitted_temperature == pytest.approx(3.0, rel=0.05)
    assert score.agreement == 1.0
    assert (top1 == 0).all()
    assert score.accuracy == pytest.approx(probabilities[0].item(), abs=0.02)
    assert score.ece == pytest.approx((3.0 * logits).softmax(-1)[0].item() - probabilities[0].item(), abs=0.02)
    assert score.ece_fitted < 0.02
    assert score.nats_fitted < score.nats_unfitted
    expected = F.cross_entropy((3.0 * logits).expand(200 * 64, -1), ids[:, 1:].flatten()).item()
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_seeds_are_summarised(whole):
    from kdfast.demo.run import summary

    _, results = whole
    runs = results["students"]
    shifted = [{**run, "evaluation": {**run["evaluation"], "nats": run["evaluation"]["nats"] + 2.0}} for run in runs]
    row = summary(TINY, runs + shifted)[0]
    assert row["nats"]["mean"] == pytest.approx(runs[0]["evaluation"]["nats"] + 1.0)
    assert row["nats"]["std"] == pytest.approx(math.sqrt(2.0))
    assert row["ece"]["std"] == 0.0
