"""Caches sent elsewhere: what is sent again, what readers see meanwhile, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

fsspec = pytest.importorskip("fsspec", reason="the remote extra is not installed")

from cache_remote import V, assert_same, fill, opened, sizes  # noqa: E402

from kdfast import CacheError, cache, soft_targets  # noqa: E402
from kdfast.cache.remote.files import RemoteFiles  # noqa: E402


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_what_is_there_is_not_sent_again(scheme, source, memory, tmp_path):
    url = memory if scheme == "memory" else f"file://{tmp_path}/remote"
    first = cache.push(source, url)
    assert (first.sent, first.sent_bytes, first.there_already, first.samples) == (6, sum(sizes(source)), 0, 6)
    assert cache.push(source, url) == (0, 0, 6, 6)
    fill(source, samples=2, first=6)
    assert cache.push(source, url)[:1] + cache.push(source, url)[2:] == (2, 8, 8)
    assert len(opened(url, tmp_path)) == 8


def test_an_interrupted_push_goes_on_and_nobody_sees_it_before(source, memory, tmp_path, monkeypatch):
    send, sent = RemoteFiles.send, []

    def interrupted(self, local, name):
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(name)
        send(self, local, name)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFiles, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.push(source, memory)
    with pytest.raises(CacheError, match="no cache is there"):
        opened(memory, tmp_path)
    assert cache.push(source, memory) == (3, sum(sizes(source)[3:]), 3, 6)


def test_part_of_a_shard_is_sent_again(source, tmp_path):
    url = f"file://{tmp_path}/remote"
    cache.push(source, url)
    name = cache.Reader(source).shards()[2].file
    (tmp_path / "remote" / name).write_bytes((source / name).read_bytes()[:100])
    assert cache.push(source, url).sent == 1
    assert (tmp_path / "remote" / name).read_bytes() == (source / name).read_bytes()


def test_an_open_shard_goes_when_it_is_finished(tmp_path, memory):
    source = tmp_path / "source"
    with cache.Writer(source, vocab_size=V, shard_bytes=30000) as writer:
        for i in range(3):
            writer.write(i, soft_targets(torch.randn(400, V), k=32))
        writer.commit()
        assert cache.push(source, memory).samples == 2
        assert sorted(opened(memory, tmp_path)) == ["0", "1"]
    assert cache.push(source, memory).samples == 3
    assert len(opened(memory, tmp_path)) == 3


def test_a_repaired_cache_takes_the_place_of_what_it_was(source, memory, tmp_path):
    cache.push(source, memory)
    old = opened(memory, tmp_path)
    shard = source / cache.Reader(source).shards()[0].file
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    cache.repair(source)
    cache.push(source, memory)
    assert_same(old["sample 3"], opened(memory, tmp_path)["sample 3"])
    assert set(opened(memory, tmp_path)) == set(cache.Reader(source))


def test_a_damaged_shard_is_not_sent(source, memory):
    shard = source / cache.Reader(source).shards()[0].file
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="checksum"):
        cache.push(source, memory)
    assert fsspec.filesystem("memory").find("/caches") == []


@pytest.mark.parametrize("manifest", [True, False])
def test_another_cache_is_not_overwritten(source, memory, tmp_path, manifest):
    cache.push(source, memory)
    if not manifest:
        fsspec.filesystem("memory").rm_file("/caches/one/manifest.json")
    before = {name: file.getvalue() for name, file in fsspec.filesystem("memory").store.items()}
    other = fill(tmp_path / "other", teacher="another")
    with pytest.raises(CacheError, match="header differs"):
        cache.push(other, memory)
    if manifest:
        with pytest.raises(CacheError, match="a shard that this one has not"):
            cache.push(fill(tmp_path / "same header"), memory)
    assert {name: file.getvalue() for name, file in fsspec.filesystem("memory").store.items()} == before


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("again", [False, True])
def test_two_at_once(scheme, again, source, memory, tmp_path, monkeypatch):
    """Another manifest appears after ours was read: ours is not put."""
    url = memory if scheme == "memory" else f"file://{tmp_path}/remote"
    if again:
        cache.push(source, url)
        fill(source, samples=1, first=6)
    send = RemoteFiles.send
    theirs = b'{"theirs": 1}'

    def meanwhile(self, local, name):
        send(self, local, name)
        self._fs.pipe_file(self._at("manifest.json"), theirs)

    monkeypatch.setattr(RemoteFiles, "send", meanwhile)
    with pytest.raises(CacheError, match="push again"):
        cache.push(source, url)
    assert RemoteFiles(url).read_if_there("manifest.json") == theirs


def test_command(source, tmp_path):
    main = "from kdfast.cli import main; main()"
    command = [sys.executable, "-c", main, "cache", "push", str(source), f"file://{tmp_path}/remote"]

    def run(arguments):  # sees the installed package, not the folder that the tests are run from
        return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)

    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 shards sent")
    done = run([*command[:-2], str(tmp_path), command[-1]])
    assert done.returncode == 1
    assert "error:" in done.stderr
