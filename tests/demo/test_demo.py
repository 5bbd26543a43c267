"""The demonstration job, end to end on few steps, and its parts."""

from __future__ import annotations

import html
import io
import json
import math
import re
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("tokenizers", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file

import kdfast
from kdfast import cache
from kdfast.demo import checkpoint, corpus, evaluate, targets, teacher
from kdfast.demo.checkpoint import Interrupted
from kdfast.demo.data import batch_order, learning_rate_factor, places, sequences
from kdfast.demo.display import Display, cache_text, results_table
from kdfast.demo.model import GPT, GPTConfig
from kdfast.demo.results import cache_cost, comparison, gains, summary, verdict
from kdfast.demo.run import REPORT_NAME, RESULTS_NAME, run_demo
from kdfast.demo.settings import DemoError, DemoSettings
from kdfast.demo.student import Student
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
CACHE = "cache-T1.0"


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
    assert [run["method"] for run in results["students"]] == [
        "labels",
        "forward_kl",
        TINY.divergence,
        "forward_kl-online",
    ]
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
    assert table.row_count == 5
    assert re.search(r"teacher labels the text: 48/48 [\d,]+ tokens/s", log)
    assert "quick" in str(table.title)


def test_report_needs_no_network(whole):
    out, _ = whole
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    assert not re.findall(r"https?:", page)
    assert not re.findall(r"<(?:script|link|iframe|object)\b", page)
    sources = re.findall(r'src="([^"]{0,26})', page)
    assert sources == ["data:image/svg+xml;base64,"] * 5
    assert "Quick run." in page


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("calls", "stored", "finished", "training"),
    [(3, 8, 0, False), (30, 48, 0, True), (85, 48, 2, True), (130, 48, 3, True)],
    ids=["labelling", "first student", "from the cache", "last student"],
)
def test_resume_equals_uninterrupted(whole, tmp_path, monkeypatch, calls, stored, finished, training):
    _, expected = whole
    out = tmp_path / "report"
    with pytest.raises(Interrupted):
        run(TINY, out, interrupted=stop_after(calls))
    progress = checkpoint.load(out, TINY)
    assert len(progress.finished) == finished
    assert (progress.current is not None) is training
    assert len(cache.Reader(out / CACHE)) == progress.written["samples"] == stored
    assert not (out / REPORT_NAME).exists()
    with pytest.raises(DemoError, match="--resume"):
        run(TINY, out)
    with pytest.raises(DemoError, match=r"temperature 1.0 there and 2.0 now"):
        run(replace(TINY, temperature=2.0), out, resume=True)
    asked = asked_for_the_cache(monkeypatch)
    resumed = run(TINY, out, resume=True)
    assert outcome(resumed) == outcome(expected)
    assert sum(asked) == 48 - stored
    assert resumed["cache"]["written"]["samples"] == 48
    assert not (out / checkpoint.FILE_NAME).exists()


def asked_for_the_cache(monkeypatch):
    """The number of sequences in each batch that goes through the teacher for the cache, from here on."""
    asked = []
    logits_of = targets.logits_of
    monkeypatch.setattr(targets, "logits_of", lambda model, ids: asked.append(len(ids)) or logits_of(model, ids))
    return asked


def test_a_second_run_reads_the_cache_that_is_there(whole, tmp_path, monkeypatch):
    first, expected = whole
    out = tmp_path / "report"
    shutil.copytree(first / CACHE, out / CACHE)
    shards = {path: path.read_bytes() for path in (out / CACHE).glob("*.shard")}
    asked = asked_for_the_cache(monkeypatch)
    results = run(replace(TINY, compare=False), out)
    assert shards
    assert {path: path.read_bytes() for path in (out / CACHE).glob("*.shard")} == shards
    assert asked == []
    assert results["cache"]["written"] is None
    assert outcome(results)["students"] == outcome(expected)["students"][:3]
    assert results["comparison"] is None
    assert "already" in (tmp_path / "report.log").read_text(encoding="utf-8")
    assert "from an earlier run" in cache_text(results)
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    assert "from an earlier run" in page
    assert "Cached less online" not in page


def test_cached_students_learn_from_what_a_cache_makes_of_the_logits(whole, tmp_path):
    """Bit for bit: another cache of the same logits, read into memory, trains the same students."""
    out, results = whole
    model, tokenizer, _ = teacher.load_teacher()
    stream = encode(tokenizer, run_demo.__globals__["load_corpus"]().train)
    ids = sequences(stream, TINY.context, TINY.train_sequences)
    logits = teacher.label(model, ids, lambda _done, _total: None)
    with cache.Writer(tmp_path / "mine", vocab_size=logits.shape[-1], temperatures=(1.0,)) as writer:
        for i, row in enumerate(logits):
            writer.write(i, kdfast.soft_targets(row, k=TINY.k))
    reader = cache.Reader(tmp_path / "mine")
    rounded = kdfast.SparseTargets.stack([reader[i] for i in range(len(ids))])
    for method in TINY.methods[1:3]:
        student = Student(TINY, method, 0, logits.shape[-1], len(ids))
        while not student.done:
            student.advance(ids, lambda rows: rounded[rows])
        weights = load_file(out / f"student-{method.name}-seed0.safetensors")
        assert all(torch.equal(value, weights[name]) for name, value in student.model.state_dict().items())
    assert results["cache"]["tokens"] == ids[:, 1:].numel()


def test_online_trains_from_all_logits_and_leaves_no_cache(whole, tmp_path):
    _, expected = whole
    out = tmp_path / "report"
    results = run(replace(TINY, online=True), out)
    assert [run["method"] for run in results["students"]] == ["labels", "forward_kl-online", "jsd-online"]
    assert not list(out.glob("cache*"))
    assert results["cache"] is results["comparison"] is None
    theirs = {run["method"]: run for run in outcome(expected)["students"]}
    for student in outcome(results)["students"][:2]:
        assert student == theirs[student["method"]]
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    assert "on disk" not in page
    assert "logits in bf16 in memory" in page


def test_report_measures_the_cache(whole):
    out, results = whole
    held = results["cache"]
    folder = out / held["folder"]
    assert held["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert held["bytes_per_token"] == pytest.approx(held["bytes"] / (48 * TINY.context))
    assert 100 < held["bytes_per_token"] < 160  # 64 entries of 12 bits, and about 4 for the probability of each
    assert 0 < held["tail"] < 0.2
    assert 0 < held["written"]["teacher_seconds"] < held["written"]["seconds"]
    students = {run["method"]: run for run in results["students"]}
    lost = students["forward_kl"]["evaluation"]["nats"] - students["forward_kl-online"]["evaluation"]["nats"]
    assert results["comparison"]["nats"]["mean"] == pytest.approx(lost)
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    for figure in (
        f"{held['bytes_per_token']:.1f} bytes a token on disk",
        f"{held['bytes'] / 1e6:.1f} on disk",
        f"Writing it took {held['written']['seconds']:.1f} s",
        f"{held['in_loop_seconds']:.0f} s at the",
        f"{lost:+.4f} nats per token",
    ):
        assert figure in page
    assert f"{held['bytes_per_token']:.1f} bytes/token" in cache_text(results)


@pytest.fixture
def small_store(tmp_path):
    """A cache of four short sequences, with what wrote it; returns a function of other sequences to their store."""
    model = GPT(GPTConfig(300, 8, 1, 1, 16)).eval()
    tokenizer = train_tokenizer([corpus.SourceFile("a.py", "lorem ipsum " * 50)], vocab_size=300)
    ids = torch.randint(300, (4, 17))

    def store(ids, whose=model, temperature=1.0):
        made = targets.Stored(tmp_path / "cache", ids, torch.tensor([0, 3, 5, 8]), 4, temperature)
        made.write(whose, tokenizer, targets.Written(), Display(Console(file=io.StringIO())), lambda: False)
        return made

    store(ids)
    return store, ids


def test_targets_belong_to_the_text_that_is_trained_on(small_store, tmp_path):
    store, ids = small_store
    read = store(ids).targets()
    model = GPT(GPTConfig(300, 8, 1, 1, 16)).eval()
    assert set(cache.Reader(tmp_path / "cache")) == {"0", "3", "5", "8"}
    rows = torch.tensor([2, 0])
    assert read(rows).shape == (2, 16, 4)
    changed = ids.clone()
    changed[2, 7] = (changed[2, 7] + 1) % 300
    with pytest.raises(kdfast.CacheError, match="token ids are not those"):
        store(changed)
    shifted = targets.Stored(tmp_path / "cache", changed, torch.tensor([0, 3, 5, 8]), 4, 1.0).targets()
    assert shifted(rows[1:]).shape == (1, 16, 4)
    with pytest.raises(kdfast.CacheError, match=r"token ids are not those.*'5'"):
        shifted(rows)
    label_alone = ids.clone()
    label_alone[:, -1] = (label_alone[:, -1] + 1) % 300  # the teacher did not see it
    assert store(label_alone, whose=model).targets()(rows).shape == (2, 16, 4)
    with pytest.raises(kdfast.CacheError, match="temperatures"):
        store(ids, temperature=2.0)


def test_a_cache_of_another_teacher_or_a_damaged_one_is_told(whole, tmp_path):
    first, _ = whole
    out = tmp_path / "report"
    with cache.Writer(out / CACHE, vocab_size=VOCAB_SIZE, teacher="another", temperatures=(1.0,)):
        pass
    with pytest.raises(DemoError, match=r"another.*delete that folder"):
        run(TINY, out)
    shutil.rmtree(out / CACHE)
    shutil.copytree(first / CACHE, out / CACHE)
    shard = max((out / CACHE).glob("*.shard"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DemoError, match=r"checksum.*delete that folder"):
        run(TINY, out)


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
        ({"divergence": "tvd"}, "add --online, or name one of forward_kl, jsd, reverse_kl"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(DemoError, match=message):
        replace(TINY, **change)
    assert replace(TINY, divergence="tvd", online=True).methods[2].title == "distilled, tvd, online"


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
    assert places(100, 9, 4).tolist() == [0, 2, 5, 7]
    assert places(100, 9, 10).tolist() == places(109, 9, 20).tolist() == list(range(10))
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
    _, results = whole
    runs = results["students"]
    shifted = [{**run, "evaluation": {**run["evaluation"], "nats": run["evaluation"]["nats"] + 2.0}} for run in runs]
    row = summary(TINY, runs + shifted)[0]
    assert row["nats"]["mean"] == pytest.approx(runs[0]["evaluation"]["nats"] + 1.0)
    assert row["nats"]["std"] == pytest.approx(math.sqrt(2.0))
    assert row["ece"]["std"] == 0.0
    second = [{**run, "seed": 1, "evaluation": dict(run["evaluation"])} for run in runs]
    second[1]["evaluation"]["nats"] += 0.25
    both = comparison(replace(TINY, seeds=(0, 1)), runs + second)
    assert both["nats"]["mean"] == pytest.approx(results["comparison"]["nats"]["mean"] + 0.125)
    assert both["nats"]["std"] == pytest.approx(0.25 / math.sqrt(2.0))
    assert comparison(TINY, runs[:3]) is None


def results_of(differences, *, quick=False, written=True):
    """The results of a run whose distilled students are so many nats from labels only, by seed."""
    settings = replace(TINY, seeds=tuple(range(len(differences))))
    runs = [
        {"method": m.name, "seed": i, "evaluation": {"nats": 3.0 + i + (0.0 if m.divergence is None else difference)}}
        for i, difference in enumerate(differences)
        for m in settings.methods
    ]
    rows = [
        {"method": m.name, "title": m.title, "perplexity": {"mean": 20.0 if m.divergence is None else 18.0}}
        for m in settings.methods
    ]
    return {
        "quick": quick,
        "settings": {"seeds": settings.seeds},
        "summary": rows,
        "gains": gains(settings, runs),
        "comparison": {"seeds": settings.seeds, "nats": {"mean": -0.0012, "std": 0.0021}},
        "cache": {
            "bytes_per_token": 112.34,
            "in_loop_seconds": 30.4,
            "written": {"seconds": 4.21} if written else None,
        },
        "teacher": {"training": {"config": {"vocab_size": 4096}}},
    }


def test_the_lead_says_whether_and_by_how_much_distillation_helped():
    helped = verdict(results_of([-0.2, -0.21, -0.19]))
    assert helped.startswith("Distillation helped: from labels only to distilled, forward_kl, the perplexity")
    assert "20.0 to 18.0 (-10.0 %), -0.200 [-0.225, -0.175] nats per token, over 3 seeds." in helped
    assert f"With {TINY.divergence} 20.0 to 18.0 (-10.0 %)" in helped
    assert verdict(results_of([0.2, 0.21, 0.19])).startswith("Distillation did not help: ")
    assert verdict(results_of([-0.2, 0.21, -0.1])).startswith("Whether distillation helped cannot be told: ")
    one = verdict(results_of([-0.2], quick=True))
    assert one.startswith("Distillation helped: ")
    assert "with one seed, part of which may be chance" in one
    assert "too short to mean anything" in one


def test_the_lead_says_what_the_cache_cost():
    text = cache_cost(results_of([-0.2, -0.1]))
    for part in (
        "-0.0012 ± 0.0021 nats",
        "112.3 bytes a token on disk, in place of 8,192",
        "4.2 s to write",
        "30 s of",
    ):
        assert part in text
    assert "nothing to write" in cache_cost(results_of([-0.2], written=False))
    assert "was not measured" in cache_cost(results_of([-0.2]) | {"comparison": None})
    assert cache_cost(results_of([-0.2]) | {"cache": None}) == ""


def test_the_page_leads_with_both(whole):
    out, results = whole
    page = (out / REPORT_NAME).read_text(encoding="utf-8")
    leads = re.findall(r'<p class="lead">(.*?)</p>', page)
    assert [html.unescape(lead) for lead in leads] == [verdict(results), cache_cost(results)]
    first = results["gains"][0]["nats"]["value"]
    by_way = {run["method"]: run["evaluation"]["nats"] for run in results["students"]}
    assert first == pytest.approx(by_way["forward_kl"] - by_way["labels"])
    assert not re.findall(r"\b1 (?:seeds|threads|students|steps|layers)\b", re.sub(r"<[^>]+>", "", page))


def test_progress_of_an_unknown_number():
    with io.StringIO() as log:
        display = Display(Console(file=log, width=100))
        with display:
            display.task("batches [of it]", None)
            for i in range(1, 10):
                display.advance(i)
        assert log.getvalue().splitlines() == [f"batches [of it]: {i}" for i in (1, 2, 4, 8)]
