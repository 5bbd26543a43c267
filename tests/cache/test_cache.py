"""The cache through its Python face: what comes back, and what is refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SEED
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from kdfast import CacheError, SparseTargets, cache, distill_loss, soft_targets

V = 5000
TEMPERATURES = (1.0, 2.0)


def capture(tokens=300, k=64, temperatures=TEMPERATURES, v=V, scale=3.0, **options):
    return soft_targets(torch.randn(tokens, v) * scale, k=k, temperatures=temperatures, **options)


def fill(path, samples, **options):
    with cache.Writer(path, vocab_size=V, **options) as writer:
        for key, (targets, ids) in samples.items():
            writer.write(key, targets, ids)
    return cache.Reader(path)


def some(n=3, **options):
    return {f"sample {i}": (capture(tokens=100 * i + 7, **options), torch.randint(V, (100 * i + 7,))) for i in range(n)}


def log_mass(targets, temperature):
    """log of the kept mass at a temperature, fp64."""
    scaled = targets.logprobs.double() / temperature - targets.lse[temperature].double()[:, None]
    return torch.logsumexp(torch.where(targets.valid, scaled, -torch.inf), -1)


def assert_same(got, expected):
    for field in ("ids", "logprobs", "mass", "k_eff", "neg_entropy", "gold_logprob"):
        a, b = getattr(got, field), getattr(expected, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert torch.equal(a, b), field
    assert got.method == expected.method
    assert got.vocab_size == expected.vocab_size
    assert set(got.lse) == set(expected.lse)
    assert all(torch.equal(got.lse[t], expected.lse[t]) for t in got.lse)


class TestFidelity:
    @pytest.mark.parametrize("grid", [2, 4, 6])
    def test_log_probabilities_lie_on_the_grid_and_masses_are_kept(self, tmp_path, grid):
        given = capture()
        got = fill(tmp_path / "c", {"a": (given, None)}, grid=grid)["a"]
        assert torch.equal(got.ids, given.ids)  # topk is in order of probability
        steps = (got.logprobs[:, :1].double() - got.logprobs.double()) * 2**grid
        expected = (given.logprobs[:, :1].double() - given.logprobs.double()) * 2**grid
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert (steps - expected).abs().max() <= 0.5 + 1e-4
        for t in TEMPERATURES:
            assert torch.allclose(log_mass(got, t), log_mass(given, t), atol=2e-6)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_divergence_of_what_is_stored(self, tmp_path, temperature):
        given = capture(tokens=1000)
        got = fill(tmp_path / "c", {"a": (given, None)})["a"]
        q = given.logprobs.double() / temperature - given.lse[temperature].double()[:, None]
        p = got.logprobs.double() / temperature - got.lse[temperature].double()[:, None]
        tail_q, tail_p = -torch.expm1(log_mass(given, temperature)), -torch.expm1(log_mass(got, temperature))
        kl = (q.exp() * (q - p)).sum(-1) + tail_q * (tail_q.log() - tail_p.log())
        assert kl.mean() <= 1e-4
        assert kl.min() >= -1e-6

    def test_the_loss_sees_the_same_teacher(self, tmp_path):
        logits = torch.randn(200, V) * 3
        given = soft_targets(logits, k=64, temperatures=TEMPERATURES)
        got = fill(tmp_path / "c", {"a": (given, None)})["a"]
        student = torch.randn(200, V)
        for t in TEMPERATURES:
            a, b = (distill_loss(student, x, temperature=t) for x in (given, got))
            assert a.item() == pytest.approx(b.item(), rel=2e-3)

    def test_unsorted_entries_come_back_sorted(self, tmp_path):
        given = capture(tokens=50)
        order = torch.rand(given.shape).argsort(-1)
        shuffled = SparseTargets(
            given.ids.gather(-1, order), given.logprobs.gather(-1, order), vocab_size=V, lse=given.lse
        )
        reader = fill(tmp_path / "c", {"a": (given, None), "b": (shuffled, None)})
        assert_same(reader["b"], reader["a"])

    def test_topp_keeps_its_number_of_entries(self, tmp_path):
        given = capture(k=(1, 64), method="topp", p=0.7)
        got = fill(tmp_path / "c", {"a": (given, None)})["a"]
        assert got.method == "topp"
        assert torch.equal(got.k_eff, given.k_eff)
        assert torch.equal(got.ids, given.ids)
        assert (got.logprobs[~got.valid] == -torch.inf).all()

    def test_gold_log_probabilities_come_back_as_they_were(self, tmp_path):
        given = capture(tokens=40)
        gold = -torch.rand(40) * 20
        gold[3] = -torch.inf
        given = SparseTargets(given.ids, given.logprobs, vocab_size=V, lse=given.lse, gold_logprob=gold)
        assert torch.equal(fill(tmp_path / "c", {"a": (given, None)})["a"].gold_logprob, gold)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_counts_come_back_exactly(self, tmp_path, temperature):
        given = capture(k=50, method="sample", temperatures=(temperature,), seed=3)
        got = fill(tmp_path / "c", {"a": (given, None)})["a"]
        assert torch.equal(got.ids, given.ids)
        assert torch.equal(got.mass, given.mass)
        assert torch.equal(got.neg_entropy, given.neg_entropy)
        assert got.logprobs is None
        student = torch.randn(300, V)
        a, b = (distill_loss(student, x, temperature=temperature) for x in (given, got))
        assert a.item() == b.item()

    def test_threshold_samples_come_back_within_their_grid(self, tmp_path):
        given = capture(k=24, method="pps", temperatures=(1.0,), seed=4)
        got = fill(tmp_path / "c", {"a": (given, None)})["a"]
        assert torch.equal(got.ids, given.ids)
        ratio = (got.mass[got.valid].double() / given.mass[given.valid].double()).log()
        assert ratio.abs().max() <= 0.5 / 256 + 1e-6
        drawn = given.valid & (given.mass == given.mass.where(given.valid, 2.0).amin(-1, keepdim=True))
        assert torch.equal(got.mass[drawn], given.mass[drawn])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes_are_taken_as_fp32(self, tmp_path, dtype):
        given = capture(tokens=20, temperatures=(1.0,))
        other = SparseTargets(given.ids, given.logprobs.to(dtype), vocab_size=V)
        same = SparseTargets(given.ids, other.logprobs.float(), vocab_size=V)
        reader = fill(tmp_path / "c", {"a": (other, None), "b": (same, None)})
        assert_same(reader["a"], reader["b"])


class TestReading:
    def test_ranges_equal_slices_of_the_whole(self, tmp_path):
        reader = fill(tmp_path / "c", {"a": (capture(tokens=700), None)}, block_tokens=64)
        whole = reader["a"]
        for start, stop in [(0, 700), (0, 1), (63, 65), (64, 128), (130, 131), (640, 700), (10, 10), (-5, None)]:
            part = reader["a", start:stop]
            expected = whole[slice(start, stop)]
            assert_same(part, expected)

    def test_many_at_once_in_any_order(self, tmp_path):
        samples = some(6)
        reader = fill(tmp_path / "c", samples)
        keys = [*reversed(samples), "sample 2", ("sample 3", slice(5, 80))]
        for key, got in zip(keys, reader.read(keys), strict=True):
            expected = reader[key] if isinstance(key, str) else reader[key[0]][key[1]]
            assert_same(got, expected)

    def test_what_is_there(self, tmp_path):
        samples = some(4)
        reader = fill(tmp_path / "c", samples, teacher="a/b", tokenizer="f00", metadata={"n": 1})
        assert len(reader) == 4
        assert sorted(reader) == sorted(reader.keys()) == sorted(samples)
        assert "sample 1" in reader
        assert "sample 9" not in reader
        assert 7 not in reader
        assert reader.vocab_size == V
        assert reader.temperatures == TEMPERATURES
        assert reader.metadata == {"teacher": "a/b", "tokenizer": "f00", "n": 1}
        assert reader.tokens("sample 3") == 307

    def test_a_sample_that_is_missing(self, tmp_path):
        reader = fill(tmp_path / "c", some(1))
        with pytest.raises(CacheError, match="no sample has this key") as raised:
            reader["nobody"]
        assert (raised.value.code, raised.value.key) == ("missing", "nobody")

    def test_integer_keys_are_their_decimal_strings(self, tmp_path):
        keys = [7, -7, 0, 2**63 - 1, -(2**63), 2**63, 2**70]
        reader = fill(tmp_path / "c", {key: (capture(tokens=5), None) for key in keys})
        for key in keys:
            assert_same(reader[key], reader[str(key)])
        assert np.int64(7) in reader
        assert_same(reader[np.int64(7)], reader["7"])
        with pytest.raises(TypeError, match="bool"):
            reader[True]

    @pytest.mark.parametrize("key", ["", "a\0b", "k" * 4097, "\ud800", 1.5, True, None])
    def test_keys_that_cannot_be(self, tmp_path, key):
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer, pytest.raises((ValueError, TypeError)):
            writer.write(key, capture(tokens=5))

    def test_keys_of_other_scripts(self, tmp_path):
        keys = ["ключ", "鍵/1", "🔑", "k" * 4096, "a b\n"]
        targets = capture(tokens=3)
        reader = fill(tmp_path / "c", {key: (targets, None) for key in keys})
        assert set(reader) == set(keys)

    def test_a_sample_of_no_tokens(self, tmp_path):
        reader = fill(tmp_path / "c", {"none": (capture(tokens=1)[:0], torch.zeros(0, dtype=torch.long))})
        assert reader["none"].shape == (0, 64)

    def test_a_step_is_refused(self, tmp_path):
        reader = fill(tmp_path / "c", some(2))
        with pytest.raises(IndexError, match="step"):
            reader["sample 1", ::2]

    def test_memory_serves_again_only_once_nothing_holds_it(self, tmp_path):
        given = {"a": (capture(tokens=2000), None), "b": (capture(tokens=2000), None)}
        reader = fill(tmp_path / "c", given)  # 512 kB of ids, and as much of values
        first = reader["a"]
        expected = SparseTargets.map(first, torch.clone)
        part = first.ids[5:9, :3]  # holds all of it
        where = {first.ids.data_ptr(), first.logprobs.data_ptr()}
        assert not where & {reader["b"].ids.data_ptr(), reader["b"].logprobs.data_ptr()}
        assert_same(first, expected)
        del first
        again = reader["b"]
        assert part.untyped_storage().data_ptr() not in {again.ids.data_ptr(), again.logprobs.data_ptr()}
        assert torch.equal(part, expected.ids[5:9, :3])
        left = {again.ids.data_ptr(), again.logprobs.data_ptr()}
        del again
        third = reader["a"]
        assert {third.ids.data_ptr(), third.logprobs.data_ptr()} == left
        assert_same(third, expected)

    def test_samples_go_through_the_shared_memory_of_workers(self, tmp_path):
        given = {str(i): (capture(tokens=1500), None) for i in range(4)}
        reader = fill(tmp_path / "c", given)
        data = cache.Dataset(reader, [{"id": str(i)} for i in range(4)], token_ids=None)
        for i, sample in enumerate(DataLoader(data, batch_size=None, num_workers=2)):
            assert_same(sample["targets"], reader[str(i)])

    def test_pickled(self, tmp_path):
        reader = fill(tmp_path / "c", some(2))
        assert_same(pickle.loads(pickle.dumps(reader))["sample 1"], reader["sample 1"])


class TestTokenIds:
    def test_the_same_tokens_pass(self, tmp_path):
        samples = some(3)
        reader = fill(tmp_path / "c", samples)
        got = reader.read(list(samples), [ids for _, ids in samples.values()])
        assert [len(x.ids) for x in got] == [7, 107, 207]
        reader.read(["sample 1"], [samples["sample 1"][1].tolist()])

    @pytest.mark.parametrize("change", ["one token", "one position", "shorter"])
    def test_others_are_an_error_that_names_the_sample(self, tmp_path, change):
        samples = some(3)
        reader = fill(tmp_path / "c", samples)
        ids = samples["sample 2"][1].clone()
        if change == "one token":
            ids[17] = (ids[17] + 1) % V
        ids = {"one token": ids, "one position": ids.roll(1), "shorter": ids[:-1]}[change]
        with pytest.raises(CacheError) as raised:
            reader.read(["sample 1", "sample 2"], [None, ids])
        assert (raised.value.code, raised.value.key) == ("misaligned", "sample 2")

    def test_a_sample_without_a_hash_cannot_be_checked(self, tmp_path):
        reader = fill(tmp_path / "c", {"a": (capture(tokens=5), None)})
        with pytest.raises(CacheError, match="without token_ids"):
            reader.read(["a"], [torch.zeros(5, dtype=torch.long)])

    def test_token_ids_of_another_length_are_refused_when_writing(self, tmp_path):
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer, pytest.raises(ValueError, match=r"must be \(5,\)"):
            writer.write("a", capture(tokens=5), torch.zeros(6, dtype=torch.long))


class TestWriting:
    def test_refused(self, tmp_path):
        targets = capture(tokens=5)
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            writer.write("a", targets)
            with pytest.raises(ValueError, match="columns"):
                writer.write("b", capture(tokens=5, v=V + 1))
            with pytest.raises(ValueError, match=r"captured at temperatures 1\.0, 3\.0, the cache holds 1\.0, 2\.0"):
                writer.write("b", capture(tokens=5, temperatures=(1.0, 3.0)))
            with pytest.raises(ValueError, match=r"must be \(S, K\)"):
                writer.write("b", targets.map(lambda t: t[None]))
            with pytest.raises(TypeError, match="SparseTargets"):
                writer.write("b", targets.ids)
        with pytest.raises(ValueError, match="closed"):
            writer.write("b", targets)
        assert list(cache.Reader(tmp_path / "c")) == ["a"]

    @pytest.mark.parametrize(
        ("spoil", "match"),
        [
            (lambda t: t.ids[3].fill_(5), "twice|duplicate"),
            (lambda t: t.ids[3, 2:3].fill_(V), "id"),
            (lambda t: t.ids[3, 2:3].fill_(-7), "id"),
            (lambda t: t.logprobs[3, 1:2].fill_(float("nan")), "log"),
            (lambda t: t.logprobs[3, 1:2].fill_(0.5), "log"),
            (lambda t: t.lse[2.0][3:4].fill_(float("inf")), "lse"),
        ],
    )
    def test_values_that_cannot_be_stored_cost_their_sample_alone(self, tmp_path, spoil, match):
        targets = capture(tokens=9)
        good = capture(tokens=4)
        spoil(targets)
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            writer.write("good", good)
            with pytest.raises(ValueError, match=f"sample spoilt, token 3: .*({match})"):
                writer.write("spoilt", targets)
            assert "spoilt" not in writer
            assert writer.missing(["good", "spoilt"]) == ["spoilt"]
            writer.write("next", good)
            assert writer.commit() == 2
        assert list(cache.Reader(tmp_path / "c")) == ["good", "next"]

    @pytest.mark.parametrize("wrong", [0.0, -0.5, float("nan"), float("inf")])
    def test_drawn_values_that_cannot_be_stored(self, tmp_path, wrong):
        targets = capture(tokens=4, k=5, method="pps", temperatures=(1.0,), seed=4)
        good = targets.map(torch.clone)
        targets.mass[2, 1] = wrong
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            with pytest.raises(ValueError, match=r"sample spoilt, token 2: entry 1: mass is"):
                writer.write("spoilt", targets)
            writer.write("good", good)
        assert list(cache.Reader(tmp_path / "c")) == ["good"]

    def test_closing_where_nothing_was_written_and_nothing_can_be(self, tmp_path, monkeypatch):
        def refuses(**_):
            raise OSError(errno.EROFS, "Read-only file system")

        fill(tmp_path / "c", some(2))

        def fails(**_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("kdfast.cache.manifest.tempfile.mkstemp", fails)
        with pytest.raises(CacheError, match="cannot write the manifest: Input/output error"):
            cache.Writer(tmp_path / "c", vocab_size=V).close()
        monkeypatch.setattr("kdfast.cache.manifest.tempfile.mkstemp", refuses)
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            assert writer.missing(["sample 0", "x"]) == ["x"]
        writer = cache.Writer(tmp_path / "c", vocab_size=V)
        writer.write("x", capture(tokens=3))
        with pytest.raises(CacheError, match="cannot write the manifest: Read-only file system"):
            writer.close()

    def test_an_error_in_the_block_leaves_what_was_written(self, tmp_path):
        def fails():
            with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
                writer.write("a", capture(tokens=5))
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            fails()
        assert list(cache.Reader(tmp_path / "c")) == ["a"]

    def test_temperature_1_goes_without_saying(self, tmp_path):
        given = capture(tokens=5)
        got = fill(tmp_path / "c", {"a": (given, None)}, temperatures=(2.0,))["a"]
        assert got.temperatures == TEMPERATURES
        assert torch.allclose(log_mass(got, 2.0), log_mass(given, 2.0), atol=2e-6)

    def test_a_writer_of_nothing_leaves_nothing(self, tmp_path):
        with cache.Writer(tmp_path / "c", vocab_size=V):
            pass
        with pytest.raises(CacheError) as raised:
            cache.Reader(tmp_path / "c")
        assert raised.value.code == "missing"
        with cache.Writer(tmp_path / "c", vocab_size=V, temperatures=(2.0, 1.0)):
            pass
        assert len(cache.Reader(tmp_path / "c")) == 0

    def test_the_same_key_twice(self, tmp_path):
        targets, ids = capture(tokens=5), torch.arange(5)
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            assert writer.write("a", targets, ids)
            assert not writer.write("a", targets, ids)
            with pytest.raises(CacheError, match="other token ids"):
                writer.write("a", targets, ids + 1)
            with pytest.raises(CacheError, match="without token_ids"):
                writer.write("a", targets)
            assert writer.commit() == 1

    def test_resumed(self, tmp_path):
        samples = some(4)
        first = dict(list(samples.items())[:2])
        fill(tmp_path / "c", first)
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            missing = writer.missing(samples)
            assert missing == ["sample 2", "sample 3"]
            for key in missing:
                writer.write(key, *samples[key])
        reader = cache.Reader(tmp_path / "c")
        assert set(reader) == set(samples)
        names = os.listdir(tmp_path / "c")
        assert sum(name.endswith(".shard") for name in names) == 2
        assert not any(name.endswith((".open", ".temporary")) for name in names)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"vocab_size": V + 1}, "vocab_size"),
            ({"temperatures": (1.0,)}, "temperatures"),
            ({"shift": 0}, "shift"),
            ({"teacher": "another"}, "metadata"),
        ],
    )
    def test_another_cache_is_not_written_into(self, tmp_path, options, match):
        fill(tmp_path / "c", some(1), teacher="one")
        with pytest.raises(CacheError, match=f"the cache there has {match}") as raised:
            cache.Writer(tmp_path / "c", **{"vocab_size": V, "teacher": "one", **options})
        assert raised.value.code == "mismatch"

    @pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ({1}, TypeError)])
    def test_metadata_that_are_no_json_are_refused(self, tmp_path, value, error):
        with pytest.raises(error, match="metadata must be JSON"):
            cache.Writer(tmp_path / "c", vocab_size=V, metadata={"own": [value]})

    def test_many_shards(self, tmp_path):
        samples = some(5)
        reader = fill(tmp_path / "c", samples, shard_bytes=1 << 14)
        assert sum(name.endswith(".shard") for name in os.listdir(tmp_path / "c")) >= 3
        assert set(reader) == set(samples)
        manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
        assert manifest["samples"] == 5
        assert manifest["tokens"] == sum(len(t.ids) for t, _ in samples.values())
        assert manifest["bytes"] == sum(f.stat().st_size for f in (tmp_path / "c").glob("*.shard"))

    def test_two_writers_at_once(self, tmp_path):
        samples = some(6)
        shared = capture(tokens=9), torch.arange(9)
        writers = [cache.Writer(tmp_path / "c", vocab_size=V) for _ in range(2)]
        for i, (key, sample) in enumerate(samples.items()):
            writers[i % 2].write(key, *sample)
        for writer in writers:
            writer.write("padding", *shared)
        for writer in writers:
            writer.close()
        reader = cache.Reader(tmp_path / "c")
        assert set(reader) == {*samples, "padding"}
        assert len(reader) == 7
        assert json.loads((tmp_path / "c" / "manifest.json").read_text())["samples"] == 8  # each file counts its own

    def test_two_writers_that_disagree_about_a_key(self, tmp_path):
        targets = capture(tokens=9)
        writers = [cache.Writer(tmp_path / "c", vocab_size=V) for _ in range(2)]
        for i, writer in enumerate(writers):
            writer.write("a", targets, torch.arange(9) + i)
            writer.write(f"of {i}", targets, torch.arange(9))
        for writer in writers:
            writer.close()
        reader = cache.Reader(tmp_path / "c")
        assert reader["of 0"].shape == (9, 64)
        with pytest.raises(CacheError) as raised:
            reader["a"]
        assert (raised.value.code, raised.value.key) == ("duplicate", "a")

    def test_a_reader_sees_what_was_committed_when_it_was_opened(self, tmp_path):
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            writer.write("a", capture(tokens=5))
            assert writer.commit() == 1
            early = cache.Reader(tmp_path / "c")
            writer.write("b", capture(tokens=6))
            assert list(cache.Reader(tmp_path / "c")) == ["a"]
        assert list(early) == ["a"]
        assert early["a"].shape == (5, 64)  # though its file has another name now
        assert list(cache.Reader(tmp_path / "c")) == ["a", "b"]

    def test_a_full_queue_waits(self, tmp_path):
        samples = some(5)
        assert set(fill(tmp_path / "c", samples, queue_bytes=1)) == set(samples)

    def test_a_forked_child_cannot_write(self, tmp_path):
        code = """
import os, sys, torch
from kdfast import cache, soft_targets
writer = cache.Writer(sys.argv[1], vocab_size=100)
targets = soft_targets(torch.randn(5, 100), k=8)
calls = (lambda: writer.write("b", targets), lambda: "b" in writer, writer.commit, writer.close)
for i in range(40):  # while its threads are at work, and hold the lock now and then
    writer.write(i, targets)
    child = os.fork()
    if child == 0:
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert "forked" in str(error)
            else:
                os._exit(1)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
writer.commit()
child = os.fork()
if child == 0:
    del writer, calls  # which joins no thread
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
writer.close()
assert len(cache.Reader(sys.argv[1])) == 40
"""
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, timeout=120, cwd=tmp_path)


class Samples:
    def __init__(self, samples):
        self.rows = [{"id": key, "input_ids": ids, "n": i} for i, (key, (_, ids)) in enumerate(samples.items())]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TestDataset:
    @pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
    def test_under_a_data_loader(self, tmp_path, workers, persistent):
        samples = some(6)
        reader = fill(tmp_path / "c", samples)
        assert reader["sample 0"].shape == (7, 64)  # its threads and files are there before the fork
        data = cache.Dataset(reader, Samples(samples))
        loader = DataLoader(
            data,
            batch_size=2,
            shuffle=True,
            num_workers=workers,
            persistent_workers=persistent,
            collate_fn=cache.collate,
        )
        for _ in range(2):
            seen = {}
            for batch in loader:
                lengths = batch["token_mask"].sum(-1).tolist()
                for i, n in enumerate(lengths):
                    seen[int(batch["n"][i])] = (batch["targets"][i][:n], batch["input_ids"][i, :n])
            assert sorted(seen) == list(range(6))
            for i, (key, (_, ids)) in enumerate(samples.items()):
                assert torch.equal(seen[i][0].ids, reader[key].ids)
                assert torch.equal(seen[i][1], ids)

    @pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # of torch, which torchdata calls
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_that_goes_on_in_an_epoch(self, tmp_path, workers):
        """torchdata's loader, resumed after some batches, gives those that were left."""
        samples = some(12)
        data = cache.Dataset(fill(tmp_path / "c", samples), Samples(samples))

        def loader():
            return StatefulDataLoader(
                data, batch_size=2, shuffle=True, num_workers=workers, collate_fn=cache.collate, generator=generator
            )

        generator = torch.Generator().manual_seed(SEED)
        first = loader()
        batches = iter(first)
        seen = [next(batches)["n"].tolist() for _ in range(2)]
        state = first.state_dict()
        rest = [(batch["n"].tolist(), batch["targets"].ids) for batch in batches]
        generator = torch.Generator()  # of another process
        second = loader()
        second.load_state_dict(state)
        again = [(batch["n"].tolist(), batch["targets"].ids) for batch in second]
        assert [n for n, _ in again] == [n for n, _ in rest]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again, rest, strict=True))
        assert sorted(itertools.chain(*seen, *(n for n, _ in rest))) == list(range(12))

    def test_by_index(self, tmp_path):
        targets = [capture(tokens=4) for _ in range(3)]
        reader = fill(tmp_path / "c", {i: (t, None) for i, t in enumerate(targets)})
        data = cache.Dataset(reader, [{"x": i} for i in range(3)], key=None)
        assert torch.equal(data[2]["targets"].ids, targets[2].ids)
        assert torch.equal(data[-1]["targets"].ids, targets[2].ids)

    def test_other_tokens_are_an_error(self, tmp_path):
        samples = some(3)
        reader = fill(tmp_path / "c", samples)
        rows = Samples(samples)
        rows.rows[1]["input_ids"] = rows.rows[1]["input_ids"].roll(1)
        with pytest.raises(CacheError, match="sample 1"):
            cache.Dataset(reader, rows)[1]
        assert cache.Dataset(reader, rows, token_ids=None)[1]["targets"].shape == (107, 64)

    def test_a_field_that_is_not_there(self, tmp_path):
        samples = some(1)
        with pytest.raises(KeyError, match="no field 'uid'"):
            cache.Dataset(fill(tmp_path / "c", samples), Samples(samples), key="uid")[0]

    def test_a_padded_batch_trains(self, tmp_path):
        samples = some(3)
        reader = fill(tmp_path / "c", samples)
        items = [{**row, "labels": row["input_ids"]} for row in Samples(samples).rows]
        batch = cache.collate([cache.Dataset(reader, items)[i] for i in range(3)])
        student = torch.randn(3, 207, V, requires_grad=True)
        loss = distill_loss(student, batch["targets"], batch["labels"], temperature=2.0)
        alone = sum(
            distill_loss(student[i, :n], reader[key], ids, temperature=2.0, reduction="sum")
            for i, (key, (_, ids)) in enumerate(samples.items())
            for n in [len(ids)]
        )
        assert loss.item() == pytest.approx(alone.item() / 321, rel=1e-5)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_an_error_that_says_where(tmp_path, damage):
    samples = some(4)
    fill(tmp_path / "c", samples)
    (shard,) = (tmp_path / "c").glob("*.shard")
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[5000] ^= 4
        shard.write_bytes(content)
        reader = cache.Reader(tmp_path / "c")
        failures = []
        for key in samples:
            try:
                reader[key]
            except CacheError as error:
                failures.append(error)
        (failure,) = failures
        assert failure.code == "checksum"
        assert failure.path == str(shard)
        assert failure.key in samples
        return
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 8)
    else:
        shard.unlink()
    with pytest.raises(CacheError) as raised:
        cache.Reader(tmp_path / "c")
    assert raised.value.code == {"cut": "truncated", "gone": "missing"}[damage]
    assert raised.value.path == str(shard)
    skipping = cache.Reader(tmp_path / "c", damaged="skip")
    assert len(skipping) == 0
    assert [error.code for error in skipping.damage] == [raised.value.code]
