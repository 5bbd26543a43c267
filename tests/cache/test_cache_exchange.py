"""Caches as Parquet: what goes out comes in again, and what others wrote is taken as it is or refused."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("pyarrow", reason="the cache extra is not installed")
pytest.importorskip("typer", reason="the cache extra is not installed")

import pyarrow as pa
import pyarrow.parquet as pq

from kdfast import SparseTargets, cache, soft_targets
from kdfast.cache.job import JobError
from kdfast.cache.parquet import Columns, export_parquet, import_parquet
from kdfast.cli import main

V = 400


def filled(path, targets, **options):
    with cache.Writer(path, vocab_size=V, **options) as writer:
        for key, (one, ids, seed) in targets.items():
            writer.write(key, one, ids, seed=seed)
    return cache.Reader(path)


def assert_equal(a, b):
    """Entries of equal probability may have changed places; the largest was rounded to fp32 once more."""
    assert a.shape == b.shape
    assert a.method == b.method
    assert (a.k_eff is None) == (b.k_eff is None)
    assert torch.equal(a.valid.sum(-1), b.valid.sum(-1))
    assert torch.equal(a.ids.sort(-1).values, b.ids.sort(-1).values)
    assert torch.allclose(a.dense(), b.dense(), rtol=2e-6, atol=0)
    for t in a.lse:
        assert torch.allclose(a.lse[t], b.lse[t], rtol=1e-6, atol=1e-6, equal_nan=True)
    for field in ("gold_logprob", "neg_entropy"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def captured(method, temperatures=(1.0, 2.0), tokens=30):
    logits = torch.randn(tokens, V) * 3
    options = {"topk": {"k": 16}, "topp": {"k": (1, 20), "p": 0.8}, "sample": {"k": 25}, "pps": {"k": 12}}[method]
    return soft_targets(logits, method=method, temperatures=temperatures, seed=3, **options)


@pytest.mark.parametrize(
    ("method", "temperatures"), [("topk", (1.0, 2.0)), ("topp", (1.0, 4.0)), ("sample", (2.0,)), ("pps", (1.0,))]
)
def test_out_and_in_again(tmp_path, method, temperatures):
    samples = {f"a {n}": (captured(method, temperatures, n), torch.arange(n), 3) for n in (0, 1, 30)}
    first = filled(tmp_path / "a", samples, teacher="t", tokenizer="f", metadata={"n": 1}, shift=0)
    done = export_parquet(first, tmp_path / "a.parquet")
    assert done == (3, 31)
    assert import_parquet(tmp_path / "a.parquet", tmp_path / "b") == (3, 31, 0)
    second = cache.Reader(tmp_path / "b")
    assert second.metadata == first.metadata
    assert (second.vocab_size, second.temperatures, second.shift) == (V, temperatures, 0)
    for key, (_, ids, _) in samples.items():
        assert_equal(first[key], second.read([key], [ids])[0])
        a, b = (reader._engine.details(reader._engine.find(key))[1] for reader in (first, second))
        assert a == b == (3 if method in ("sample", "pps") else None)
    assert import_parquet(tmp_path / "a.parquet", tmp_path / "b") == (0, 0, 3)  # again: nothing is missing
    assert not list(tmp_path.glob("*.partial"))


def test_gold_log_probabilities(tmp_path):
    given = captured("topk")
    gold = -torch.rand(30) * 5
    given = SparseTargets(given.ids, given.logprobs, vocab_size=V, lse=given.lse, gold_logprob=gold)
    first = filled(tmp_path / "a", {"x": (given, None, None)})
    export_parquet(first, tmp_path / "a.parquet")
    import_parquet(tmp_path / "a.parquet", tmp_path / "b")
    assert_equal(first["x"], cache.Reader(tmp_path / "b")["x"])
    with pytest.raises(JobError, match="cannot be renormalised"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "c", renormalise=True)


def test_what_others_wrote(tmp_path):
    ids = [[5, 1, 7], [2], [9, 3]]
    logprobs = [[-1.0, -0.8, -3.0], [-0.5], [-2.0, -2.25]]
    table = pa.table(
        {
            "prompt": [41, 42],
            "ids": [ids, []],
            "top": [logprobs, []],
            "tokens": [[1, 2, 3], []],
        }
    )
    pq.write_table(table, tmp_path / "v.parquet")
    columns = Columns("prompt", "ids", "top", "tokens")
    done = import_parquet(
        tmp_path / "v.parquet", tmp_path / "c", vocab_size=10, columns=columns, metadata={"teacher": "theirs"}, grid=10
    )
    assert done == (2, 3, 0)
    reader = cache.Reader(tmp_path / "c")
    assert reader.metadata == {"teacher": "theirs"}
    (got,) = reader.read(["41"], [[1, 2, 3]])
    assert got.k_eff.tolist() == [3, 1, 2]
    for token, (i, p) in enumerate(zip(ids, logprobs, strict=True)):
        assert got.dense()[token, i].log().tolist() == pytest.approx(p, abs=1e-3)
    assert 1 - got.dense()[1].sum().item() == pytest.approx(1 - math.exp(-0.5), abs=1e-6)  # the tail is what is left
    assert reader["42"].shape[0] == 0


ABOVE = [[[3, 4], [5, 6]]], [[[-1.0, -1.0], [-0.1, -0.5]]]


def test_more_than_one_is_refused_or_renormalised(tmp_path):
    pq.write_table(pa.table({"key": ["a"], "ids": ABOVE[0], "logprobs": ABOVE[1]}), tmp_path / "v.parquet")
    with pytest.raises(JobError, match=r"sample 'a', token 1: the probabilities of its 2 entries sum to 1\.511368"):
        import_parquet(tmp_path / "v.parquet", tmp_path / "c", vocab_size=10)
    import_parquet(tmp_path / "v.parquet", tmp_path / "d", vocab_size=10, renormalise=True)
    reader = cache.Reader(tmp_path / "d")
    assert reader.metadata == {"renormalised": True}
    assert reader["a"].dense().sum(-1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert reader["a"].dense()[0, [3, 4]].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_rounding_is_no_excess(tmp_path):
    logprobs = torch.randn(50, 10).log_softmax(-1)  # all of the vocabulary, in fp32
    table = pa.table({"ids": [[list(range(10))] * 50], "logprobs": [logprobs.tolist()]})
    pq.write_table(table, tmp_path / "v.parquet")
    import_parquet(tmp_path / "v.parquet", tmp_path / "c", vocab_size=10)
    got = cache.Reader(tmp_path / "c")["0"]
    assert got.dense().sum(-1).tolist() == pytest.approx([1] * 50, abs=1e-5)


def test_renormalised_at_other_temperatures(tmp_path):
    first = filled(tmp_path / "a", {"x": (captured("topk"), None, None)})
    export_parquet(first, tmp_path / "a.parquet")
    import_parquet(tmp_path / "a.parquet", tmp_path / "b", renormalise=True)
    got = cache.Reader(tmp_path / "b")["x"]
    q = (got.logprobs / 2 - got.lse[2.0][:, None]).exp()
    assert torch.allclose(q.sum(-1), torch.ones(30), atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"ids": [[[3, 4], [5]]], "logprobs": [[[-1.0, -2.0], [-1.0, -2.0]]]}, "'0', token 1: as many ids"),
        ({"ids": [[[3, 4]]], "logprobs": [[[-1.0, -2.0], [-1.0]]]}, "'0', token 1: as many ids"),
        ({"ids": [[[3, 10]]], "logprobs": [[[-1.0, -2.0]]]}, "'0', token 0: id 10 is not in 0 to 9"),
        ({"ids": [[[3], [-1]]], "logprobs": [[[-1.0], [-2.0]]]}, "'0', token 1: id -1"),
        ({"ids": [[[3, 3]]], "logprobs": [[[-1.0, -2.0]]]}, "twice|duplicate"),
        ({"ids": [[[3, 4]]], "logprobs": [[[-1.0, math.nan]]]}, "'0', token 0: log-probability nan"),
        ({"ids": [[[3, 4]]], "logprobs": [[[-1.0, -math.inf]]]}, "'0', token 0: log-probability -inf"),
        ({"ids": [[[3]]], "logprobs": [[[1e6]]]}, "sum to inf"),
        ({"ids": [[None, [3]]], "logprobs": [[None, [-1.0]]]}, "'0', token 0: 'ids' is null: leave that token out"),
        ({"ids": [[[3, None]]], "logprobs": [[[-1.0, -2.0]]]}, "holds a null"),
        ({"ids": [None], "logprobs": [[[-1.0]]]}, "has no 'ids'"),
        ({"ids": [[["x"]]], "logprobs": [[[-1.0]]]}, "sample '0'"),
        ({"ids": [[3]], "logprobs": [[-1.0]]}, "sample '0'"),
        ({"ids": [7], "logprobs": [-1.0]}, "sample '0'"),
        ({"ids": [[[3]]]}, "has no 'logprobs'"),
        ({"tokens": [[[3]]]}, "no column 'ids', it has tokens"),
        ({"ids": [[[3]]], "logprobs": [[[-1.0]]], "key": [1.5]}, "key must be"),
        ({"ids": [[[3]]], "logprobs": [[[-1.0]]], "token_ids": [[1, 2]]}, r"must be \(1,\)"),
        ({"ids": [[[3]]], "logprobs": [[[-1.0]]], "method": ["best"]}, "method must be one of"),
        ({"ids": [[[3, 4]]], "logprobs": [[[-1.0, -2.0]]], "width": [1]}, "its width is 1"),
        ({"ids": [[[3]]], "logprobs": [[[-1.0]]], "lse_hot": [[0.0]]}, "must end in a temperature"),
        ({"ids": [[[3]]], "logprobs": [[[-1.0]]], "lse_2.0": [[0.0, 1.0]]}, "list of 1 numbers"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    with pytest.raises(JobError, match=message):
        import_parquet(tmp_path / "v.parquet", tmp_path / "c", vocab_size=10)


class TestCommands:
    @pytest.fixture
    def kdfast(self, monkeypatch, capsys, tmp_path):
        monkeypatch.chdir(tmp_path)

        def call(*arguments):
            monkeypatch.setattr("sys.argv", ["kdfast", "cache", *arguments])
            with pytest.raises(SystemExit) as caught:
                main()
            printed = capsys.readouterr()
            return caught.value.code, printed.out, printed.err

        return call

    def test_there_and_back(self, kdfast, tmp_path):
        filled(tmp_path / "a", {"x": (captured("topk"), None, None)}, teacher="t")
        code, output, _ = kdfast("export", "a", "a.parquet")
        assert code == 0
        assert "1 sample, 30 tokens" in output
        code, output, _ = kdfast("import", "a.parquet", "b", "--teacher", "other")
        assert code == 0
        assert "1 sample written" in output
        assert cache.Reader("b").metadata == {"teacher": "other"}
        code, _, errors = kdfast("import", "a.parquet", "b", "--teacher", "other")  # no token ids to compare
        assert code == 1
        assert "without token_ids" in errors

    def test_other_targets_of_a_key(self, kdfast, tmp_path):
        for name in "ab":
            filled(tmp_path / name, {"x": (captured("topk"), torch.arange(30), None)})
        assert kdfast("export", "b", "b.parquet")[0] == 0
        for command in (["merge", "b", "--into", "a"], ["import", "b.parquet", "a"]):
            code, output, errors = kdfast(*command)
            assert (code, output) == (1, "")
            assert "sample 'x'" in errors
            assert "other targets" in errors
            code, output, _ = kdfast(*command, "--on-duplicate", "keep")
            assert code == 0
            assert "1 was there" in output
        assert kdfast("import", "b.parquet", "b", "--grid", "7")[0] == 0  # the same, on the grid that is there

    def test_wrong_use(self, kdfast, tmp_path):
        (tmp_path / "no.parquet").write_text("no")
        pq.write_table(pa.table({"ids": ABOVE[0], "logprobs": ABOVE[1]}), tmp_path / "v.parquet")
        for arguments, code, message in [
            (["export", "nowhere", "a.parquet"], 1, "nowhere"),
            (["import", "nowhere.parquet", "b"], 1, "nowhere.parquet"),
            (["import", "no.parquet", "b"], 2, "no Parquet file"),
            (["import", "v.parquet", "b"], 2, "pass --vocab-size"),
            (["import", "v.parquet", "b", "--vocab-size", "10"], 2, "pass --renormalise"),
            (["import", "v.parquet", "b", "--vocab-size", "10", "--tier", "best"], 2, "tier"),
            (["import", "v.parquet", "b", "--vocab-size", "10", "--shift", "2"], 2, "--shift"),
            (["import", "v.parquet", "b", "--vocab-size", "10", "--grid", "11"], 2, "--grid must be auto, or 2 to 10"),
            (["import", "v.parquet", "b", "--vocab-size", "10", "--on-duplicate", "last"], 2, "on_duplicate must be"),
            (["merge", "a", "--into", "b", "--on-duplicate", "last"], 2, "on_duplicate must be"),
        ]:
            got, _, errors = kdfast(*arguments)
            assert message in errors, arguments
            assert got == code, arguments
            assert "Traceback" not in errors
