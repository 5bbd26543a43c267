"""Which process takes which sample: all are taken, once, under the same keys; a text is tokenised by its own alone."""

from __future__ import annotations

import json
import os
import re
import sys

import numpy as np
import pytest
import torch

import kdfast
from kdfast import cache
from kdfast.cache.job import JobError, Source, samples_of
from kdfast.cache.job.turns import Turns

WORLDS = [1, 2, 3, 8]


def encode_of(calls):
    def encode(texts):
        calls.extend(texts)
        return [np.array([ord(c) for c in text], dtype=np.int64) for text in texts]

    return encode


def taken(source, world, length=10):
    """By rank, the keys with their ids; and how often each text was tokenised, by all."""
    calls, parts = [], []
    for rank in range(world):
        samples = samples_of(source.documents(length, rank, world), encode_of(calls), length, rank, world)
        parts.append({sample.key: sample.token_ids.tolist() for sample in samples})
    return parts, calls


def words(n):
    return [
        "".join(chr(97 + int(c)) for c in torch.randint(26, (int(length),))) for length in torch.randint(0, 90, (n,))
    ]


@pytest.fixture(params=["texts", "lines", "numbered lines", "rows", "array", "saved"])
def source(request, tmp_path):
    texts = words(60)
    if request.param == "texts":
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        return Source([tmp_path])
    if request.param in ("lines", "numbered lines"):
        rows = [json.dumps({"id": f"doc {i}", "text": text}) for i, text in enumerate(texts)]
        halves = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        halves[0].write_text("\n\n".join(rows[:25]) + "\n")
        halves[1].write_text("\n".join(rows[25:]))
        return Source(halves, id_field="id" if request.param == "lines" else None)
    if request.param == "saved":
        datasets = pytest.importorskip("datasets", reason="the hf extra is not installed")
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "s")
        return Source([tmp_path / "s"])
    ids = torch.randint(99, (50, 13)).numpy()
    np.save(tmp_path / "a.npy", ids if request.param == "rows" else ids.flatten())
    return Source([tmp_path / "a.npy"])


@pytest.mark.filterwarnings("ignore")  # of datasets and what it imports
def test_every_sample_is_taken_once_under_its_key(source):
    (alone,), _ = taken(source, 1)
    assert alone
    for world in WORLDS:
        parts, _ = taken(source, world)
        assert sum(map(len, parts)) == len(alone)
        assert {key: ids for part in parts for key, ids in part.items()} == alone


@pytest.mark.filterwarnings("ignore")  # of datasets and what it imports
@pytest.mark.parametrize("world", [2, 3])
def test_no_process_tokenises_the_others_texts(source, world):
    parts, calls = taken(source, world)
    assert len(calls) in (0, 60)  # 0 of token ids; no text is large enough for all
    assert all(parts)


def test_the_samples_of_a_large_text_are_shared(tmp_path):
    sizes = {"a": 5, "large": 4000, "b": 6, "c": 7, "also": 3000}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    parts, calls = taken(Source([tmp_path]), 4)
    assert sum(map(len, parts)) == 700 + 3
    assert sorted(map(len, calls)) == [5, 6, 7, *[3000] * 4, *[4000] * 4]
    assert all(abs(len(part) - 175) <= 3 for part in parts)


def test_a_share_ends_where_the_data_end(source):
    for world in (1, 3):
        for rank in range(world):
            read = [document.read for document in source.documents(10, rank, world)]
            assert read == sorted(read)
            assert 0 < read[-1] <= 1


def test_turns_leave_nobody_with_more_than_a_share_and_a_document():
    for world in WORLDS:
        sizes = torch.randint(0, 1000, (500,)).tolist()
        loads = []
        for rank in range(world):
            turns = Turns(rank, world, sum(sizes))
            loads.append(sum(size for size in sizes if turns.take(size) and not turns.shared))
        assert sum(loads) == sum(sizes)
        assert max(loads) <= sum(sizes) / world + max(sizes) + len(sizes)


GOOD = b'{"id": "good \xc3\xa9", "text": "\\ud83d\\ude00"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "\xff", "text": "x"}', "no UTF-8: invalid start byte at byte 8"),
        (b'{"id": "x", "text": "\xc3"}', "no UTF-8: invalid continuation byte at byte 21"),
        (
            b'{"id": "a\\ud800", "text": "x"}',
            r"field 'id' must be text that UTF-8 can hold, got '\ud800'",
        ),
        (b'{"id": "x", "text": "ab\\udfff"}', r"field 'text' must be text that UTF-8 can hold, got '\udfff'"),
        (b'{"id": ' + b"9" * 5000 + b', "text": "x"}', "no JSON: Exceeds the limit"),
        (b"[" * 200_000, "no JSON: "),
        (b"\xef\xbb\xbf{}", "no JSON: Unexpected UTF-8 BOM"),
        (b"{", "no JSON: "),
    ],
    ids=["key", "text", "key's escape", "text's escape", "number", "brackets", "mark", "open"],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(JobError, match=re.escape(f"{path}, line 3: {message}")):
        list(Source([path], id_field="id").documents(10))
    path.write_bytes(GOOD)
    (document,) = Source([path], id_field="id").documents(10)
    assert (document.key, document.content) == ("good \xe9", "\U0001f600")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_of_files_that_are_no_text(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("text")
    with pytest.raises(JobError, match=r"udcff\.txt': the name of a text file must be text that UTF-8 can hold"):
        list(Source([tmp_path]).documents(10))


def test_keys_that_are_no_text(tmp_path):
    targets = kdfast.soft_targets(torch.randn(3, 50), k=4)
    with cache.Writer(tmp_path / "c", vocab_size=50) as writer:
        writer.write("\xe9", targets)
        with pytest.raises(ValueError, match="a key must be text that UTF-8 can hold"):
            writer.write("\ud800", targets)
    reader = cache.Reader(tmp_path / "c")
    assert "\xe9" in reader
    for ask in (lambda: reader["a\ud800"], lambda: "a\ud800" in reader):
        with pytest.raises(ValueError, match=r"'\\ud800' at character 1"):
            ask()


def test_rows_of_parquet_that_are_no_text(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the cache extra is not installed")
    import pyarrow.parquet as pq

    from kdfast.cache.parquet import import_parquet

    keys = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    rows = {"key": keys, "ids": [[[1]], [[2]]], "logprobs": [[[-0.1]], [[-0.2]]]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(JobError, match=r"row 1, column 'key': no UTF-8: invalid start byte at byte 0"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "c", vocab_size=9)
