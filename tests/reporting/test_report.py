"""kdfast.report: every figure against an independent fp64 computation; models and arguments."""

from __future__ import annotations

import itertools
import math
import zipfile

import numpy as np
import pytest
import report_models
import scipy.stats
import torch
from report_models import Table, Tiny, fp64, loader, softmax
from torch import nn

import kdfast
from kdfast.methods import Inputs


@pytest.fixture
def classifier():
    return report_models.classifier()


@pytest.fixture
def language():
    ids = torch.randint(0, 17, (12, 9))
    mask = torch.ones_like(ids)
    for row, length in enumerate(torch.randint(4, 10, (12,)).tolist()):
        mask[row, length:] = 0
    batches = [
        {"input_ids": ids[i : i + 5], "attention_mask": mask[i : i + 5], "labels": ids[i : i + 5]} for i in (0, 5, 10)
    ]
    return ids, mask, batches, Tiny(16), Tiny(8)


def test_classifier_against_numpy(classifier):
    x, y, teacher, student, baseline = classifier
    found = kdfast.report(student, teacher, loader(x, y), baseline=baseline, top_k=3, rounds=0).figures
    assert found["task"] == "classifier"
    kept = (y != -100).numpy()
    labels = y.numpy()[kept]
    n = len(labels)
    assert found["data"]["positions"] == n
    assert found["data"]["examples"] == 83
    z = {
        m["name"]: fp64(model, x)[kept] for m, model in zip(found["models"], (teacher, student, baseline), strict=True)
    }
    q = softmax(z["teacher"])
    for model in found["models"]:
        p = softmax(z[model["name"]])
        right = p.argmax(-1) == labels
        task = model["task"]
        assert task["accuracy"]["value"] == pytest.approx(right.mean())
        assert task["accuracy"]["count"] == right.sum()
        ci = scipy.stats.binomtest(int(right.sum()), n).proportion_ci(method="wilson")
        assert (task["accuracy"]["low"], task["accuracy"]["high"]) == pytest.approx((ci.low, ci.high))
        nats = -np.log(p[np.arange(n), labels])
        assert task["nats"]["value"] == pytest.approx(nats.mean(), rel=1e-5)
        assert task["nats"]["se"] == pytest.approx(scipy.stats.sem(nats), rel=1e-4)
        low, high = scipy.stats.t.interval(0.95, n - 1, nats.mean(), scipy.stats.sem(nats))
        assert low > 0
        assert (task["nats"]["low"], task["nats"]["high"]) == pytest.approx((low, high), rel=1e-4)
        assert task["perplexity"]["value"] == pytest.approx(np.exp(nats.mean()), rel=1e-5)
        top = np.argsort(-p, -1)[:, :3]
        assert task["top_k_accuracy"]["value"] == pytest.approx((top == labels[:, None]).any(-1).mean())
        confidence = p.max(-1)
        bins = np.minimum((confidence.astype(np.float32) * 15).astype(int), 14)
        ece = sum((bins == b).mean() * abs(confidence[bins == b].mean() - right[bins == b].mean()) for b in set(bins))
        assert model["calibration"]["ece"] == pytest.approx(ece, rel=1e-4)
        assert sum(row["share"] for row in model["calibration"]["reliability"]) == pytest.approx(1.0)
        if model["role"] == "teacher":
            assert model["against_teacher"] is None
            continue
        kl = (q * np.log(q / p)).sum(-1)
        against = model["against_teacher"]
        assert against["kl"]["value"] == pytest.approx(kl.mean(), rel=1e-4)
        assert against["agreement"]["value"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
        overlap = [len(set(a) & set(b)) / 3 for a, b in zip(top, np.argsort(-q, -1)[:, :3], strict=True)]
        assert against["top_k_agreement"]["value"] == pytest.approx(np.mean(overlap), rel=1e-6)
        errors = model["errors"]
        wrong = q.argmax(-1) != labels
        assert errors["teacher_errors"] == wrong.sum()
        assert errors["inherited"]["count"] == (wrong & (p.argmax(-1) == q.argmax(-1))).sum()
        assert errors["corrected"]["count"] == (wrong & right).sum()
        assert errors["introduced"]["count"] == (~wrong & ~right).sum()
        worst = found["examples"][model["name"]]
        places = np.flatnonzero(kept)
        assert [e["number"] for e in worst] == places[np.argsort(-kl, kind="stable")[:10]].tolist()
        assert [e["kl"] for e in worst] == pytest.approx(np.sort(kl)[::-1][:10], rel=1e-4)
    assert found["not_measured"] == {"latency": "rounds=0"}


def test_entropy_buckets_sum_to_the_whole(classifier):
    x, y, teacher, student, baseline = classifier
    found = kdfast.report(student, teacher, loader(x, y), baseline=baseline, rounds=0, layers=()).figures
    buckets = found["entropy_buckets"]
    assert len(buckets) == 8
    assert sum(b["positions"] for b in buckets) == found["data"]["positions"]
    assert sum(b["share"] for b in buckets) == pytest.approx(1.0)
    assert all(a["high"] <= b["low"] for a, b in itertools.pairwise(buckets))
    for model in found["models"][1:]:
        for key in ("kl", "agreement"):
            parts = sum(b["share"] * b["models"][model["name"]][key]["value"] for b in buckets)
            assert parts == pytest.approx(model["against_teacher"][key]["value"], rel=1e-5)
    q = softmax(fp64(teacher, x)[(y != -100).numpy()])
    entropy = -(q * np.log(q)).sum(-1)
    assert buckets[0]["low"] == pytest.approx(entropy.min(), rel=1e-4)
    assert buckets[-1]["high"] == pytest.approx(entropy.max(), rel=1e-4)
    assert max(b["positions"] for b in buckets) - min(b["positions"] for b in buckets) <= 2


def test_one_entropy_is_one_bucket():
    teacher = Table(torch.eye(4)[torch.arange(20) % 4] * 5)  # all rows have the same entropy
    batch = [(torch.arange(20), torch.arange(20) % 4)]
    found = kdfast.report(Table(torch.randn(20, 4)), teacher, batch, rounds=0, layers=()).figures
    assert sum(b["positions"] for b in found["entropy_buckets"]) == 20
    assert len(found["entropy_buckets"]) <= 4  # rounding may tell them apart


def one_hot(predictions, sure=3.0):
    return sure * torch.nn.functional.one_hot(torch.tensor(predictions), 4).float()


def test_errors_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    teacher = Table(one_hot([0, 0, 1, 1, 1, 2, 2, 3]))  # wrong at 2, 3, 5, 6, 7
    student = Table(one_hot([0, 2, 1, 0, 1, 2, 1, 0]))  # inherits 2, 5; corrects 3, 6; 7 otherwise; new error at 1
    baseline = Table(one_hot([1, 1, 0, 0, 1, 1, 1, 1]))
    found = kdfast.report(
        student, teacher, [(torch.arange(8), labels)], baseline=baseline, rounds=0, layers=(), examples=0
    ).figures
    errors = found["models"][1]["errors"]
    counts = {part: (errors[part]["count"], errors[part]["of"]) for part in ("inherited", "corrected", "other")}
    assert counts == {"inherited": (2, 5), "corrected": (2, 5), "other": (1, 5)}
    assert errors["introduced"]["count"] == 1
    assert errors["introduced"]["of"] == errors["teacher_right"] == 3
    to_teacher, to_baseline = found["comparisons"]
    assert (to_teacher["first"], to_teacher["second"]) == ("student", "teacher")
    assert to_teacher["accuracy"]["value"] == pytest.approx(1 / 8)
    assert (to_teacher["accuracy"]["only_first"], to_teacher["accuracy"]["only_second"]) == (2, 1)
    assert to_teacher["accuracy"]["mcnemar_p"] == pytest.approx(scipy.stats.binomtest(2, 3).pvalue)
    assert (to_baseline["accuracy"]["only_first"], to_baseline["accuracy"]["only_second"]) == (1, 3)
    assert to_teacher["agreement"] is None
    assert to_baseline["agreement"]["value"] == pytest.approx((4 - 1) / 8)


def test_a_teacher_without_errors_and_equal_models(tmp_path):
    labels = torch.arange(12) % 4
    teacher = Table(one_hot(labels.tolist()))
    found = kdfast.report(teacher, teacher, [(torch.arange(12), labels)], out=tmp_path, rounds=1)
    student = found.figures["models"][1]
    assert student["against_teacher"]["kl"]["value"] == 0.0
    assert student["against_teacher"]["agreement"]["value"] == 1.0
    assert student["errors"]["inherited"]["value"] is None
    assert found.figures["comparisons"][0]["accuracy"]["low"] < 0 < found.figures["comparisons"][0]["accuracy"]["high"]
    assert "makes no error" in (tmp_path / "report.html").read_text()


def test_masked_columns_and_infinite_divergence():
    teacher, student = torch.randn(6, 4), torch.randn(6, 4)
    teacher[:, 3] = student[:, 3] = -torch.inf
    batch = [(torch.arange(6), torch.zeros(6, dtype=torch.int64))]
    found = kdfast.report(Table(student), Table(teacher), batch, rounds=0, layers=()).figures
    p, q = softmax(student.double().numpy()[:, :3]), softmax(teacher.double().numpy()[:, :3])
    expected = (q * np.log(q / p)).sum(-1).mean()
    assert found["models"][1]["against_teacher"]["kl"]["value"] == pytest.approx(expected, rel=1e-4)
    student[2, 1] = -torch.inf
    report = kdfast.report(Table(student), Table(teacher), batch, rounds=0, layers=())
    kl = report.figures["models"][1]["against_teacher"]["kl"]
    assert kl["value"] is None
    assert kl["infinite"] == 1
    assert report.figures["examples"]["student"][0]["kl"] is None
    assert "infinite" in str(report)
    assert "infinite" in report.html()


def test_language_model_against_numpy(language):
    ids, mask, batches, teacher, student = language
    report = kdfast.report(student, teacher, batches, causal=True, rounds=1, describe=lambda t: f"ids {t}", examples=4)
    found = report.figures
    assert found["task"] == "language model"
    kept = mask[:, 1:].bool().numpy()
    labels = ids[:, 1:].numpy()
    sequence = np.nonzero(kept)[0]
    q, p = (softmax(fp64(m, ids)[:, :-1]) for m in (teacher, student))
    assert found["data"]["positions"] == kept.sum()
    kl = (q * np.log(q / p)).sum(-1)
    for model, probabilities in zip(found["models"], (q, p), strict=True):
        nats = -np.log(np.take_along_axis(probabilities, labels[..., None], -1)[..., 0])[kept]
        task = model["task"]["nats"]
        assert task["value"] == pytest.approx(nats.mean(), rel=1e-5)
        # the standard error of a ratio, sequences being what is drawn
        total = sum((nats[sequence == i] - nats.mean()).sum() ** 2 for i in range(12))
        assert task["se"] == pytest.approx(math.sqrt(12 / 11 * total) / len(nats), rel=1e-4)
        half = scipy.stats.t.ppf(0.975, 11) * task["se"]
        assert task["high"] - task["value"] == pytest.approx(half, rel=1e-4)
        assert model["task"]["perplexity"]["high"] == pytest.approx(math.exp(task["high"]), rel=1e-6)
    assert found["models"][1]["against_teacher"]["kl"]["value"] == pytest.approx(kl[kept].mean(), rel=1e-4)
    assert "mcnemar_p" not in found["comparisons"][0]["accuracy"]
    worst = found["examples"]["student"]
    masked = np.where(kept, kl, -1.0)
    order = np.argsort(-masked.max(1), kind="stable")[:4]
    assert [e["number"] for e in worst] == order.tolist()
    for entry, row in zip(worst, order, strict=True):
        position = masked[row].argmax()
        assert entry["position"] == position
        assert entry["text"] == f"ids {ids[row, : position + 1].tolist()}"
        assert entry["label"] == repr(f"ids {[ids[row, position + 1].item()]}")
        best = entry["predictions"]["teacher"][0]
        assert best["probability"] == pytest.approx(q[row, position].max(), rel=1e-4)
    assert found["similarity"]["row"] == "position"
    assert found["similarity"]["rows"] == mask.sum()
    assert found["similarity"]["teacher_layers"] == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert "perplexity" in report.html()


def test_logits_in_an_output_and_lm_heads(language):
    ids, _, _, teacher, student = language

    class Output(nn.Module):
        def __init__(self, model, kind):
            super().__init__()
            self.model, self.kind = model, kind

        def forward(self, input_ids):
            if self.kind == "head":
                h = self.model.embed(input_ids)
                for block in self.model.blocks:
                    h = h + block(h)
                return kdfast.LMHead(h, self.model.head.weight, self.model.head.bias)
            return {"logits": self.model(input_ids)}

    plain = kdfast.report(student, teacher, [(ids, ids)], causal=True, rounds=0, layers=()).figures
    wrapped = kdfast.report(
        Output(student, "head"), Output(teacher, "mapping"), [(ids, ids)], causal=True, rounds=0, layers=()
    ).figures
    for a, b in zip(plain["models"], wrapped["models"], strict=True):
        assert a["task"]["nats"]["value"] == pytest.approx(b["task"]["nats"]["value"], rel=1e-5)


def test_half_precision_and_chunks(monkeypatch, language):
    ids, _, _, teacher, student = language
    whole = kdfast.report(student, teacher, [(ids, ids)], causal=True, rounds=0).figures
    monkeypatch.setattr("kdfast.reporting.measure.CHUNK", 17 * 7)
    assert kdfast.report(student, teacher, [(ids, ids)], causal=True, rounds=0).figures == whole
    logits = torch.randn(9, 5)
    batch = [(torch.arange(9), torch.zeros(9, dtype=torch.int64))]
    half = kdfast.report(Table(logits.bfloat16()), Table(logits.half()), batch, rounds=0, layers=()).figures
    p, q = (softmax(z.double().numpy()) for z in (logits.bfloat16(), logits.half()))
    assert half["models"][1]["against_teacher"]["kl"]["value"] == pytest.approx(
        (q * np.log(q / p)).sum(-1).mean(), rel=1e-2, abs=1e-6
    )
    assert half["models"][1]["dtypes"] == ["bfloat16"]


def test_without_labels(classifier):
    x, _, teacher, student, baseline = classifier
    report = kdfast.report(student, teacher, list(x.split(20)), baseline=baseline, rounds=0)
    assert report.figures["models"][1]["task"] is None
    assert report.figures["models"][1]["against_teacher"]["kl"]["value"] > 0
    assert report.figures["comparisons"][1]["kl"]["value"] is not None
    assert "gives no labels" in report.html()
    assert "gives no labels" in str(report)


def test_truncated_vocabularies():
    teacher, student = torch.randn(8, 6), torch.randn(8, 5)
    batch = [(torch.arange(8), torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"student has 5 columns, teacher 6.*truncate"):
        kdfast.report(Table(student), Table(teacher), batch, rounds=0)
    found = kdfast.report(Table(student), Table(teacher), batch, vocab="truncate", rounds=0, layers=()).figures
    p, q = softmax(student.double().numpy()), softmax(teacher.double().numpy()[:, :5])
    kl = found["models"][1]["against_teacher"]["kl"]["value"]
    assert kl == pytest.approx((q * np.log(q / p)).sum(-1).mean(), rel=1e-4)
    nats = -np.log(softmax(teacher.double().numpy())[:, 0]).mean()
    assert found["models"][0]["task"]["nats"]["value"] == pytest.approx(nats, rel=1e-5)


def test_layers_by_pattern(language):
    _, _, batches, teacher, student = language
    pairs = [("blocks.*", "blocks.*"), ("head:input", "head:input")]
    found = kdfast.report(student, teacher, batches, causal=True, layers=pairs, rounds=0).figures["similarity"]
    assert not found["chosen"]
    asked = [(p["layer"], p["teacher_layer"]) for p in found["models"]["student"]["pairs"]]
    assert asked == [(f"blocks.{i}", f"blocks.{i}") for i in range(3)] + [("head:input", "head:input")]
    same = kdfast.report(teacher, teacher, batches, causal=True, layers=pairs, rounds=0).figures["similarity"]
    assert [p["cka"] for p in same["models"]["student"]["pairs"]] == pytest.approx([1.0] * 4)
    with pytest.raises(ValueError, match=r"student has no layer 'block'; near it: blocks"):
        kdfast.report(student, teacher, batches, causal=True, layers=[("block", "head")], rounds=0)


def test_cost(classifier, tmp_path):
    x, y, teacher, student, _ = classifier
    found = kdfast.report(student, teacher, loader(x, y), rounds=3).figures
    for row, model in zip(found["models"], (teacher, student), strict=True):
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        torch.save(model.state_dict(), tmp_path / "model.pt")
        # the archive's own name, which is in it, differs
        assert row["bytes"] == pytest.approx((tmp_path / "model.pt").stat().st_size, abs=1024)
        with zipfile.ZipFile(tmp_path / "model.pt") as archive:
            assert row["bytes"] > sum(part.file_size for part in archive.infolist() if "/data/" in part.filename)
    timed = found["latency"]
    assert (timed["examples"], timed["shape"], timed["rounds"]) == (16, [16, 6], 3)
    assert timed["threads"] == torch.get_num_threads()
    for row in timed["models"].values():
        assert row["device"]
        batch = row["ms_per_batch"]
        assert 0 < batch["low"] <= batch["value"] <= batch["high"]
        assert row["ms_per_example"]["value"] == pytest.approx(batch["value"] / 16)
    assert timed["models"]["student"]["times_as_fast"]["value"] > 0


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_they_were(classifier, fails):
    x, y, teacher, student, baseline = classifier
    models = teacher, student, baseline
    teacher.eval()
    student.train()
    student[2].eval()  # one part alone, as a frozen BatchNorm has it
    modes = [[m.training for m in model.modules()] for model in models]
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    batches = loader(x, y)
    if fails:
        batches[3] = (batches[3][0], batches[3][1] + 1000)
        with pytest.raises(ValueError, match=r"labels must be 0 to 6, or -100"):
            kdfast.report(student, teacher, batches, baseline=baseline)
    else:
        kdfast.report(student, teacher, batches, baseline=baseline)
    for model, mode, state in zip(models, modes, states, strict=True):
        assert [m.training for m in model.modules()] == mode
        assert hooks(model) == 0
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_the_loader_is_read_once(classifier):
    x, y, teacher, student, _ = classifier
    read = []

    def batches():
        for batch in loader(x, y):
            read.append(len(batch[0]))
            yield batch

    kdfast.report(student, teacher, batches(), rounds=1)
    assert read == [len(part) for part in x.split(16)]


def test_split_weights_and_keys(classifier):
    x, y, teacher, student, _ = classifier
    weights = (torch.arange(83) % 2).float()

    def split(batch):
        rows = batch
        return Inputs(args=(x[rows],), labels=y[rows], weights=weights[rows], keys=[f"row {i}" for i in rows.tolist()])

    found = kdfast.report(student, teacher, torch.arange(83).split(10), split=split, rounds=0).figures
    assert found["data"]["positions"] == ((y != -100) & (weights > 0)).sum()
    assert all(e["key"] == f"row {e['number']}" and e["number"] % 2 for e in found["examples"]["student"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": 3}, TypeError, r"student must be a torch.nn.Module, got int"),
        ({"student": {}}, ValueError, r"student is an empty mapping"),
        ({"teacher": "t"}, TypeError, r"teacher must be a torch.nn.Module, got str; a cached teacher"),
        ({"baseline": "b"}, TypeError, r"baseline must be a torch.nn.Module"),
        ({"loader": 3}, TypeError, r"loader must give batches"),
        ({"loader": []}, ValueError, r"loader has no batch"),
        ({"loader": [(torch.arange(4), torch.full((4,), -100))]}, ValueError, r"no position whose label is not -100"),
        ({"loader": [(torch.arange(4), torch.rand(4))]}, TypeError, r"labels must be an int64 tensor"),
        ({"loader": [(torch.arange(4), torch.zeros(3).long())]}, ValueError, r"labels must have the shape"),
        ({"loader": [(torch.arange(4), torch.full((4,), 3))]}, ValueError, r"labels must be 0 to 2, or -100, got 3"),
        (
            {"loader": [(torch.arange(4), torch.zeros(4).long()), torch.arange(4)]},
            ValueError,
            r"some batches have labels",
        ),
        ({"student": Table(torch.full((4, 3), torch.nan))}, ValueError, r"student has logits that are NaN"),
        ({"student": Table(torch.randn(4, 2, 3))}, ValueError, r"student and teacher must have logits of the same"),
        ({"student": Table(torch.arange(4.0))}, TypeError, r"student must return logits \(B, ..., V\)"),
        ({"causal": True}, ValueError, r"causal=True is for logits \(B, S, V\)"),
        ({"vocab": "pad"}, ValueError, r'vocab must be "strict" or "truncate"'),
        ({"top_k": 0}, ValueError, r"top_k must be an int of at least 1, got 0"),
        ({"examples": -1}, ValueError, r"examples must be an int of at least 0"),
        ({"rounds": 1.5}, ValueError, r"rounds must be an int of at least 0"),
        ({"layers": ["a"]}, ValueError, r"layers must be pairs"),
        ({"names": {"pupil": "x"}}, ValueError, r"names must have the keys"),
        ({"names": {"student": "teacher"}}, ValueError, r"names that differ"),
    ],
)
def test_wrong_arguments(change, error, message):
    options = {
        "student": Table(torch.randn(4, 3)),
        "teacher": Table(torch.randn(4, 3)),
        "loader": [(torch.arange(4), torch.tensor([0, 1, 2, 0]))],
        "rounds": 0,
    }
    with pytest.raises(error, match=message):
        kdfast.report(**options | change)
