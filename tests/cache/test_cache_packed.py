"""Packed targets of a cache: what a read of the same keys gives, still packed."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from cache_remote import Flaky, opened
from conftest import SEED

from kdfast import SparseTargets, cache, soft_targets

V, TEMPERATURES = 900, [1.0, 2.0, 0.5]


def targets(tokens, k, kind):
    """Of one kind; some tokens, the first half or every third, have large differences, which take more bytes."""
    logits = torch.randn(tokens, V) * 3
    logits[slice(tokens // 2) if kind == "uneven" else slice(None, None, 3)] *= torch.linspace(1, 60, V)
    method = {"method": "topp", "p": 0.9} if kind == "ragged" else {}
    made = soft_targets(logits, k=k, temperatures=TEMPERATURES, **method)
    gold = -torch.rand(tokens) if kind == "gold" else None
    return SparseTargets(
        made.ids, made.logprobs, vocab_size=V, lse=made.lse, k_eff=made.k_eff, method=made.method, gold_logprob=gold
    )


KEYS = {f"{kind} {k} {tokens}": (tokens, k, kind)
        for kind in ("plain", "ragged", "gold") for k in (1, 16, 33) for tokens in (0, 1, 200, 700)}  # fmt: skip
LARGE, UNEVEN = "large", "uneven"  # in memory of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "c"
    torch.manual_seed(SEED)
    with cache.Writer(path, vocab_size=V, temperatures=TEMPERATURES, shard_bytes=1 << 17) as writer:
        for key, what in KEYS.items():
            writer.write(key, targets(*what))
        writer.write(LARGE, targets(6000, 64, "plain"))
        writer.write(UNEVEN, targets(6000, 64, "uneven"))
    return path


def selections(rng):
    chosen = [*rng.choices(list(KEYS), k=25), LARGE]
    rng.shuffle(chosen)
    out = []
    for key in chosen:
        tokens = 6000 if key == LARGE else KEYS[key][0]
        start = rng.randrange(tokens + 1)
        out.append(rng.choice([key, (key, slice(start, start + rng.randrange(300)))]))
    return out


def assert_is(packed, read):
    """The same bits, in the same fields."""
    unpacked = packed.unpack()
    for one in (unpacked, packed):
        assert one.temperatures == read.temperatures
        assert (one.k_eff is None) == (read.k_eff is None)
        assert one.k_eff is None or torch.equal(one.k_eff, read.k_eff)
        assert (one.gold_logprob is None) == (read.gold_logprob is None)
        assert one.gold_logprob is None or torch.equal(one.gold_logprob, read.gold_logprob)
    assert torch.equal(unpacked.ids, read.ids)
    assert torch.equal(unpacked.logprobs, read.logprobs)
    for t in TEMPERATURES:
        assert torch.equal(unpacked.lse[t], read.lse[t])
    assert packed.data.numel() % 4 == 0


def test_packed_is_what_read_gives(folder):
    rng = random.Random(SEED)
    reader = cache.Reader(folder)
    kept = []
    for _ in range(12):
        wanted = selections(rng)
        got, expected = reader.packed(wanted), reader.read(wanted)
        for packed, read in zip(got, expected, strict=True):
            assert_is(packed, read)
        kept.append((got, expected))
    # Memory that later calls were given is not theirs.
    for got, expected in kept:
        for packed, read in zip(got, expected, strict=True):
            assert_is(packed, read)


def test_packed_takes_more_than_its_share_of_a_sample(folder):
    reader = cache.Reader(folder)
    wanted = [(UNEVEN, slice(0, 3000)), (UNEVEN, slice(3000, 6000)), UNEVEN]
    first, second, _ = got = reader.packed(wanted)
    assert first.data.numel() > 1.3 * second.data.numel() > 1.3 * (256 << 10)
    for packed, read in zip(got, reader.read(wanted), strict=True):
        assert_is(packed, read)


def test_packed_outlives_its_reader_and_its_neighbours(folder):
    reader = cache.Reader(folder)
    wanted = [LARGE, ("plain 33 700", slice(100, 400))]
    expected, got = reader.read(wanted), reader.packed(wanted)
    one = got[1]
    del reader, got
    for again in (one, copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one[torch.arange(300)]):
        assert_is(again, expected[1])


def test_packed_of_another_place(folder, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setattr(Flaky, "log", tmp_path / "log", raising=False)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    remote, here = opened(f"flaky://{folder}", tmp_path), cache.Reader(folder)
    wanted = selections(random.Random(SEED + 1))
    for packed, read in zip(remote.packed(wanted), here.read(wanted), strict=True):
        assert_is(packed, read)


def test_packed_of_nothing_and_of_another_tier(tmp_path):
    with cache.Writer(tmp_path / "c", vocab_size=V, tier="compact") as writer:
        writer.write("a", soft_targets(torch.randn(9, V), k=4))
    reader = cache.Reader(tmp_path / "c")
    assert reader.packed([]) == []
    with pytest.raises(ValueError, match="'a' is of the compact tier: only the fixed tier"):
        reader.packed(["a"])
