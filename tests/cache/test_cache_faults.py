"""What the system refuses is no damage, damage is told of, and what is no file keeps nobody waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kdfast import CacheError, cache, soft_targets

V = 50


def targets(tokens=4):
    return soft_targets(torch.randn(tokens, V), k=6, temperatures=(1.0, 2.0))


@pytest.fixture
def shards(tmp_path):
    """A cache of three samples, each by a writer of its own, and its shards."""
    for name in "abc":
        with cache.Writer(tmp_path / "c", vocab_size=V) as writer:
            writer.write(name, targets())
    return sorted((tmp_path / "c").glob("*.shard"))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def missing_of(folder):
    with cache.Writer(folder, vocab_size=V) as writer:
        return writer.missing("abc")


@pytest.mark.parametrize("what", ["shard", "journal"])
def test_what_the_system_refuses_is_raised(shards, what):
    """A link to itself stands for every error of opening but that there is no such file: who may do all sees it too."""
    file = shards[1] if what == "shard" else next(shards[0].parent.glob("*.journal"))
    kept = file.read_bytes()
    file.unlink()
    file.symlink_to(file.name)
    for call in (missing_of, cache.Reader):
        with pytest.raises(CacheError, match="symbolic links") as raised:
            call(shards[0].parent)
        assert raised.value.code == "system"
    file.unlink()
    file.write_bytes(kept)
    assert missing_of(shards[0].parent) == []


def test_no_descriptor_is_left(shards, tmp_path):
    """Wherever the limit is reached, from the header to the last shard: an error, and no sample that seems missing."""
    program = """
import json, os, resource, sys
from kdfast import CacheError, cache
cache.Writer(sys.argv[2], vocab_size=50, temperatures=[2.0]).close()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
codes = []
for spare in range(4):
    free = os.dup(0); os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
    try:
        writer = cache.Writer(sys.argv[1], vocab_size=50)
        found = writer.missing("abc")
    except CacheError as error:
        found = error.code
    except OSError as error:
        found = "system"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    codes.append(found)
print(json.dumps(codes))
"""
    command = [sys.executable, "-P", "-c", program, str(shards[0].parent), str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    codes = json.loads(done.stdout)
    assert codes[0] == "system"
    assert codes[-1] == []
    assert all(found in ("system", []) for found in codes)


def test_what_the_index_has_is_not_missing(shards):
    written = [t.ids.tolist() for t in cache.Reader(shards[0].parent).read("abc")]
    flip(shards[1], -5)  # in its tail, of which nobody needs anything
    writer = cache.Writer(shards[0].parent, vocab_size=V)
    assert writer.missing("abc") == []
    writer.close()
    assert [t.ids.tolist() for t in cache.Reader(shards[0].parent).read("abc")] == written
    (fault,) = cache.verify(shards[0].parent).faults
    assert (fault.code, fault.path) == ("checksum", str(shards[1]))
    assert cache.repair(shards[0].parent).kept == 1
    assert cache.verify(shards[0].parent).faults == []


def test_damage_is_warned_of_and_missing(shards):
    for index in shards[0].parent.glob("*.index"):
        index.unlink()
    flip(shards[1], -5)
    with pytest.warns(
        UserWarning, match=rf"damaged, and what it held counts as missing until a repair: .*{shards[1].name}"
    ) as said:
        writer = cache.Writer(shards[0].parent, vocab_size=V)
    assert said[0].filename == __file__
    (lost,) = writer.missing("abc")
    writer.write(lost, targets())
    assert writer.missing("abc") == []
    writer.close()
    cache.repair(shards[0].parent)
    assert sorted(cache.Reader(shards[0].parent)) == ["a", "b", "c"]


def test_no_space_is_left_for_a_new_cache(tmp_path):
    program = """
import resource, signal, sys
from kdfast import CacheError, cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    cache.Writer(sys.argv[1], vocab_size=50, temperatures=[2.0])
except CacheError as error:
    print(error.code)
"""
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "c")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["system"]
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file(shards, kind):
    shards[1].unlink()
    os.mkfifo(shards[1]) if kind == "pipe" else shards[1].mkdir()
    program = "import sys; from kdfast import cache; cache.Reader(sys.argv[1])"
    command = [sys.executable, "-P", "-c", program, str(shards[0].parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "this is no file but something else" in done.stderr
    with pytest.warns(UserWarning, match="this is no file but something else"):
        assert len(missing_of(shards[0].parent)) == 1
