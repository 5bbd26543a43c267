"""The index of a directory in use: what it costs, what it says beside the shards, and who makes it when."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SEED

from kdfast import SparseTargets, cache

V = 50
MANY = 100_000


def targets(number):
    """Of two tokens, whose first entry says which sample it is."""
    ids = torch.tensor([[number % V, (number + 1) % V], [number // V % V, (number // V + 1) % V]]).int()
    return SparseTargets(ids, torch.tensor([[-0.5, -2.0]] * 2), vocab_size=V, lse={1.0: torch.zeros(2)})


def fill(path, numbers, **options):
    with cache.Writer(path, vocab_size=V, threads=1, **options) as writer:
        for number in numbers:
            writer.write(number, targets(number), [number, 0])
    return path


def is_right(reader, number):
    return reader[number].ids[:, 0].tolist() == [number % V, number // V % V]


def index_files(path):
    return sorted(path.glob("*.index"))


def without_index(path, to):
    shutil.copytree(path, to, ignore=shutil.ignore_patterns("*.index"))
    return to


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("many") / "c", range(MANY), shard_bytes=600_000)


OPENED = """
import json, sys
from pathlib import Path
from kdfast import cache, _core
def private():
    return sum(int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
               if line.startswith("Private_"))
before = private()
reader = cache.Reader(sys.argv[1])
taken = private() - before
print(json.dumps([taken, len(reader), len(reader.shards()), reader.indexed_shards]))
"""


def opened(path):
    done = subprocess.run([sys.executable, "-P", "-c", OPENED, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_opening_takes_no_memory_for_samples(many, tmp_path):
    taken, samples, shards, indexed = opened(many)
    assert (samples, indexed) == (MANY, shards)
    assert 20 < shards <= 200
    assert taken < 2048  # KiB
    taken, samples, shards, indexed = opened(without_index(many, tmp_path / "c"))
    assert (samples, indexed) == (MANY, 0)
    assert taken > 6000


def test_all_that_is_read_is_right(many):
    reader, rng = cache.Reader(many), random.Random(SEED)
    assert list(reader) == [str(i) for i in range(MANY)]
    for number in rng.sample(range(MANY), 2000):
        assert is_right(reader, number)
    for number in rng.sample(range(MANY, 10 * MANY), 500):
        assert number not in reader
    asked = rng.sample(range(2 * MANY), 5000)
    with cache.Writer(many, vocab_size=V) as writer:
        assert writer.missing(asked) == [number for number in asked if number >= MANY]


def test_missing_is_what_is_not_in(tmp_path):
    path = fill(tmp_path / "c", range(0, 300, 3), shard_bytes=2000)
    index_files(path)[0].unlink()
    fill(path, range(300, 330), shard_bytes=2000)  # which makes one of all
    writer = cache.Writer(path, vocab_size=V)
    writer.write("on its way", targets(1))
    keys = [*range(340), "0", "1", "on its way", "\N{SNOWMAN}", 10**30, 3, 3, 4, 4]
    random.Random(SEED).shuffle(keys)
    assert writer.missing(keys) == [key for key in keys if key not in writer]
    assert writer.missing(iter(keys)) == writer.missing(tuple(keys))
    assert writer.missing([]) == []
    for wrong in (1.5, None, b"key"):
        with pytest.raises(TypeError):
            writer.missing([*keys, wrong])
    with pytest.raises(ValueError, match="UTF-8"):
        writer.missing(["\ud800"])
    writer.close()


def test_one_writer_after_the_other(tmp_path):
    """The files of the index stay few, and a reader keeps those that it has."""
    path = fill(tmp_path / "c", range(100))
    readers = [(100, cache.Reader(path))]
    for number in range(100, 160):
        fill(path, [number])
        assert len(index_files(path)) <= 4
        if number % 20 == 0:
            readers.append((number + 1, cache.Reader(path)))
    for samples, reader in [*readers, (160, cache.Reader(path))]:
        assert len(reader) == samples
        assert reader.indexed_shards == len(reader.shards())
        assert sorted(map(int, reader)) == list(range(samples))
        assert all(is_right(reader, number) for number in range(samples))
        assert 160 not in reader
    assert json.loads((path / "manifest.json").read_text())["samples"] == 160
    assert cache.verify(path).faults == []


def test_an_index_that_was_given_up_is_told(tmp_path):
    """A page is damaged under a reader, which then has every key in memory."""
    reader = cache.Reader(fill(tmp_path / "c", range(200)))
    assert reader.indexed_shards == len(reader.shards()) > 0
    for file in (tmp_path / "c").glob("*.index"):
        data = bytearray(file.read_bytes())
        for at in range(100, len(data), 64):
            data[at] ^= 1
        with file.open("r+b") as same:  # whose file the reader has open
            same.write(data)
    assert "150" in reader
    assert reader.indexed_shards == 0


def test_the_keys_of_a_reader_after_a_repair(tmp_path):
    """A reader that was there before says what it said, by the copies."""
    path = fill(tmp_path / "c", range(40), shard_bytes=2000)
    reader = cache.Reader(path)
    keys = list(reader)
    shard = sorted(path.glob("*.shard"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1  # in its tail: nothing is lost
    shard.write_bytes(data)
    assert cache.repair(path).lost == []
    assert not shard.exists()
    assert sorted(reader) == sorted(keys)
    assert all(key in reader and is_right(reader, int(key)) for key in reader)
    assert cache.Reader(path).indexed_shards == len(cache.Reader(path).shards())
    next(path.glob("*.shard")).unlink()  # which no repair has done
    with pytest.raises(cache.CacheError, match="No such file"):
        list(cache.Reader(path))


def test_a_key_that_two_writers_had(tmp_path):
    path = tmp_path / "c"
    one, two = (cache.Writer(path, vocab_size=V, temperatures=[1.0]) for _ in range(2))
    for writer in (one, two):
        for number in range(10):
            writer.write(number, targets(number), [number, 0])
    two.write("same key", targets(1), [1, 0])
    one.write("same key", targets(2), [2, 0])
    one.close()
    two.close()
    three = fill(path, range(5, 15))
    plain = cache.Reader(without_index(three, tmp_path / "d"))
    reader = cache.Reader(path)
    assert reader.indexed_shards == 3
    assert len(reader) == len(plain) == 16
    assert list(reader) == list(plain)
    assert all(is_right(reader, number) for number in range(15))
    for each in (reader, plain):
        with pytest.raises(cache.CacheError, match="written twice") as raised:
            each["same key"]
        assert raised.value.code == "duplicate"
    with cache.Writer(path, vocab_size=V) as writer:
        assert writer.missing([*range(16), "same key"]) == [15]
    assert [fault.code for fault in cache.verify(path).faults] == ["duplicate"]


TURNS = """
import sys
import torch
from kdfast import SparseTargets, cache
for turn in range(8):
    with cache.Writer(sys.argv[1], vocab_size=50, threads=1) as writer:
        for number in range(int(sys.argv[2]) + 5 * turn, int(sys.argv[2]) + 5 * turn + 5):
            a, b = number % 50, number // 50 % 50
            ids = torch.tensor([[a, (a + 1) % 50], [b, (b + 1) % 50]]).int()
            logprobs = torch.tensor([[-0.5, -2.0]] * 2)
            writer.write(number, SparseTargets(ids, logprobs, vocab_size=50, lse={1.0: torch.zeros(2)}))
"""


def test_writers_end_while_readers_open(tmp_path):
    path = fill(tmp_path / "c", range(20))
    command = [sys.executable, "-P", "-c", TURNS, str(path)]
    processes = [subprocess.Popen([*command, str(1000 * (i + 1))]) for i in range(3)]
    seen = 0
    while any(process.poll() is None for process in processes):
        reader = cache.Reader(path)
        assert len(reader) >= seen
        seen = len(reader)
        assert all(is_right(reader, number) for number in range(20))
    for process in processes:
        assert process.wait() == 0
    reader = cache.Reader(path)
    assert len(reader) == 20 + 3 * 40
    assert reader.indexed_shards == len(reader.shards())
    assert all(is_right(reader, int(key)) for key in reader)
    assert cache.verify(path).faults == []
    assert not list(path.glob("*.temporary"))


def test_a_folder_without_permission_or_space(tmp_path, monkeypatch):
    """What a writer has written is there, and its error is told."""
    path = fill(tmp_path / "c", range(10))
    program = """
import resource, signal, sys
from pathlib import Path
from kdfast import CacheError, SparseTargets, cache
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = cache.Writer(sys.argv[1], vocab_size=50, threads=1)
ids = torch.zeros(0, 1, dtype=torch.int32)
writer.write("new", SparseTargets(ids, ids.float(), vocab_size=50, lse={1.0: torch.zeros(0)}))
writer.commit()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # less than an index takes
try:
    writer.close()
except CacheError as error:
    print(error.code, error.__cause__.errno)
"""
    command = [sys.executable, "-P", "-c", program, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["system", "27"]
    assert not list(path.glob("*.temporary"))
    reader = cache.Reader(path)
    assert (len(reader), reader.indexed_shards) == (11, 1)
    assert "new" in reader
    with cache.Writer(path, vocab_size=V):
        pass
    assert cache.Reader(path).indexed_shards == 2


def test_info_says_how_far_it_goes(tmp_path):
    path = fill(tmp_path / "c", range(10), shard_bytes=1)
    command = [sys.executable, "-m", "kdfast", "cache", "info", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.path.dirname(path))
    held = json.loads(done.stdout)
    assert (held["indexed_shards"], len(held["shards"])) == (10, 10)
    done = subprocess.run(command[:-1], capture_output=True, text=True, check=True, cwd=os.path.dirname(path))
    assert "has the samples of 10 of 10 shards, 0.0 MiB" in done.stdout
