"""The compact tier: the fixed one's numbers in fewer bytes, with models that are learned, placed and kept twice."""

from __future__ import annotations

import os
import struct

import format_fuzz
import pytest
import torch

from kdfast import CacheError, SparseTargets, cache, soft_targets

V = 3000


def teacher(tokens):
    """Targets of a Zipf-like teacher, in which a model finds something to learn."""
    logits = 2.5 * torch.randn(tokens, V) - torch.log1p(torch.arange(V))
    return soft_targets(logits, k=32, temperatures=(1.0, 2.0))


def fill(path, samples, commits=(), **options):
    with cache.Writer(path, vocab_size=V, temperatures=(1.0, 2.0), **options) as writer:
        for i, (key, targets) in enumerate(samples.items()):
            writer.write(key, targets, torch.arange(len(targets.ids)))
            if i in commits:
                assert writer.commit() == i + 1
    return cache.Reader(path)


def models_of(path):
    return b"".join(file.read_bytes() for file in sorted(path.glob("*.shard"))).count(b"KDFM") / 2


def size_of(path):
    return sum(file.stat().st_size for file in path.glob("*.shard"))


def assert_equal(a, b):
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.logprobs, b.logprobs)
    assert all(torch.equal(a.lse[t], b.lse[t]) for t in b.lse)
    for field in ("k_eff", "gold_logprob", "mass", "neg_entropy"):
        x, y = getattr(a, field), getattr(b, field)
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def some(n=5, tokens=300):
    return {f"sample {i}": teacher(tokens + i) for i in range(n)}


class TestBlocksTogether:
    """Blocks of a read are decoded at the same time; what is wrong is wrong in one of them."""

    @pytest.mark.parametrize("which", range(9))
    def test_an_illegal_block_is_named(self, tmp_path, which):
        fill(tmp_path / "c", {"a": teacher(9 * 64)}, tier="compact", block_tokens=64)
        shard = next((tmp_path / "c").glob("*.shard"))
        data = bytearray(shard.read_bytes())
        parts = list(format_fuzz.parts_of_shard(bytes(data)))
        frame = max(part.begin for part in parts if data[part.begin : part.begin + 4] == b"KDFR")
        block = [part for part in parts if part.begin > frame and data[part.begin :][:8] != b"KDFINDEX"][which]
        words, more = struct.unpack_from("<2I", data, block.begin)
        struct.pack_into("<2I", data, block.begin, words - 1, more + 1)  # the first lane's last word is the second's
        for part in parts:
            struct.pack_into("<I", data, part.crc, format_fuzz.crc32c(bytes(data[part.begin : part.end])))
        shard.write_bytes(data)
        reader, others = cache.Reader(tmp_path / "c"), [b for b in range(9) if b != which]
        for ranges in (slice(None), slice(which * 64, which * 64 + 64), slice(which * 64 + 3, None)):
            with pytest.raises(CacheError) as caught:
                reader["a", ranges]
            assert (caught.value.code, caught.value.key, caught.value.offset) == ("corrupt", "a", block.begin)
        for b in others:
            assert reader["a", b * 64 : b * 64 + 64].ids.shape == (64, 32)
        assert [(f.code, f.offset) for f in cache.verify(tmp_path / "c").faults] == [("corrupt", block.begin)]


class TestValues:
    @pytest.mark.parametrize("grid", [2, 4, 10])
    @pytest.mark.parametrize("block_tokens", [64, 256])
    def test_equal_those_of_the_fixed_tier(self, tmp_path, grid, block_tokens):
        samples = some()
        options = {"grid": grid, "block_tokens": block_tokens}
        fixed = fill(tmp_path / "fixed", samples, **options)
        compact = fill(tmp_path / "compact", samples, tier="compact", **options)
        for key in samples:
            assert_equal(compact[key], fixed[key])
            for start, stop in ((0, 1), (63, 65), (100, 300), (257, 290), (7, 7)):
                assert_equal(compact[key, start:stop], fixed[key, start:stop])
        assert compact._engine.find("sample 0").tier == "compact"
        assert not cache.verify(tmp_path / "compact").faults

    def test_of_ragged_targets_with_gold(self, tmp_path):
        given = soft_targets(torch.randn(200, V) * 4, k=(1, 32), method="topp", p=0.6, temperatures=(1.0, 2.0))
        gold = -torch.rand(200) * 20
        gold[5] = -torch.inf
        given = SparseTargets(
            given.ids, given.logprobs, vocab_size=V, lse=given.lse, k_eff=given.k_eff, gold_logprob=gold, method="topp"
        )
        fixed = fill(tmp_path / "fixed", {"a": given})
        assert_equal(fill(tmp_path / "compact", {"a": given}, tier="compact")["a"], fixed["a"])

    def test_drawn_samples_have_a_form_of_their_own(self, tmp_path):
        given = soft_targets(torch.randn(100, V), method="sample", k=12, seed=3)
        with cache.Writer(tmp_path / "c", vocab_size=V, tier="compact") as writer:
            writer.write("a", given)
        reader = cache.Reader(tmp_path / "c")
        assert reader._engine.find("a").tier == "drawn"
        assert torch.equal(reader["a"].ids, given.ids)

    def test_of_no_tokens(self, tmp_path):
        assert len(fill(tmp_path / "c", {"a": teacher(3)[:0]}, tier="compact")["a"].ids) == 0

    def test_are_fewer_bytes(self, tmp_path):
        samples = some(20, 1000)
        for tier in ("fixed", "compact"):
            fill(tmp_path / tier, samples, tier=tier)
        assert size_of(tmp_path / "compact") < 0.85 * size_of(tmp_path / "fixed")


class TestModels:
    def test_are_learned_anew_from_four_times_as_many_tokens(self, tmp_path):
        samples = some(20, 100)
        reader = fill(tmp_path / "c", samples, commits=range(20), tier="compact")
        assert 2 <= models_of(tmp_path / "c") <= 4
        fixed = fill(tmp_path / "fixed", samples)
        for key in samples:
            assert_equal(reader[key], fixed[key])

    def test_end_with_one_from_enough_tokens(self, tmp_path):
        """Samples behind it are encoded with it by several threads."""
        samples = some(60, 1000)
        reader = fill(tmp_path / "c", samples, tier="compact", threads=3)
        assert models_of(tmp_path / "c") == 1
        fixed = fill(tmp_path / "fixed", samples)
        for key in samples:
            assert_equal(reader[key], fixed[key])

    def test_are_in_every_shard(self, tmp_path):
        samples = some(12)
        reader = fill(tmp_path / "c", samples, tier="compact", shard_bytes=1 << 16)
        shards = len(list((tmp_path / "c").glob("*.shard")))
        assert shards > 2
        assert models_of(tmp_path / "c") == shards
        fixed = fill(tmp_path / "fixed", samples)
        for key in samples:
            assert_equal(reader[key], fixed[key])

    def test_of_a_writer_that_was_killed(self, tmp_path):
        """Found between the frames of a shard that has no index."""
        path, samples = tmp_path / "c", some()
        child = os.fork()
        if child == 0:
            writer = cache.Writer(path, vocab_size=V, temperatures=(1.0, 2.0), tier="compact")
            for key, targets in samples.items():
                writer.write(key, targets, torch.arange(len(targets.ids)))
            writer.commit()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(list(path.glob("*.open"))) == 1
        fixed = fill(tmp_path / "fixed", samples)
        for _ in range(2):
            reader = cache.Reader(path)
            for key in samples:
                assert_equal(reader[key], fixed[key])
            cache.repair(path)
        assert not list(path.glob("*.open"))

    @pytest.mark.parametrize("where", ["header", "payload"])
    @pytest.mark.parametrize("copies", [(0,), (1,), (0, 1)])
    def test_that_are_damaged(self, tmp_path, where, copies):
        path, samples = tmp_path / "c", some()
        content = {key: fill(path, samples, tier="compact")[key] for key in samples}
        (shard,) = path.glob("*.shard")
        raw = bytearray(shard.read_bytes())
        first = raw.index(b"KDFM")
        for at in (first, raw.index(b"KDFM", first + 1)):
            if (0 if at == first else 1) in copies:
                raw[at + (6 if where == "header" else 90)] ^= 16
        shard.write_bytes(raw)
        assert len(cache.verify(path).faults) >= len(copies)
        reader = cache.Reader(path)
        if len(copies) == 1:
            for key in samples:
                assert_equal(reader[key], content[key])
        else:
            with pytest.raises(CacheError, match="sample 2"):
                reader["sample 2"]
        done = cache.repair(path)
        assert bool(done.lost) == (len(copies) == 2)
        assert not cache.verify(path).faults
        left = cache.Reader(path)
        assert list(left) == ([] if len(copies) == 2 else list(samples))
        for key in left:
            assert_equal(left[key], content[key])

    def test_are_merged(self, tmp_path):
        samples = some(6)
        parts = [dict(list(samples.items())[i::3]) for i in range(3)]
        for i, part in enumerate(parts):
            fill(tmp_path / str(i), part, tier="compact" if i < 2 else "fixed")
        cache.merge([tmp_path / str(i) for i in range(3)], tmp_path / "all")
        reader = cache.Reader(tmp_path / "all")
        assert models_of(tmp_path / "all") == 2
        for i, part in enumerate(parts):
            for key in part:
                assert_equal(reader[key], cache.Reader(tmp_path / str(i))[key])


def test_an_unknown_tier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tier must be one of 'fixed', 'compact', got 'small'"):
        fill(tmp_path / "c", some(1), tier="small")
