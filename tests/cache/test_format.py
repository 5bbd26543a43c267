"""The cache format: golden caches, valid and damaged, and what each reader of ``READERS`` makes of them.

The document's decoder and kdfast's own have to give the same bits and, for whatever damage, the same code.
"""

from __future__ import annotations

import itertools
import json
import operator
import random
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEED
from format_decoder import Cache
from format_parts import crc32c
from format_readers import READERS, Document, Engine, bits, found, in_use

from kdfast import CacheError, SparseTargets
from kdfast.cache import Writer, repair, verify

GOLDEN = Path(__file__).parent / "golden" / "cache-v1"
VALID = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.startswith("invalid"))
INVALID = [
    case | {"base": base}
    for base, file in (("base", "invalid"), ("compact_base", "invalid_compact"))
    for case in json.loads((GOLDEN / f"{file}.json").read_text(encoding="utf-8"))
]
CODES = {"missing", "version", "truncated", "checksum", "corrupt", "mismatch", "duplicate", "misaligned"}


def golden(name):
    return {path.name: path.read_bytes() for path in sorted((GOLDEN / name).iterdir())}


def attacked(case):
    """The files of a case's base with its patches."""
    files = golden(case["base"])
    for patch in case["patches"]:
        name = patch["file"]
        if patch.get("delete"):
            del files[name]
            continue
        at, new = patch["offset"], bytes.fromhex(patch["bytes"])
        old = files.get(name, b"")
        files[name] = old[:at] + new + old[at + patch.get("instead_of", len(new)) :]
    return files


def stored(files, folder):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


def faults(cache, keys):
    """The codes of the keys that cannot be read."""
    codes = {}
    for key in keys:
        try:
            cache.fields(key)
        except cache.error as error:
            codes[key] = error.code
    return codes


@pytest.mark.parametrize("name", VALID)
def test_a_valid_cache_holds_what_it_should(name, reader):
    cache = reader(GOLDEN / name)
    expected = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    samples = expected.pop("samples")
    assert cache.about() == expected
    assert sorted(cache.keys()) == sorted(samples)
    for key, sample in samples.items():
        fields = in_use(cache.fields(key))
        if fields["method"] == "pps":  # readers may differ in the last bit of an exponential
            for row, want in zip(fields.pop("mass"), sample["mass"], strict=True):
                np.testing.assert_array_max_ulp(np.array(row, np.float32), np.array(want, np.float32), maxulp=1)
        assert fields == {field: sample[field] for field in fields}


@pytest.mark.parametrize("case", INVALID, ids=[case["name"] for case in INVALID])
def test_a_fault_has_its_code_and_concerns_nothing_else(case, reader, tmp_path):
    folder = stored(attacked(case), tmp_path)
    if case["where"] == "open":
        with pytest.raises(reader.error) as caught:
            reader(folder)
        assert caught.value.code == case["code"]
    else:
        cache = reader(folder)
        assert faults(cache, {*cache.keys(), case["where"]}) == {case["where"]: case["code"]}


@pytest.mark.parametrize("case", INVALID, ids=[case["name"] for case in INVALID])
def test_what_repair_leaves_can_be_read(case, tmp_path):
    folder = stored(attacked(case), tmp_path)
    if case["name"].startswith(("header", "metadata")):  # which the shards' copies repeat
        with pytest.raises(CacheError) as caught:
            repair(folder)
        assert caught.value.code == case["code"]
        return
    repair(folder)
    left = {fault.code for fault in verify(folder).faults}
    assert left == ({"duplicate"} & {case["code"]})  # which of two is right nobody knows


def test_the_golden_files_are_what_their_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(GOLDEN.parent))
    import make_cache

    made = make_cache.made()
    assert {str(p.relative_to(GOLDEN).as_posix()) for p in GOLDEN.rglob("*") if p.is_file()} == made.keys()
    assert [name for name, data in made.items() if (GOLDEN / name).read_bytes() != data] == []


def test_the_manifest_repeats_what_the_cache_holds():
    for name in VALID:
        files = golden(name)
        if "manifest.json" not in files:
            continue
        cache, said = Cache(files), json.loads(files["manifest.json"])
        frames = [found for places in cache._found.values() for found in places]
        assert said["samples"] == len(frames)
        assert said["tokens"] == sum(found.frame.tokens for found in frames)
        assert said["header_crc"] == cache.header.crc
        assert [shard["samples"] for shard in said["shards"]] == [
            sum(found.file == shard["file"] for found in frames) for shard in said["shards"]
        ]


@contextmanager
def restored(path):
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def said(file, data):
    """What readers find in a cache where a file has become ``data``: all the same."""
    file.write_bytes(data)
    each = [found(reader, file.parent) for reader in READERS.values()]
    assert all(one == each[0] for one in each), (file, [codes(one) for one in each])
    return each[0]


def codes(outcome):
    return outcome if isinstance(outcome, str) else {k: v if v in CODES else "read" for k, v in outcome.items()}


def noticed(outcome, content):
    """Whether a damaged cache is refused, or every key is as it was or refused."""
    if isinstance(outcome, str):
        return outcome in CODES
    return outcome.keys() == content.keys() and all(v == content[key] or v in CODES for key, v in outcome.items())


def older(folder, file):
    """What there was before each record of a journal was written."""
    if not file.endswith(".journal"):
        return []
    with restored(folder / file) as path:
        data = path.read_bytes()
        return [said(path, data[:end]) for end in range(0, len(data), 64)]


def notice_flips(name, folder, flips):
    """Bits (file, byte, bit) of a cache flip, each by itself: a reader notices, or all content is as it was."""
    files = golden(name)
    stored(files, folder)
    content = found(Document, folder)
    for file, its in itertools.groupby(sorted(flips), key=operator.itemgetter(0)):
        data = files[file]
        with restored(folder / file) as path:
            for _, at, bit in its:
                outcome = said(path, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
                assert noticed(outcome, content), (file, at, bit)


def bits_of(name):
    return [
        (file, at, bit)
        for file, data in golden(name).items()
        if file != "manifest.json"  # which no reader looks at
        for at in range(len(data))
        for bit in range(8)
    ]


def test_every_bit_of_a_closed_cache_is_noticed_where_it_flips_or_changes_nothing(tmp_path):
    notice_flips("smallest", tmp_path, bits_of("smallest"))


@pytest.mark.parametrize("name", [name for name in VALID if name != "smallest"])
def test_any_bit_that_flips_is_noticed_or_changes_nothing(name, tmp_path):
    flips = bits_of(name)
    notice_flips(name, tmp_path, random.Random(SEED).sample(flips, min(600, len(flips))))


@pytest.mark.parametrize("name", VALID)
def test_a_file_that_is_cut_is_noticed_or_is_an_older_cache(name, tmp_path):
    files, rng = golden(name), random.Random(SEED)
    folder = stored(files, tmp_path)
    content = found(Document, folder)
    for file, data in files.items():
        before = older(folder, file)
        with restored(folder / file) as path:
            for length in sorted({rng.randrange(len(data)) for _ in range(40)} if data else ()):
                outcome = said(path, data[:length])
                assert noticed(outcome, content) or outcome in before, (file, length)


@pytest.mark.parametrize("name", ["base", "writers"])
def test_noise_over_a_part_of_a_file_is_noticed(name, tmp_path):
    files, rng = golden(name), random.Random(SEED)
    folder = stored(files, tmp_path)
    content = found(Document, folder)
    before = {file: older(folder, file) for file in files}
    for _ in range(300):
        file = rng.choice(sorted(file for file in files if files[file]))
        data, start = files[file], rng.randrange(len(files[file]))
        noise = rng.randbytes(rng.randrange(1, 64))
        with restored(folder / file) as path:
            outcome = said(path, data[:start] + noise + data[start + rng.randrange(64) :])
        assert noticed(outcome, content) or outcome in before[file], (file, start, noise)


def test_noise_in_a_block_behind_a_sound_checksum_is_refused_by_its_code(monkeypatch, tmp_path):
    """Whatever a block holds, a reader either decodes it or says ``corrupt``, and all readers do the same."""
    monkeypatch.syspath_prepend(str(GOLDEN.parent))
    from attacks import A, cache

    rng = random.Random(SEED)
    refused = 0
    for _ in range(400):
        frames = []
        for frame in A.frames:
            block = bytearray(frame.blocks[0])
            for _ in range(rng.randrange(1, 4)):
                block[rng.randrange(len(block))] = rng.randrange(256)
            frames.append(replace(frame, blocks=[bytes(block)]))
        folder = stored(cache(a=replace(A, frames=frames)), tmp_path)
        each = [found(reader, folder) for reader in READERS.values()]
        assert each[0] == each[1], [codes(one) for one in each]
        words = [v for v in codes(each[0]).values() if v != "read"]
        assert set(words) <= {"corrupt"}
        refused += len(words)
    assert refused > 0


def test_crc_is_castagnoli():
    assert crc32c(b"123456789") == 0xE3069283


def test_log_probabilities_are_rounded_once():
    """lp = top - steps 2^-grid against the exact difference of rationals."""
    sample = Cache.open(GOLDEN / "fixed")["two blocks"]
    for row in sample.logprobs:
        for lp in row:
            exact = Fraction(float(row[0])) - round((Fraction(float(row[0])) - Fraction(float(lp))) * 4) / Fraction(4)
            gap = abs(Fraction(float(lp)) - exact)
            for other in (np.nextafter(lp, np.float32(-np.inf)), np.nextafter(lp, np.float32(0))):
                assert gap <= abs(Fraction(float(other)) - exact)


def test_token_ids_that_are_others_are_misaligned(reader):
    cache = reader(GOLDEN / "fixed")
    cache.check_tokens("corner", [1, -1, 2**62, 0, 50])
    cache.check_tokens("no tokens", [])
    others = [("corner", ids) for ids in ([1, -1, 2**62, 0, 51], [1, -1, 2**62, 0], [])]
    for key, token_ids in [*others, ("no tokens", [1]), ("ragged", list(range(30)))]:  # that one has no hash
        with pytest.raises(cache.error) as caught:
            cache.check_tokens(key, token_ids)
        assert caught.value.code == "misaligned"


def random_targets(rng, vocab_size, temperatures):
    """Targets of a sample of any method that a cache of these temperatures can hold, in rows of any length."""
    method = rng.choice(
        (["sample", "pps"] if len(temperatures) == 1 else []) + (["topk", "topp"] if 1.0 in temperatures else [])
    )
    tokens, kept = rng.choice([0, 1, 63, 64, 65, 200]), rng.choice([1, 2, 7, 32, 300])
    drawn, ragged = method in ("sample", "pps"), method != "topk" or rng.random() < 0.3
    ids = torch.full((tokens, kept), -1, dtype=torch.int32)
    values = torch.full((tokens, kept), 0.0 if drawn else -torch.inf)
    spread = rng.choice([0.3, 20, 3000])
    for row in range(tokens):
        k = min(kept, vocab_size)
        if method == "sample":
            draws = torch.randint(vocab_size, (kept,)).unique(return_counts=True)
            ids[row, : len(draws[0])], values[row, : len(draws[0])] = draws[0].int(), draws[1] / kept
            continue
        if ragged:
            k = rng.randint(0, k)
        ids[row, :k] = torch.tensor(rng.sample(range(vocab_size), k), dtype=torch.int32)
        values[row, :k] = torch.rand(k).exp() * 1e-3 if method == "pps" else -spread * torch.rand(k) - 0.1
    lse = {t: torch.zeros(tokens) for t in temperatures}
    if not drawn:  # no mass is above 1
        values = torch.where(ids >= 0, values - values.logsumexp(-1, keepdim=True).clamp(min=0), values)
        room = {t: (values / t).logsumexp(-1).clamp(min=-50) + 5 * torch.rand(tokens) for t in temperatures}
        lse |= {t: x for t, x in room.items() if t != 1}
    gold = -torch.rand(tokens)
    gold[-1:] = -torch.inf
    return SparseTargets(
        ids,
        None if drawn else values,
        vocab_size=vocab_size,
        lse=lse,
        method=method,
        k_eff=(ids >= 0).sum(-1).int() if ragged else None,
        mass=values if drawn else None,
        neg_entropy=-torch.rand(tokens) if drawn else None,
        gold_logprob=gold if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("trial", range(16))
def test_what_the_writer_writes_both_readers_decode_to_the_same_bits(trial, tmp_path):
    rng = random.Random(SEED + trial)
    vocab_size = rng.choice([1, 2, 300, 65536, 128256, 2**24])
    temperatures = rng.choice([(1.0,), (2.0,), (0.5, 1.0, 4.0)])  # targets that are not drawn always have 1
    token_ids = {}
    with Writer(
        tmp_path,
        vocab_size=vocab_size,
        temperatures=temperatures,
        teacher="någon",
        grid=rng.randint(2, 10),
        block_tokens=rng.choice([64, 128, 256]),
        shard_bytes=rng.choice([1 << 12, 1 << 30]),
        tier=("fixed", "compact")[trial % 2],
    ) as writer:
        for i in range(8):
            targets = random_targets(rng, vocab_size, temperatures)
            token_ids[f"ключ {i}"] = [rng.randrange(vocab_size) for _ in range(len(targets.ids))]
            seed = rng.randrange(2**63) if targets.method in ("sample", "pps") else None
            writer.write(f"ключ {i}", targets, token_ids[f"ключ {i}"] if i % 4 else None, seed=seed)
    document, engine = Document(tmp_path), Engine(tmp_path)
    assert document.about() == engine.about()
    assert set(document.keys()) == set(engine.keys()) == token_ids.keys()
    for key, ids in token_ids.items():
        one, other = document.fields(key), engine.fields(key)
        if one["method"] == "pps":  # readers may differ in the last bit of an exponential
            np.testing.assert_array_max_ulp(one.pop("mass"), other.pop("mass"), maxulp=1)
        assert bits(one) == bits(other)
        if one["token_hash"] is not None:
            document.check_tokens(key, ids)
            engine.check_tokens(key, ids)
