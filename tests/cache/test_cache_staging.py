"""The queue of samples on their way from a GPU, with copies that arrive when the test says so."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from machine import VARIANTS

from kdfast import cache, soft_targets
from kdfast.cache.staging import Staging

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the compiled extension is not there")

V = 50


class Event:
    def __init__(self, late):
        self.late = late
        self.waited = False

    def query(self):
        return not self.late

    def synchronize(self):
        self.waited = self.waited or self.late
        self.late = False


class Copier:
    """Copies at once, and says that they arrive later."""

    def __init__(self):
        self.late = True
        self.events = []

    def __call__(self, targets, token_ids):
        self.events.append(Event(self.late))
        return targets.map(torch.clone), token_ids, self.events[-1]


def keys(arrived):
    return [staged.key for staged in arrived]


def test_order_and_bound():
    copier = Copier()
    staging = Staging(copier=copier, depth=3)
    targets = soft_targets(torch.randn(2, V), k=4)
    for k in range(3):
        staging.put(str(k), targets, None, None)
    assert keys(staging.arrived()) == []
    assert "1" in staging
    assert not any(event.waited for event in copier.events)
    staging.put("3", targets, None, None)  # one too many: the oldest is waited for, and only that
    assert keys(staging.arrived()) == ["0"]
    assert [event.waited for event in copier.events] == [True, False, False, False]
    copier.events[2].late = False  # this one is done, and waits for the one before it
    assert keys(staging.arrived()) == []
    staging.put("4", targets, None, None)
    assert keys(staging.arrived()) == ["1", "2"]
    assert not copier.events[2].waited
    assert keys(staging.arrived(everything=True)) == ["3", "4"]
    assert all(event.waited for event in copier.events[3:])
    assert "4" not in staging


def through_staging(monkeypatch, writer):
    """Makes the writer treat every sample as one of a GPU."""
    copier = Copier()
    writer._staging = Staging(copier=copier)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return copier


def test_the_cache_is_the_same(monkeypatch, tmp_path):
    samples = {f"s{k}": (soft_targets(torch.randn(7, V), k=8), torch.randint(V, (7,))) for k in range(20)}
    with cache.Writer(tmp_path / "straight", vocab_size=V) as writer:
        for key, (targets, ids) in samples.items():
            writer.write(key, targets, ids)
    with monkeypatch.context() as patch, cache.Writer(tmp_path / "staged", vocab_size=V) as writer:
        through_staging(patch, writer)
        for k, (key, (targets, ids)) in enumerate(samples.items()):
            assert writer.write(key, targets, ids)
            assert key in writer
            assert not writer.write(key, targets, ids)  # still on its way, and the same
            if k == 9:
                assert writer.commit() == 10
        assert writer.missing(["s3", "s19", "other"]) == ["other"]
    a, b = cache.Reader(tmp_path / "straight"), cache.Reader(tmp_path / "staged")
    assert sorted(a.keys()) == sorted(b.keys())
    for key, (_, ids) in samples.items():
        (x,), (y,) = a.read([key], [ids]), b.read([key], [ids])
        assert torch.equal(x.ids, y.ids)
        assert torch.equal(x.logprobs, y.logprobs)


def test_a_conflict_is_raised_on_the_way_or_at_the_end(monkeypatch, tmp_path):
    targets, ids = soft_targets(torch.randn(7, V), k=8), torch.arange(7)

    def write():
        with monkeypatch.context() as patch, cache.Writer(tmp_path / "cache", vocab_size=V) as writer:
            through_staging(patch, writer)
            writer.write("twice", targets, ids)
            writer.write("twice", targets, ids + 1)
            writer.write("once", targets, ids)

    with pytest.raises(cache.CacheError, match="twice"):
        write()
    assert sorted(cache.Reader(tmp_path / "cache").keys()) == ["once", "twice"]


def test_an_error_leaves_nothing_behind(monkeypatch, tmp_path):
    targets, ids = soft_targets(torch.randn(7, V), k=8), torch.arange(7)
    with monkeypatch.context() as patch, cache.Writer(tmp_path / "cache", vocab_size=V) as writer:
        copier = through_staging(patch, writer)
        writer.write("a", targets, ids)
        writer.write("b", targets, ids[:3])  # found when it arrives
        writer.write("c", targets, ids)
        copier.late = False
        with pytest.raises(ValueError, match="'b'"):
            writer.commit()
        assert writer.commit() == 2


def test_a_writer_is_gone_when_it_is_let_go(tmp_path):
    """Nothing refers back to it, so that its journal's lock does not wait for the garbage collector."""
    writer = cache.Writer(tmp_path / "cache", vocab_size=V)
    writer.write("a", soft_targets(torch.randn(7, V), k=8))
    here = weakref.ref(writer)
    gc.disable()
    try:
        writer.close()
        del writer
        assert here() is None
    finally:
        gc.enable()


def test_temperatures_are_those_of_the_first_sample(monkeypatch, tmp_path):
    with monkeypatch.context() as patch, cache.Writer(tmp_path / "cache", vocab_size=V) as writer:
        through_staging(patch, writer)
        writer.write("a", soft_targets(torch.randn(7, V), k=8, temperatures=(1.0, 2.0)))
        with pytest.raises(ValueError, match=r"captured at temperatures 1\.0, the cache holds"):
            writer.write("b", soft_targets(torch.randn(7, V), k=8))
