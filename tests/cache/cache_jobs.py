"""Calls, data and the expected cache of the job's tests."""

from __future__ import annotations

import json
import os
import tempfile

import pytest
import torch
from cache_teachers import Tiny, V

import kdfast
from kdfast import cache
from kdfast.cli import main

HERE = os.path.dirname(os.path.abspath(__file__))


def command_line(monkeypatch, capsys, tmp_path):
    """``kdfast cache build OUT`` in this process, with the factory's teacher; returns code, output, errors."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.chdir(tmp_path)

    def call(*arguments, teacher=("--factory", "cache_teachers:dense"), command="build"):
        monkeypatch.setattr("sys.argv", ["kdfast", "cache", command, *map(str, [*arguments, *teacher])])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return call


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some(n=9, longest=40):
    lengths = torch.randint(0, longest, (n,)).tolist()
    return {f"doc {i}": torch.randint(V, (length,)) for i, length in enumerate([0, longest, *lengths])}


def written(tmp_path, samples):
    rows = [{"id": key, "input_ids": ids.tolist()} for key, ids in samples.items()]
    return lines(tmp_path / "d.jsonl", rows)


def cut(samples, length):
    out = {}
    for key, ids in samples.items():
        pieces = ids.split(length) if len(ids) > length else [ids]
        out |= {key if len(pieces) == 1 else f"{key}:{i}": piece for i, piece in enumerate(pieces)}
    return out


def assert_holds(path, samples, *, logits=None, k=8, temperatures=(1.0,), **options):
    """The cache holds these samples alone, each as a writer stores soft_targets of the teacher's logits of it alone.

    The shape of a batch may change the teacher's rounding, which moves a value that lies between two steps of the grid.
    """
    logits = logits or (lambda ids: Tiny()(ids[None], torch.ones_like(ids)[None])[0])
    reader = cache.Reader(path)
    assert set(reader) == set(samples)
    with tempfile.TemporaryDirectory() as folder:
        with cache.Writer(f"{folder}/c", vocab_size=reader.vocab_size, temperatures=temperatures) as writer:
            for key, ids in samples.items():
                writer.write(key, kdfast.soft_targets(logits(ids), k=k, temperatures=temperatures, **options), ids)
        expected = cache.Reader(f"{folder}/c")
        got = reader.read(samples, list(samples.values()))
        want = expected.read(samples)
    assert [one.shape for one in got] == [(len(ids), k) for ids in samples.values()]
    for values in (lambda x: x.dense(), lambda x: torch.stack([x.lse[t] for t in temperatures], -1)):
        a, b = (torch.cat([values(one) for one in many]) for many in (got, want))
        other = ((a - b).abs() > 1e-5).any(-1)
        assert other.sum() <= 1 + len(other) / 50
        assert (a - b).abs().max() <= 0.07
