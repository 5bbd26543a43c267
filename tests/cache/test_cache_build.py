"""The job that fills a cache: it writes what the teacher says, whatever the data, the batches and the processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="the cache extra is not installed")

from cache_jobs import HERE, assert_holds, command_line, cut, lines, some, written
from cache_teachers import Tiny, V, dense, head

import kdfast
from kdfast import SparseTargets, cache
from kdfast.cache.job import Capture, JobError, Sample, Teacher, fill

TINY = Teacher(Tiny(), V, "tiny", None, "float32", torch.device("cpu"), V)


@pytest.fixture
def build(monkeypatch, capsys, tmp_path):
    return command_line(monkeypatch, capsys, tmp_path)


class TestData:
    @pytest.mark.parametrize("teacher", ["dense", "head"])
    def test_records_of_token_ids(self, build, tmp_path, teacher):
        samples = some()
        data = written(tmp_path, samples)
        options = ["--field", "input_ids", "--id-field", "id", "--length", 16, "--batch-tokens", 64]
        code, output, _ = build(
            "c", data, *options, "--k", 8, "--temperatures", "2,1", teacher=("--factory", f"cache_teachers:{teacher}")
        )
        assert code == 0
        pieces = cut(samples, 16)
        assert f"{len(pieces)} samples written, 0 were there already" in output
        assert_holds("c", pieces, temperatures=(1.0, 2.0))
        metadata = cache.Reader("c").metadata
        assert metadata["teacher"] == f"cache_teachers:{teacher}"
        assert metadata["dtype"] == "float32"
        assert metadata["build"] == {"k": 8, "length": 16, "method": "topk"}

    def test_arrays(self, build, tmp_path):
        ids = torch.randint(V, (5, 20))
        np.save("rows.npy", ids.numpy().astype(np.uint16))
        np.save("line.npy", ids.flatten().numpy())
        assert build("rows", "rows.npy", "--k", 8)[0] == 0
        assert_holds("rows", {str(i): row for i, row in enumerate(ids)})
        assert build("line", "line.npy", "--k", 8, "--length", 30)[0] == 0
        assert_holds("line", {str(i): piece for i, piece in enumerate(ids.flatten().split(30))})

    def test_text(self, build, tmp_path):
        tokenizers = pytest.importorskip("tokenizers", reason="the cache extra is not installed")
        words = {f"w{i}": i for i in range(V)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.enable_truncation(3)  # left in many files; a sample is not cut by it
        tokenizer.save("tokenizer.json")
        samples = {"a.txt": torch.randint(V, (50,)), "deep/b.txt": torch.randint(V, (7,)), "none.txt": torch.empty(0)}
        for name, ids in samples.items():
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(f"w{int(i)}" for i in ids))
        options = ["--tokenizer", "tokenizer.json", "--length", 20, "--k", 8]
        assert build("c", "texts", *options)[0] == 0
        pieces = {f"{n}:{i}": p.long() for n, ids in samples.items() for i, p in enumerate(ids.split(20))}
        assert_holds("c", pieces)
        assert len(cache.Reader("c").metadata["tokenizer"]) == 32
        lines(tmp_path / "d.jsonl", [{"body": " ".join(f"w{int(i)}" for i in samples["a.txt"])}])
        assert build("d", "d.jsonl", "--field", "body", *options)[0] == 0
        assert_holds("d", {f"0:{i}": p for i, p in enumerate(samples["a.txt"].split(20))})

        tokenizer.add_tokens(["new"])
        tokenizer.save("tokenizer.json")
        code, _, errors = build("c", "texts", *options)
        assert code == 1
        assert "mismatch" in errors
        code, _, errors = build("e", "texts", "--length", 20)
        assert code == 2
        assert "pass --tokenizer" in errors

    @pytest.mark.filterwarnings("ignore")  # of datasets and what it imports
    def test_a_saved_data_set(self, build, tmp_path):
        datasets = pytest.importorskip("datasets", reason="the hf extra is not installed")
        samples = some(4)
        rows = {"uid": list(range(10, 10 + len(samples))), "input_ids": [ids.tolist() for ids in samples.values()]}
        data = datasets.Dataset.from_dict(rows)
        data.save_to_disk("saved")
        options = ["--field", "input_ids", "--id-field", "uid", "--k", 8]
        assert build("c", "saved", *options)[0] == 0
        expected = {str(10 + i): ids for i, ids in enumerate(samples.values())}
        assert_holds("c", expected)
        datasets.DatasetDict({"train": data}).save_to_disk("splits")
        code, _, errors = build("d", "splits", *options)
        assert code == 2
        assert "pass one as --split" in errors
        assert build("d", "splits", *options, "--split", "train")[0] == 0
        assert_holds("d", expected)


class TestDraws:
    @pytest.mark.parametrize("method", ["sample", "pps"])
    def test_do_not_depend_on_batches(self, build, tmp_path, method):
        samples = some()
        data = written(tmp_path, samples)
        options = ["--field", "input_ids", "--id-field", "id", "--length", 64, "--method", method, "--k", 12]
        assert build("a", data, *options, "--batch-tokens", 64, "--seed", 5)[0] == 0
        assert build("b", data, *options, "--batch-tokens", 4096, "--seed", 5)[0] == 0
        assert build("other", data, *options, "--seed", 6)[0] == 0
        a, b, other = (cache.Reader(x) for x in ["a", "b", "other"])
        capture = Capture(12, method, seed=5)
        for key, ids in samples.items():
            logits = Tiny()(ids[None], torch.ones_like(ids)[None])[0]
            given = kdfast.soft_targets(logits, k=12, method=method, seed=capture.seed_of(key))
            assert torch.equal(a[key].ids, b[key].ids)
            assert torch.equal(a[key].ids, given.ids)
            assert a._engine.details(a._engine.find(key))[1] == capture.seed_of(key)
        assert len({capture.seed_of(key) for key in samples}) == len(samples)
        assert not torch.equal(a["doc 1"].ids, other["doc 1"].ids)

    def test_another_seed_does_not_go_on(self, build, tmp_path):
        data = written(tmp_path, some())
        options = ["--field", "input_ids", "--method", "pps", "--k", 8]
        assert build("c", data, *options)[0] == 0
        code, _, errors = build("c", data, *options, "--seed", 1)
        assert code == 1
        assert "mismatch" in errors


class TestGoingOn:
    def test_only_what_is_missing_is_written(self, build, tmp_path):
        samples = some(30)
        data = written(tmp_path, samples)
        options = ["--field", "input_ids", "--id-field", "id", "--k", 8, "--length", 64, "--batch-tokens", 64]
        code = "import sys; from kdfast.cli import main; sys.path.insert(0, sys.argv.pop()); main()"
        arguments = ["cache", "build", "c", str(data), *map(str, options), "--factory", "cache_teachers:interrupted"]
        command = [sys.executable, "-c", code, *arguments, HERE]

        def run(**environment):
            return subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment}
            )

        done = run(INTERRUPTED="1")
        assert done.returncode == 130, done.stderr
        assert "go on with:\n  kdfast cache build c" in done.stdout
        assert "Traceback" not in done.stderr
        before = list(cache.Reader("c"))
        assert 0 < len(before) < len(samples)
        sizes = {name: os.path.getsize(f"c/{name}") for name in os.listdir("c") if name.endswith(".shard")}
        done = run()
        assert done.returncode == 0, done.stderr
        assert f"{len(samples) - len(before)} samples written, {len(before)} were there already" in done.stdout
        assert_holds("c", samples)
        assert {name: os.path.getsize(f"c/{name}") for name in sizes} == sizes
        assert not cache.verify("c").faults
        assert f"0 samples written, {len(samples)} were there already" in run().stdout

    def test_others_do_not_go_on(self, build, tmp_path):
        data = written(tmp_path, some())
        options = [data, "--field", "input_ids"]
        assert build("c", *options)[0] == 0
        for changed in (["--k", 32], ["--length", 8], ["--temperatures", "1,2"], ["--revision", "2"]):
            code, _, errors = build("c", *options, *changed)
            assert code == 1
            assert "mismatch" in errors
        code, _, errors = build("c", *options, teacher=("--factory", "cache_teachers:head"))
        assert code == 1
        assert "mismatch" in errors

    def test_other_data_under_the_same_keys_are_refused(self, build, tmp_path):
        samples = some()
        options = ["--field", "input_ids", "--id-field", "id"]
        assert build("c", written(tmp_path, samples), *options)[0] == 0
        samples["doc 1"][3] = (samples["doc 1"][3] + 1) % V
        code, _, errors = build("c", written(tmp_path, samples), *options)
        assert code == 1
        assert "misaligned" in errors
        assert "'doc 1'" in errors

    @pytest.mark.parametrize("same", [True, False])
    def test_a_key_that_comes_again_far_behind(self, tmp_path, same):
        many = [Sample(str(i), torch.randint(V, (10,)).numpy(), i / 100) for i in range(100)]
        last = many[0] if same else many[0]._replace(token_ids=(many[0].token_ids + 1) % V)
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            if same:
                done = fill(writer, TINY, [*many, last], Capture(k=8), batch_tokens=10)
                assert (done.samples, done.there) == (100, 1)
                return
            with pytest.raises(cache.CacheError, match="other token ids"):
                fill(writer, TINY, [*many, last], Capture(k=8), batch_tokens=10)

    def test_two_processes(self, tmp_path):
        samples = some(21)
        data = written(tmp_path, samples)
        code = "import sys; from kdfast.cli import main; sys.path.insert(0, sys.argv.pop()); main()"
        arguments = ["cache", "build", "c", str(data), "--field", "input_ids", "--id-field", "id", "--k", "8"]
        command = [sys.executable, "-c", code, *arguments, "--factory", "cache_teachers:dense", HERE]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
            for rank in range(2)
        ]
        printed = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], printed
        numbers = [
            re.search(rf"process {r} of 2: (\d+) samples written, 0 were", out) for r, (out, _) in enumerate(printed)
        ]
        assert sum(int(number[1]) for number in numbers) == len(samples)
        assert_holds(tmp_path / "c", samples)
        assert sum(name.endswith(".shard") for name in os.listdir(tmp_path / "c")) == 2

    def test_a_commit_in_between(self, tmp_path):
        samples = [Sample(str(i), torch.randint(V, (10,)).numpy(), i / 20) for i in range(20)]
        seen = []
        with cache.Writer(tmp_path / "c", vocab_size=V, temperatures=(1.0,)) as writer:
            done = fill(
                writer,
                TINY,
                samples,
                Capture(k=8),
                batch_tokens=20,
                commit_seconds=0,
                report=lambda filled: seen.append((len(cache.Reader(tmp_path / "c")), filled.tokens, filled.left)),
            )
        assert [n for n, _, _ in seen] == list(range(2, 21, 2))
        assert [tokens for _, tokens, _ in seen] == list(range(20, 201, 20))
        assert done.finished
        assert done.committed == 200
        assert done.committed_bytes > 0


WRONG = [
    (["nowhere.jsonl"], None, "nowhere.jsonl does not exist"),
    (["d.jsonl"], (), "pass --model DIR or --factory"),
    (["d.jsonl"], ("--model", "x", "--factory", "a:b"), "one of them"),
    (["d.jsonl"], ("--model", "."), "with a config.json"),
    (["d.jsonl"], ("--factory", "cache_teachers"), "module:function"),
    (["d.jsonl"], ("--factory", "no_such_module:f"), "there is no module 'no_such_module'"),
    (["d.jsonl"], ("--factory", "cache_teachers:f"), "has no function 'f'"),
    (["d.jsonl"], ("--factory", "cache_teachers:nothing"), "returned NoneType"),
    (["d.jsonl"], ("--factory", "cache_teachers:transposed"), "must return logits (1, 1, V), got (300, 1, 1)"),
    (["d.jsonl"], ("--factory", "cache_teachers:nan"), "sample 0, token 0: entry 0: logprob is nan"),
    (["d.jsonl", "--field", "text"], None, "has no field 'text', it has input_ids, n, bad"),
    (["d.jsonl", "--id-field", "id"], None, "pass --id-field"),
    (["d.jsonl", "--id-field", "input_ids"], None, "must be a text or a whole number, got list"),
    (["d.jsonl", "--field", "n"], None, "must be a text, a list of token ids or one of messages, got float"),
    (["d.jsonl", "--field", "bad"], None, "sample '0' holds token id 300, the teacher takes 0 to 299"),
    (["d.jsonl", "--split", "train"], None, "--split is for a saved data set"),
    (["d.jsonl", "--method", "top"], None, "method"),
    (["d.jsonl", "--k", "many"], None, "--k must be a number"),
    (["d.jsonl", "--k", "0"], None, "k must be at least 1"),
    (["d.jsonl", "--k", "2:8"], None, 'is for method="topp"'),
    (["d.jsonl", "--method", "topp"], None, "p must be given"),
    (["d.jsonl", "--temperatures", "1,x"], None, "--temperatures must be numbers"),
    (["d.jsonl", "--temperatures", "0"], None, "temperatures must be > 0"),
    (["d.jsonl", "--tier", "best"], None, "tier"),
    (["d.jsonl", "--grid", "99"], None, "grid"),
    (["d.jsonl", "--dtype", "int4"], None, "--dtype must be one of"),
    (["d.jsonl", "--dtype", "bf16"], None, "are for --model"),
    (["d.jsonl", "--device", "quantum"], None, "--device quantum"),
    (["d.jsonl", "--batch-tokens", "10", "--length", "20"], None, "does not hold one sample"),
    (["d.jsonl", "a.npy"], None, "must be of one kind"),
    (["a.npy"], None, "1-D or 2-D of whole numbers"),
    (["a.bin"], None, "no .txt, .jsonl or .npy file"),
    (["no.jsonl"], None, "line 1: no JSON"),
    (["empty.jsonl"], None, "hold no record"),
    (["folder"], None, "no .txt file"),
    (["d.jsonl", "--ray-actors", "2"], None, "are for --ray"),
    (["d.jsonl", "--tokenizer", "a.bin"], None, "no JSON file of the tokenizers package"),
]


@pytest.mark.parametrize(("arguments", "teacher", "message"), WRONG)
def test_wrong_use_is_told_and_exits_2(build, tmp_path, arguments, teacher, message):
    lines(tmp_path / "d.jsonl", [{"input_ids": [1, 2], "n": 0.5, "bad": [1, 300]}])
    (tmp_path / "no.jsonl").write_text("{")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "a.bin").write_text("")
    (tmp_path / "folder").mkdir()
    np.save("a.npy", np.zeros(3))
    field = [] if "--field" in arguments else ["--field", "input_ids"]
    code, _, errors = build(
        "c",
        *arguments,
        *field,
        teacher=(("--factory", "cache_teachers:dense") if teacher is None else teacher),
    )
    assert message in errors
    assert "Traceback" not in errors
    assert code == 2


def test_one_key_for_two_texts_is_an_error(build, tmp_path):
    lines(tmp_path / "d.jsonl", [{"id": 1, "input_ids": [1, 2]}, {"id": 1, "input_ids": [3]}])
    code, _, errors = build("c", "d.jsonl", "--field", "input_ids", "--id-field", "id")
    assert code == 1
    assert "other token ids" in errors


@pytest.mark.parametrize("make", [dense, head])
def test_a_batch_comes_to_the_cpu_in_one_copy(monkeypatch, make):
    copied, to = [], SparseTargets.to
    monkeypatch.setattr(SparseTargets, "to", lambda targets, device: copied.append(device) or to(targets, device))
    samples = [Sample(str(i), torch.randint(V, (n,)).numpy(), 1.0) for i, n in enumerate([9, 5, 5, 0])]
    ids = torch.randint(V, (4, 9))
    targets = Capture(k=8)(make()(ids, torch.ones_like(ids)), samples)
    assert [len(one.ids) for one in targets] == [9, 5, 5, 0]
    assert copied == ["cpu"]


def test_capture_refuses():
    with pytest.raises(JobError, match="one temperature"):
        Capture(8, "pps", temperatures=(1.0, 2.0))


@pytest.mark.parametrize(
    ("package", "extra", "command", "arguments"),
    [
        ("tokenizers", "cache", "build", ["c", "a.txt", "--factory", "a:b", "--tokenizer", "t.json"]),
        ("ray", "ray", "build", ["c", "a.txt", "--factory", "a:b", "--ray"]),
        ("pyarrow", "cache", "export", ["c", "d.parquet"]),
        ("matplotlib", "demo", "info", ["c", "--plot", "p.png"]),
    ],
)
def test_missing_package_names_the_extra(tmp_path, package, extra, command, arguments):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "t.json").write_text("{}")
    with cache.Writer(tmp_path / "c", vocab_size=V, temperatures=(1.0,)) as writer:
        fill(writer, TINY, [Sample("a", np.arange(3), 1.0)], Capture(k=8), batch_tokens=8)
    code = f"import sys; sys.modules[{package!r}] = None; from kdfast.cli import main; main()"
    call = [sys.executable, "-c", code, "cache", command, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert f'kdfast cache {command} needs the package "{package}"' in done.stderr
    assert f'pip install "kdfast[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr
