"""Shards of remote caches in the local folder: its bound, its sharing by processes, and prefetching."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader

fsspec = pytest.importorskip("fsspec", reason="the remote extra is not installed")

from cache_remote import assert_same, fetched, kept, opened, sizes  # noqa: E402

from kdfast import CacheError, cache  # noqa: E402
from kdfast.cache.remote.background import Background  # noqa: E402
from kdfast.cache.remote.store import ShardStore  # noqa: E402


def _read_all(url, local, bound, results):
    reader = cache.Reader(url, local_cache=local, local_bytes=bound)
    order = torch.randperm(6).tolist()
    results.put({i: reader[f"sample {i}"].logprobs.double().sum().item() for i in order})


class TestBounds:
    def test_shards_used_longest_ago_leave_and_come_again(self, source, flaky, tmp_path):
        bound = int(2.5 * max(sizes(source)))
        reader, local = opened(f"flaky://{source}", tmp_path, local_bytes=bound), cache.Reader(source)
        ids = [f"{shard_id:016x}.shard" for *_, shard_id, _ in reader._engine.shards]
        for i in (0, 1, 0, 2):
            assert_same(reader[f"sample {i}"], local[f"sample {i}"])
        assert kept(tmp_path) == sorted([ids[0], ids[2]])
        assert_same(reader["sample 1"], local["sample 1"])
        assert len(fetched(flaky.log)) == 4
        for got, key in zip(reader.read(list(local)), local, strict=True):
            assert_same(got, local[key])
        assert sum(file.stat().st_size for file in (tmp_path / "local" / "shards").iterdir()) <= bound

    def test_a_shard_beyond_the_bound(self, source, flaky, tmp_path):
        with pytest.raises(CacheError, match="does not fit into local_bytes"):
            opened(f"flaky://{source}", tmp_path, local_bytes=1000)["sample 0"]

    def test_a_shard_in_use_stays(self, tmp_path):
        store = ShardStore(str(tmp_path), 1000)

        def fetch(name):
            return store.fetch(name, 400, lambda fd: os.pwrite(fd, b"x" * 400, 0), lambda path: None)

        held = fetch("a")
        fetch("b").close()
        fetch("c").close()
        assert sorted(os.listdir(tmp_path)) == ["a.shard", "c.shard"]
        held.close()
        fetch("d").close()
        assert sorted(os.listdir(tmp_path)) == ["c.shard", "d.shard"]

    def test_what_a_killed_process_left_is_taken_over_or_makes_room(self, tmp_path):
        store = ShardStore(str(tmp_path), 1000)
        for name in ("a", "b"):
            (tmp_path / f"{name}.part").write_bytes(b"y" * 400)
        store.fetch("a", 400, lambda fd: os.pwrite(fd, b"x" * 400, 0), lambda path: None).close()
        assert (tmp_path / "a.shard").read_bytes() == b"x" * 400
        store.fetch("c", 600, lambda fd: None, lambda path: None).close()
        assert sorted(os.listdir(tmp_path)) == ["a.shard", "c.shard"]

    @pytest.mark.parametrize("room", [10, 1.5])
    def test_processes_share_what_one_has_fetched(self, source, flaky, tmp_path, room):
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        arguments = (f"flaky://{source}", tmp_path / "local", int(room * max(sizes(source))), results)
        processes = [context.Process(target=_read_all, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        got = [results.get(timeout=120) for _ in processes]
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
        local = cache.Reader(source)
        expected = {i: local[f"sample {i}"].logprobs.double().sum().item() for i in range(6)}
        assert got == [expected] * 4
        assert flaky.log.read_text().count("cache.header") == 1
        assert len(kept(tmp_path)) == (6 if room == 10 else 1)
        if room == 10:
            assert len(fetched(flaky.log)) == 6

    def test_workers_of_a_data_loader(self, source, tmp_path):
        reader, local = opened(f"file://{source}", tmp_path), cache.Reader(source)
        reader.prefetch(["sample 0"])  # a thread in the parent is none in a worker
        reader["sample 0"]
        samples = [{"id": f"sample {i}", "input_ids": torch.full((400,), i)} for i in range(6)]
        data = cache.Dataset(reader, samples)
        loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=cache.collate)
        got = [batch["targets"].logprobs for batch in loader]
        assert torch.equal(torch.cat(got), torch.stack([local[f"sample {i}"].logprobs for i in range(6)]))


class TestPrefetch:
    def test_what_was_prefetched_is_not_fetched_by_the_read(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path)
        reader.prefetch([f"sample {i}" for i in range(4)])
        for i in range(4):
            reader._remote._background().wait(i)
        done = len(fetched(flaky.log))
        for i in range(4):  # which one was begun by then is a matter of threads, but none is fetched twice
            reader[f"sample {i}"]
        assert done <= len(fetched(flaky.log)) == 4
        assert not [name for name in kept(tmp_path) if name.endswith(".part")]

    def test_the_read_waits_for_what_has_begun(self, source, flaky, tmp_path):
        begun, go_on = threading.Event(), threading.Event()

        def slow(name, start, data):
            if threading.current_thread().name == "kdfast prefetch":
                begun.set()
                assert go_on.wait(60)
            return data

        reader = opened(f"flaky://{source}", tmp_path)
        flaky.spoil = slow
        reader.prefetch(["sample 3"])
        assert begun.wait(60)
        threading.Timer(0.1, go_on.set).start()
        assert_same(reader["sample 3"], cache.Reader(source)["sample 3"])
        assert len(fetched(flaky.log)) == 1

    def test_it_is_bounded(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path, local_bytes=int(4.5 * max(sizes(source))))
        assert len(reader._remote._fitting(range(6))) == 2

    def test_an_error_surfaces_at_the_read_and_the_next_tries_again(self, source, flaky, tmp_path):
        raised = threading.Event()

        def fail(name, start, data):
            raised.set()
            msg = "the line is dead"
            raise ConnectionResetError(msg)

        reader = opened(f"flaky://{source}", tmp_path)
        flaky.spoil = fail
        reader.prefetch(["sample 0"])
        assert raised.wait(60)
        flaky.spoil = None
        with pytest.raises(ConnectionResetError, match="the line is dead"):
            reader["sample 0"]
        assert_same(reader["sample 0"], cache.Reader(source)["sample 0"])

    def test_a_key_that_is_not_there(self, source, flaky, tmp_path):
        for reader in (cache.Reader(source), opened(f"flaky://{source}", tmp_path)):
            with pytest.raises(CacheError, match="no sample has this key"):
                reader.prefetch(["another"])

    @pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
    def test_a_local_cache_advises_the_system(self, source, monkeypatch):
        advised = []
        monkeypatch.setattr(os, "posix_fadvise", lambda _, *advice: advised.append(advice))
        reader = cache.Reader(source)
        reader.prefetch(["sample 2", ("sample 0", slice(0, 10))])
        assert len(advised) == 2
        for offset, length, advice in advised:
            assert advice == os.POSIX_FADV_WILLNEED
            assert 0 < offset < offset + length < max(sizes(source))

    def test_what_was_not_begun_gives_way(self):
        started, go_on, done = threading.Event(), threading.Event(), []

        def work(item):
            started.set()
            assert go_on.wait(60)
            done.append(item)

        background = Background(work, threads=1)
        background.ask([0, 1, 2], keep=False)
        assert started.wait(60)
        background.ask([3, 4], keep=False)
        background.wait(4)  # not begun: the caller's now
        go_on.set()
        background.wait(0)
        for _ in range(600):
            if len(done) == 2:
                break
            threading.Event().wait(0.1)
        assert done == [0, 3]
