"""A reader's descriptors: few, whatever the number of shards; and files that go while it has them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SEED

from kdfast import CacheError, cache, soft_targets

V = 50
SHARDS = 90


def fill(path, n=SHARDS):
    with cache.Writer(path, vocab_size=V, shard_bytes=1) as writer:
        for i in range(n):
            writer.write(i, soft_targets(torch.full((3, V), 0.0).index_fill_(-1, torch.tensor([i % V]), 5.0), k=4))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("shards") / "c")


def is_right(reader, i):
    return bool((reader[i].ids[:, 0] == i % V).all())


@pytest.mark.parametrize("open_files", [None, 3, 1])
def test_no_more_than_allowed_are_open(shards, open_files):
    program = """
import json, os, resource, sys
from kdfast import cache
options = {} if sys.argv[2] == "None" else {"open_files": int(sys.argv[2])}
reader = cache.Reader(sys.argv[1], **options)
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (before + options.get("open_files", 64) + 2, before + 100))
most, right = 0, True
for _ in range(2):
    for key in reader:
        right &= bool((reader[key].ids[:, 0] == int(key) % 50).all())
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
open("/dev/null").close()  # nobody else is short of one
print(json.dumps([most, right]))
"""
    command = [sys.executable, "-P", "-c", program, str(shards), str(open_files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [open_files or 64, True]


def test_threads_that_close_each_others_files(shards):
    reader = cache.Reader(shards, open_files=2)
    keys = [random.Random(SEED + i).randrange(SHARDS) for i in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: is_right(reader, i), keys))


def test_a_forked_process(shards):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    reader = cache.Reader(shards, open_files=4)
    for i in range(10):
        assert is_right(reader, i)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(is_right(reader, i) for i in range(SHARDS)) else 1)
    assert all(is_right(reader, i) for i in range(SHARDS))
    assert os.waitpid(child, 0)[1] == 0


def test_arguments(shards):
    with pytest.raises(ValueError, match="open_files must be a whole number from 1 to 65536, got 0"):
        cache.Reader(shards, open_files=0)
    import pickle

    assert is_right(pickle.loads(pickle.dumps(cache.Reader(shards, open_files=2, read_bytes=4096))), 3)


def damaged(folder, names):
    """A bit of the first block of the samples in these shards."""
    for name in names:
        data = bytearray((folder / name).read_bytes())
        at = data.index(b"KDFR") + 120
        data[at] ^= 4
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize("open_files", [64, 1])
def test_a_repair_while_a_reader_is_open(tmp_path, read_before, open_files):
    """Samples that a repair has copied to another shard are read from there, and what it has lost is missing."""
    for some in (range(6), [6]):
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            for i in some:
                logits = torch.zeros(3, V).index_fill_(-1, torch.tensor([i]), 5.0)
                writer.write(i, soft_targets(logits, k=4, temperatures=(1.0, 2.0)))
    reader = cache.Reader(tmp_path / "c", open_files=open_files)
    if read_before:
        assert all(is_right(reader, i) for i in range(7))
    first = next(s.file for s in reader.shards() if s.samples == 6)
    damaged(tmp_path / "c", [first])
    done = cache.repair(tmp_path / "c")
    assert (done.kept, [fault.key for fault in done.lost]) == (5, ["0"])
    assert not (tmp_path / "c" / first).exists()
    assert all(is_right(reader, i) for i in range(1, 7))
    assert reader.packed([3])[0].shape == (3, 4)
    if not (read_before and open_files == 64):
        with pytest.raises(CacheError) as raised:
            reader[0]
        assert (raised.value.code, raised.value.key) == ("missing", "0")
    # And once more: what was copied is copied again.
    if open_files == 1:
        (copies,) = (s.file for s in cache.Reader(tmp_path / "c").shards() if s.samples == 5)
        damaged(tmp_path / "c", [copies])
        assert cache.repair(tmp_path / "c").kept == 4
        assert [i for i in range(2, 7) if is_right(reader, i)] == [2, 3, 4, 5, 6]


def test_another_sample_of_the_key_is_not_given_for_the_lost_one(tmp_path):
    with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        writer.write("a", soft_targets(torch.randn(3, V), k=4))
    reader = cache.Reader(tmp_path / "c")
    damaged(tmp_path / "c", [reader.shards()[0].file])
    assert cache.repair(tmp_path / "c").in_use == []  # a writer that was closed is not alive
    with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
        writer.write("a", soft_targets(torch.randn(5, V), k=4))
    with pytest.raises(CacheError, match="its key has another") as raised:
        reader["a"]
    assert raised.value.code == "missing"
    assert len(cache.Reader(tmp_path / "c")["a"].ids) == 5


def test_another_cache_at_the_same_place_is_not_read_for_this_one(tmp_path):
    """Of the same keys, tokens and lengths of frames, at other temperatures and of another vocabulary."""
    ids = torch.arange(64)

    def made(vocab_size, temperatures):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        with cache.Writer(tmp_path / "c", vocab_size=vocab_size, metadata={"v": vocab_size}) as writer:
            writer.write("a", soft_targets(torch.randn(64, vocab_size), k=32, temperatures=temperatures), ids)

    for first, second in (((512, (1, 2)), (512, (1, 4))), ((512, (1, 2)), (256, (1, 2, 3))), ((99, (1,)), (99, (1,)))):
        made(*first)
        reader = cache.Reader(tmp_path / "c")
        made(*second)
        for read in (reader.read, reader.packed):
            with pytest.raises(CacheError) as raised:
                read(["a"], [ids])
            assert (raised.value.code, raised.value.key) == ("missing", "a")


def test_a_repair_of_one_shard_and_then_of_another(tmp_path):
    with cache.Writer(tmp_path / "c", vocab_size=V, shard_bytes=1) as writer:
        for i in range(5):
            logits = torch.zeros(3, V).index_fill_(-1, torch.tensor([i]), 5.0)
            writer.write(i, soft_targets(logits, k=4))
    with cache.Writer(tmp_path / "c", vocab_size=V, shard_bytes=1 << 20) as writer:
        for i in range(5, 25):
            logits = torch.zeros(3, V).index_fill_(-1, torch.tensor([i]), 5.0)
            writer.write(i, soft_targets(logits, k=4))
    reader = cache.Reader(tmp_path / "c", open_files=1)
    lost = set()
    for _ in range(3):
        shard = max(cache.Reader(tmp_path / "c").shards(), key=lambda s: s.samples).file
        damaged(tmp_path / "c", [shard, next(s.file for s in reader.shards() if s.samples == 1)][:1])
        lost |= {int(fault.key) for fault in cache.repair(tmp_path / "c").lost}
        there = [i for i in range(25) if i not in lost]
        assert all(is_right(reader, i) for i in there)
    assert len(lost) == 3
    # What was not repaired but removed is missing, and stays so.
    next((tmp_path / "c").glob("*-000000.shard")).unlink()
    with pytest.raises(CacheError, match=r"No such file"):
        reader.read(range(25))
