"""Remote caches for tests: a file system that counts what is read and spoils it on purpose."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from fsspec.implementations.local import LocalFileSystem

from kdfast import cache, soft_targets

V = 500


class Flaky(LocalFileSystem):
    """Local files as ``flaky:///path``. Every read is a line of ``log``; ``spoil`` may change it, delay it or raise."""

    protocol = "flaky"
    log: Path
    spoil = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("flaky://"))

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start=start, end=end, **options)
        name = os.path.basename(path)
        with open(self.log, "a") as log:
            log.write(f"{name} {start} {end}\n")
        return data if Flaky.spoil is None else Flaky.spoil(name, start, data)


def fill(path, samples=6, tokens=400, first=0, **options):
    """One sample a shard; gives the path back."""
    with cache.Writer(path, vocab_size=V, shard_bytes=1, **options) as writer:
        for i in range(first, first + samples):
            targets = soft_targets(torch.randn(tokens, V), k=32)
            writer.write(f"sample {i}", targets, torch.full((tokens,), i))
    return path


def fetched(log: Path) -> list[str]:
    """The shards that were read whole, once for every time."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    sizes = {}
    for name, _, end in lines:
        if name.endswith(".shard"):
            sizes[name] = max(sizes.get(name, 0), int(end))
    return [name for name, start, end in lines if name in sizes and start == "0" and int(end) == sizes[name]]


def assert_same(got, expected):
    for field in ("ids", "logprobs"):
        assert torch.equal(getattr(got, field), getattr(expected, field))


def opened(url, tmp_path, **options):
    return cache.Reader(url, local_cache=tmp_path / "local", **options)


def sizes(source):
    return [shard.bytes for shard in cache.Reader(source).shards()]


def kept(tmp_path):
    return sorted(file.name for file in (tmp_path / "local" / "shards").iterdir())
