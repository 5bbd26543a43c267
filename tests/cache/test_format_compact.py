"""The compact codec and its models: what the document's writer writes, the engine reads, and the other way round.

Golden caches and faults of compact frames are among those of ``test_format``.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED
from format_blocks import Block
from format_compact import decode_compact
from format_compact_writer import Token, compact_block, copies, in_place, model_of, raw_model
from format_decoder import Cache
from format_model import read_model
from format_parts import COMPACT, GOLD, RAGGED, FrameHeader, Part
from format_readers import READERS, found, in_use
from format_writer import Shard

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def make_cache(monkeypatch):
    """The module that writes golden caches."""
    monkeypatch.syspath_prepend(str(GOLDEN))
    import make_cache

    return make_cache


def stored(files, folder):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def random_tokens(rng, vocab_size, others, *, gold, ragged, kept):
    """Of mass above 1, but for what ``make_cache.possible`` makes of them."""
    tokens = []
    for _ in range(rng.choice([1, 3, 64, 65])):
        k = rng.randint(0, kept) if ragged else kept
        deltas = [int(rng.expovariate(1) * rng.choice([0, 1, 5, 300])) for _ in range(k - 1)]
        ids = rng.sample(range(vocab_size), k)
        lse = [rng.uniform(0, 5) for _ in others]
        gold_logprob = -rng.choice([0.5, 1.0, float("inf"), rng.random()]) if gold else None
        tokens.append(Token(-rng.random() if k else 0.0, ids, deltas, lse, gold_logprob, row_class=rng.randrange(4)))
    return tokens


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("trial", range(6))
def test_frames_of_any_legal_model_are_read_to_what_was_written(make_cache, trial, finished, tmp_path):
    rng = random.Random(SEED + trial)
    vocab_size = (1, 2, 300, 65536, 128256, 2**24)[trial]
    teacher = make_cache.Teacher(vocab_size, rng.choice([(1.0,), (2.0,), (0.5, 1.0, 4.0)]))
    others = teacher.others
    frames, first = [], len(teacher.header) + 32
    for number in range(3):
        gold, ragged = rng.random() < 0.5, rng.random() < 0.5
        kept = rng.randint(1, min(vocab_size, 70))
        tokens = random_tokens(rng, vocab_size, others, gold=gold, ragged=ragged, kept=kept)
        tokens = [make_cache.possible(token, others) for token in tokens]
        model = model_of(tokens, vocab_size, len(others), listed=rng.choice([0, 1, 100]), escape=rng.choice([1, 50]))
        if number == 1:
            listed = rng.sample(range(vocab_size), rng.randint(0, min(vocab_size, 9)))
            model = raw_model(vocab_size, len(others), listed=listed, class_bits=2)
        flags, choice = GOLD * gold | RAGGED * ragged, rng.choice
        frames += copies(model.payload(vocab_size))
        frames.append(
            teacher.compact(f"{number}", tokens, kept, model, flags=flags, model=number, grid=rng.randint(2, 10))
        )
        frames.append(
            teacher.compact(f"{number}'", tokens, kept, model, flags=flags, model=number, block={"choose": choice})
        )
    shard = Shard(teacher.header, 7, 1, 0, in_place(first, frames), finished)
    records = make_cache.journal_of(teacher.header, [shard], commits=[len(frames)], close=finished)
    folder = stored(make_cache.files_of(teacher.header, {1: (records, [shard])}), tmp_path)
    for reader in READERS.values():
        cache = reader(folder)
        assert sorted(cache.keys()) == sorted(teacher.samples)
        for key, sample in teacher.samples.items():
            fields = in_use(cache.fields(key))
            assert fields == {field: sample[field] for field in fields}


@pytest.mark.parametrize("key", ["corner", "two blocks", "places"])
def test_a_part_of_a_block_holds_what_the_whole_does(key):
    cache = Cache.open(GOLDEN / "cache-v1" / "compact")
    (place,) = cache._found[key]
    header, data = cache._frame_header(place), cache.files[place.file]
    assert isinstance(header, FrameHeader)
    assert header.codec == COMPACT
    model = read_model(place.file, data, header.model, header.offset, place.shard_id, cache.header)
    at = header.offset + header.header_bytes
    part = Part(place.file, at, data[at : at + header.blocks[0][0]])
    n = min(header.tokens, header.block_tokens)
    whole = Block(part, header, cache.header, n)
    decode_compact(whole, model)
    for wanted in range(n):
        some = Block(part, header, cache.header, n)
        decode_compact(some, model, wanted)
        assert len(some.tokens) == wanted
        for one, other in zip(some.tokens, whole.tokens, strict=False):
            assert np.array_equal(one.ids, other.ids)
            assert one.weights.tobytes() == other.weights.tobytes()
        for name, values in some.columns.items():
            assert values.tobytes() == whole.columns[name][:wanted].tobytes()


def noisy(rng, data):
    out = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def outcomes(folder):
    """What both readers find, the same; and the codes in it."""
    each = [found(reader, folder) for reader in READERS.values()]
    assert each[0] == each[1], each
    return {value for value in each[0].values() if isinstance(value, str)}


def test_noise_in_a_block_behind_a_sound_checksum_is_refused_by_its_code(make_cache, tmp_path):
    from compact_attacks import SOUND, cache

    rng, seen = random.Random(SEED), set()
    for _ in range(200):
        frame = replace(SOUND, blocks=[noisy(rng, SOUND.blocks[0])])
        seen |= outcomes(stored(cache(frame=frame), tmp_path))
    assert seen == {"corrupt"}


def test_noise_in_a_model_behind_a_sound_checksum_is_refused_by_its_code(make_cache, tmp_path):
    from compact_attacks import PAYLOAD, cache

    rng, seen = random.Random(SEED), set()
    for _ in range(200):
        seen |= outcomes(stored(cache(copies(noisy(rng, PAYLOAD))), tmp_path))
    assert "corrupt" in seen
    assert seen <= {"corrupt", "mismatch", "version"}


def test_a_writer_takes_the_shortest_code_and_any_other_is_no_shorter(make_cache):
    rng = random.Random(SEED)
    tokens = random_tokens(rng, 300, (), gold=False, ragged=False, kept=20)
    model = model_of(tokens, 300, 0, listed=20)
    longest = compact_block(tokens, model, ragged=False, choose=lambda codes: codes[-1])
    assert len(compact_block(tokens, model, ragged=False)) < len(longest)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_the_engine_once_wrote_is_read_to_the_same_numbers(reader):
    folder = GOLDEN / "written-v1"
    expected = json.loads((folder / "compact.json").read_text(encoding="utf-8"))
    cache = reader(folder / "compact")
    assert sorted(cache.keys()) == sorted(expected)
    for key, sample in expected.items():
        assert in_use(cache.fields(key)) == sample
