"""``kdfast cache list``, and the licences that a cache says of itself."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer", reason="the cache extra is not installed")

from kdfast import CacheError, cache, soft_targets
from kdfast.cli import main

V = 50
KEYS = ["first", "second\tkey", "\N{SNOWMAN}\nthird", "4"]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["kdfast", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return call


def fill(path, keys, **options):
    with cache.Writer(path, vocab_size=V, **options) as writer:
        for i, key in enumerate(keys):
            method = "sample" if i == 2 else "topk"
            writer.write(key, soft_targets(torch.randn(i + 1, V), k=4 + i, method=method), [i] * (i + 1))
    return path


def test_list(command, tmp_path):
    path = fill(tmp_path / "c", KEYS, temperatures=(1.0,))
    code, out, err = command("list", path)
    assert (code, err) == (0, "")
    lines = ["1\t4\ttopk\tfixed", "2\t5\ttopk\tfixed", "3\t6\tsample\tdrawn", "4\t7\ttopk\tfixed"]
    assert out == "".join(f"{key}\t{line}\n" for key, line in zip(KEYS, lines, strict=True))
    code, out, _ = command("list", path, "--json")
    said = [json.loads(line) for line in out.splitlines()]
    assert [one.pop("key") for one in said] == KEYS
    reader = cache.Reader(path)
    assert said == [reader.describe(key)._asdict() for key in KEYS]
    assert reader.describe("4") == reader.describe(4) == (4, 7, "topk", "fixed")
    with pytest.raises(CacheError, match="no sample has this key"):
        reader.describe("5")


def test_a_key_of_two_contents_is_told_and_the_others_are_listed(command, tmp_path):
    one, two = (cache.Writer(tmp_path / "c", vocab_size=V, temperatures=(1.0,)) for _ in range(2))
    for i, writer in enumerate((one, two)):
        writer.write("twice", soft_targets(torch.randn(1, V), k=4), [i])
        writer.write(f"of {i}", soft_targets(torch.randn(1, V), k=4), [i])
        writer.close()
    code, out, err = command("list", tmp_path / "c")
    assert code == 1
    assert sorted(line.split("\t")[0] for line in out.splitlines()) == ["of 0", "of 1"]
    assert "twice" in err
    assert "[duplicate;" in err


def test_no_cache(command, tmp_path):
    code, out, err = command("list", tmp_path)
    assert (code, out) == (1, "")
    assert "no cache is there" in err


def test_licences_travel(command, tmp_path):
    licences = {"teacher_license": "Apache-2.0", "data_license": "ODC-By-1.0"}
    path = fill(tmp_path / "c", KEYS[:2], **licences)
    assert cache.Reader(path).metadata == licences
    assert json.loads((path / "manifest.json").read_text())["metadata"] == licences
    assert "ODC-By-1.0" in command("info", path)[1]
    with pytest.raises(CacheError, match="metadata") as raised:
        cache.Writer(path, vocab_size=V, teacher_license="MIT", data_license="ODC-By-1.0")
    assert raised.value.code == "mismatch"
    with pytest.raises(TypeError, match="data_license must be text, got int"):
        cache.Writer(tmp_path / "d", vocab_size=V, data_license=3)
    with pytest.raises(ValueError, match="metadata may not hold data_license"):
        cache.Writer(tmp_path / "d", vocab_size=V, metadata=licences)
    assert command("export", path, tmp_path / "c.parquet")[0] == 0
    assert command("import", tmp_path / "c.parquet", tmp_path / "d")[0] == 0
    assert cache.Reader(tmp_path / "d").metadata == licences
    changed = ["--data-license", "CC0-1.0", "--teacher-license", "MIT"]
    assert command("import", tmp_path / "c.parquet", tmp_path / "e", *changed)[0] == 0
    assert cache.Reader(tmp_path / "e").metadata == {"teacher_license": "MIT", "data_license": "CC0-1.0"}
