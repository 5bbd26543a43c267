"""Which process takes which sample: all are taken, once, under the same keys; a text is tokenised by its own alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kdfast.cache.job import Source, samples_of
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
