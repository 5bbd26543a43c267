"""Indices that lie, with right checksums.

Of every one of them each key is read as without it or refused; a verification tells of one that is in use, and a repair
makes another.
"""

from __future__ import annotations

import os
import random
import struct

import pytest
import torch
from conftest import SEED
from format_decoder import hash_of
from format_index import (
    PAGE_BYTES,
    Index,
    compose,
    key_hash,
    pack,
    place,
    recounted,
)
from format_parts import crc32c
from index_world import (
    CODES,
    World,
    attempt,
    copied,
    file_of,
    indices,
    is_wrong,
    read_all,
    token_ids,
    write,
)

from kdfast import CacheError
from kdfast.cache import Reader, repair, verify


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("index"))


ROWS = {
    "key_bytes": (0, 4097, 65535),
    "kind": (0, 2, 255),
    "kept": (0, 5, 65535),
    "tokens": (0, 2, 4, 2**20 + 1, 2**32 - 1),
    "header_bytes": (0, 96, 100, 120, 2**32 - 8),
    "frame_bytes": (0, 4, 104, 2**47, 2**48 + 8, 2**63, 2**64 - 8),
    "offset": (0, 8, 84, 2**47, 2**48, 2**63, 2**64 - 8),
    "flags": (0, 5, 16, 255),
    "method": (1, 4, 255),
    "codec": (0, 2, 4, 255),
    "token_hash": (bytes(16), b"another token ha"),
    "zero": (1, 2**31),
    "shard": (2**31, 2**32 - 1),
}
NUMBERS = (0, 1, 57, 2**32 - 1)
LARGE = (2**48, 2**52 + 3, 2**63)  # 4096 times the second is that of 3 in 64 bits
TAILS = {
    "magic": (b"KDFPAGE\0",),
    "version": (0, 2, 2**32 - 1),
    "header_crc": (0, 1),
    "id": (0, 1, 0xABCE),
    "previous": (1, 0xABCD, 2**64 - 1),
    "rows": (*NUMBERS, 129, 131, *LARGE, 2**64 - 1),
    "keys": (*NUMBERS, 119, 121, *LARGE),
    "buckets": (0, 2, 3, 4, *LARGE),
    "pages": (*NUMBERS, *LARGE),
    "shards": NUMBERS,
    "shards_crc": (0,),
    "zero": (1,),
}
SHARDS = {
    "writer": (0, 1, 2**64 - 1),
    "shard_id": (0, 1),
    "bytes": (0, 8, 2**48, 2**48 + 8, 2**63, 2**64 - 8),
    "frames_end": (0, 8, 2**48, 2**63, 2**64 - 8),
    "samples": (0, 1, 2**32, 2**63, 2**64 - 1),
    "tokens": (0, 1, 2**48, 2**63, 2**64 - 1),
    "ordinal": (17, 10**6, 2**32 - 1),
    "zero": (1,),
}


def each(fields):
    """One test for each value of a field."""
    cases = [(name, value) for name, values in fields.items() for value in values]
    return pytest.mark.parametrize(("field", "value"), cases, ids=[f"{name}-{value!r}"[:40] for name, value in cases])


@each(ROWS)
def test_a_row_that_lies(world, tmp_path, field, value):
    index = world.with_row(random.Random(f"{SEED} {field}").randrange(130), **{field: value})
    world.holds(copied(world.folder, tmp_path / "c", file_of(index)), wrong=True)


@each(TAILS)
def test_a_tail_that_lies(world, tmp_path, field, value):
    world.holds(copied(world.folder, tmp_path / "c", file_of(world.with_tail(**{field: value}))))


@pytest.mark.parametrize("more", [-8, 8, 40])
def test_a_shard_whose_frames_end_elsewhere(world, tmp_path, more):
    index = world.with_shard(0, frames_end=world.index.shards[0].frames_end + more)
    world.holds(copied(world.folder, tmp_path / "c", file_of(index)), wrong=True)


@each(SHARDS)
def test_a_shard_that_lies(world, tmp_path, field, value):
    """One that the journals do not know makes the index an older state, which is no fault."""
    number = random.Random(f"{SEED} {field}").randrange(len(world.shards))
    world.holds(copied(world.folder, tmp_path / "c", file_of(world.with_shard(number, **{field: value}))))


def rows_of_others(world, what):
    """Each key's row is that of the next, or what remains of it where a part is its own."""
    rows = world.index.rows
    others = [*rows[1:], rows[0]]
    if what == "frames":
        return [a._replace(entry=b.entry, shard=b.shard) for a, b in zip(rows, others, strict=True)]
    if what == "entries":
        return [a._replace(entry=b.entry) for a, b in zip(rows, others, strict=True)]
    if what == "shards":
        return [a._replace(shard=b.shard) for a, b in zip(rows, others, strict=True)]
    if what == "offsets":
        places = [a.entry._replace(offset=b.entry.offset) for a, b in zip(rows, others, strict=True)]
        return [a._replace(entry=entry) for a, entry in zip(rows, places, strict=True)]
    return [a._replace(hash=b.hash) for a, b in zip(rows, others, strict=True)]


@pytest.mark.parametrize("what", ["frames", "entries", "shards", "offsets", "hashes"])
def test_rows_of_another_sample(world, tmp_path, what):
    path = copied(world.folder, tmp_path / "c", file_of(world.with_rows(rows_of_others(world, what))))
    assert Reader(path).indexed_shards == len(world.shards)
    read = read_all(path, world.content, world.later)
    assert read == 0 or what in ("shards", "offsets", "entries")  # others than these have no neighbour alike
    world.holds(path, wrong=True)


def test_token_ids_are_held_against_the_frame(world, tmp_path):
    """Whoever has the index name other token ids has not made them those of the targets."""
    number = next(i for i, row in enumerate(world.index.rows) if row.hash == key_hash("k5"))
    others = torch.tensor([7, 8, 9])
    index = world.with_row(number, token_hash=hash_of(others.tolist()))
    path = copied(world.folder, tmp_path / "c", file_of(index))
    for ids in (others, token_ids("k5")):
        for read in (Reader(path).read, Reader(path).packed):
            with pytest.raises(CacheError):
                read(["k5"], [ids])
    world.holds(path, wrong=True)


def test_a_key_that_is_left_out_is_missing(world, tmp_path):
    rows = world.index.rows
    alone = next(i for i, row in enumerate(rows) if sum(row.hash == other.hash for other in rows) == 1)
    gone = next(key for key in world.keys if key_hash(key) == rows[alone].hash)
    rows[alone] = rows[alone - 1]
    path = copied(world.folder, tmp_path / "c", file_of(world.with_rows(rows)))
    assert attempt(lambda: Reader(path)[gone]) in CODES
    world.holds(path, wrong=True)


def with_pages(world, pages):
    return recounted(Index(world.index.file, pages, world.index.shards, world.index.tail))


def moved(world, buckets, take, put):
    """The last row of page ``take`` lies in page ``put``, in order there."""
    pages = place(world.index.rows, world.index.tail.id, buckets)
    *left, row = pages[take].rows
    pages[take] = pages[take]._replace(rows=left)
    pages[put] = pages[put]._replace(rows=sorted([*pages[put].rows, row], key=lambda row: row.order))
    return recounted(Index(world.index.file, pages, world.index.shards, world.index.tail._replace(buckets=buckets)))


def swapped(rows, i, j):
    rows = list(rows)
    rows[i], rows[j] = rows[j], rows[i]
    return rows


PAGES = {
    **{f"rows {n}": lambda w, n=n: w.with_page(1, count=n) for n in (0, 1, 55, 57, 64, 2**31, 2**32 - 1)},
    **{f"rows {n} of the last": lambda w, n=n: w.with_page(2, count=n) for n in (0, 17, 19, 56)},
    "all rows 0": lambda w: with_pages(w, [page._replace(rows=[]) for page in w.index.pages]),
    "id": lambda w: w.with_page(1, id=0xABCE),
    "number": lambda w: w.with_page(1, number=2),
    "number beyond": lambda w: w.with_page(2, number=2**64 - 1),
    "padding": lambda w: w.with_page(1, zero=bytes(39) + b"x"),
    "behind the rows": lambda w: w.with_page(2, rest=bytes(72) + b"x"),
    "pages change places": lambda w: with_pages(w, swapped(w.index.pages, 0, 1)),
    "a page twice": lambda w: with_pages(w, [w.index.pages[0], w.index.pages[0], w.index.pages[2]]),
    "a page of the first's rows": lambda w: w.with_page(1, rows=w.index.pages[0].rows),
    "no order": lambda w: w.with_page(1, rows=swapped(w.index.pages[1].rows, 3, 40)),
    "no order in the last": lambda w: w.with_page(2, rows=w.index.pages[2].rows[::-1]),
    "no order of pages": lambda w: with_pages(
        w,
        [page._replace(rows=w.index.pages[number].rows) for page, number in zip(w.index.pages, (1, 0, 2), strict=True)],
    ),
    "before its bucket": lambda w: moved(w, 5, 3, 0),
    "behind its bucket": lambda w: moved(w, 5, 1, 4),
    "a page too much": lambda w: with_pages(w, [*w.index.pages, w.index.pages[2]._replace(rows=[], number=3)]),
    "an empty page first": lambda w: with_pages(
        w, [page._replace(number=i) for i, page in enumerate([w.index.pages[2]._replace(rows=[]), *w.index.pages])]
    ),
}


@pytest.mark.parametrize("what", PAGES)
def test_a_page_that_lies(world, tmp_path, what):
    wrong = what != "a page too much"
    world.holds(copied(world.folder, tmp_path / "c", file_of(PAGES[what](world))), wrong=wrong)


def twice(world, renumbered):
    index, n = world.index, len(world.index.shards)
    rows = index.rows + [row._replace(shard=row.shard + n * renumbered) for row in index.rows]
    pages = place(rows, index.tail.id, 1)
    return recounted(Index(index.file, pages, index.shards * 2, index.tail))


def whole(world, identity, **options):
    return compose(world.shards, world.header, identity, **options)


def lied(index, **fields):
    return Index(index.file, index.pages, index.shards, index.tail._replace(**fields))


def cut_off(index, end):
    return {index.file: file_of(index)[index.file][:end]}


CHAINS = {
    "itself": lambda w: [whole(w, 5, previous=5)],
    "missing": lambda w: [whole(w, 5, previous=4)],
    "the older is missing": lambda w: w.in_two()[1:],
    "a cycle": lambda w: w.in_two(previous=(2, 1)),
    "a cycle of equal generations": lambda w: w.in_two(previous=(2, 1), generations=(2, 2)),
    "halves of equal generations": lambda w: w.in_two(generations=(2, 2)),
    "wholes of equal generations": lambda w: [whole(w, 5), whole(w, 6)],
    "the older of a higher generation": lambda w: w.in_two(generations=(3, 2)),
    "the highest generation": lambda w: w.in_two(generations=(1, 2**63 - 1)),
    "all of generation 0": lambda w: [whole(w, 5, generation=0)],
    "shards in two files": lambda w: [whole(w, 1), whole(w, 2, previous=1, generation=2)],
    "a key counted twice": lambda w: [w.in_two()[0], lied(w.in_two()[1], keys=w.in_two()[1].tail.rows)],
    "a key counted by nobody": lambda w: [w.in_two()[0], lied(w.in_two()[1], keys=0)],
    "the list twice": lambda w: [recounted(Index(w.index.file, w.index.pages, w.index.shards * 2, w.index.tail))],
    "list and rows twice": lambda w: [twice(w, False)],
    "list and rows twice, each its own": lambda w: [twice(w, True)],
    "of another cache": lambda w: [lied(whole(w, 5), header_crc=w.header.crc ^ 1)],
    "the older of another cache": lambda w: [lied(w.in_two()[0], header_crc=1), w.in_two()[1]],
    "the older of version 2": lambda w: [lied(w.in_two()[0], version=2), w.in_two()[1]],
    "the older is missing and another is there": lambda w: [
        whole(w, 5, generation=3),
        whole(w, 6, previous=4, generation=5),
    ],
    "left from before": lambda w: [whole(w, 5), whole(w, 6, generation=2)],
}


@pytest.mark.parametrize("what", CHAINS)
def test_a_chain_that_lies(world, tmp_path, what):
    files = {}
    for index in CHAINS[what](world):
        files |= file_of(index)
    world.holds(copied(world.folder, tmp_path / "c", files))


@pytest.mark.parametrize("what", ["the older is missing and another is there", "the older is missing"])
def test_an_index_is_used_as_a_whole(world, tmp_path, what):
    """That of the highest generation, not what is left from before."""
    files = {}
    for index in CHAINS[what](world):
        files |= file_of(index)
    assert Reader(copied(world.folder, tmp_path / "c", files)).indexed_shards == 0


@pytest.mark.parametrize("what", [*CHAINS, *PAGES])
def test_a_writer_that_adds_to_a_lie(world, tmp_path, what):
    made = {**PAGES, **CHAINS}[what](world)
    more = ["one more", "and another"][: 1 + (what in CHAINS)]
    files = {}
    for index in made if isinstance(made, list) else [made]:
        files |= file_of(index)
    path = copied(world.folder, tmp_path / "c", files)
    for key in more:
        write(path, [key])
        read_all(path, world.content, world.later)
        assert key in Reader(path)
        assert Reader(path)[key].ids.shape == (3, 4)
    assert len(indices(path)) <= 4
    repair(path)
    assert sorted(Reader(path)) == sorted([*world.keys, *more])
    assert read_all(path, world.content) == len(world.keys)
    assert not is_wrong(path)


@pytest.mark.parametrize("end", [0, 1, 87, 88, 4096, -8, -1, -88, -89, -4096])
def test_a_file_that_was_cut(world, tmp_path, end):
    world.holds(copied(world.folder, tmp_path / "c", cut_off(world.index, end)), wrong=True)


@pytest.mark.parametrize(("pages", "shards"), [(2**28, 9), (2**30 - 1, 9), (3, 2**23), (3, 2**32 - 1)])
def test_a_file_of_holes(world, tmp_path, pages, shards):
    """As long as its tail says."""
    path = copied(world.folder, tmp_path / "c")
    tail = world.index.tail._replace(pages=pages, shards=shards)
    end = PAGE_BYTES * pages + 56 * shards
    with (path / world.index.file).open("wb") as out:
        out.write(pack(world.index.pages, [], tail)[: PAGE_BYTES * 3])
        out.seek(end - 56 * 9 if shards == 9 else end)
        out.write(pack([], world.index.shards if shards == 9 else [], tail))
    read_all(path, world.content)
    assert verify(path).faults != []
    repair(path)
    assert verify(path).faults == []
    assert read_all(path, world.content) == len(world.content)


def no_file(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": path.parent / "nowhere"}[kind])


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nowhere"])
@pytest.mark.parametrize("older", [False, True])
def test_what_is_no_file(world, tmp_path, kind, older):
    first, second = world.in_two()
    path = copied(world.folder, tmp_path / "c", file_of(second) if older else {})
    no_file(path / first.file, kind)
    assert read_all(path, world.content) == len(world.content)
    verify(path)
    repair(path)
    assert read_all(path, world.content) == len(world.content)
    assert not (older and Reader(path).indexed_shards == 0)


def mutation(index, some):
    """A file with some bytes changed in one of its parts, and the checksums of that part made right."""
    data = bytearray(file_of(index)[index.file])
    pages = PAGE_BYTES * len(index.pages)
    part = some.choices(["page", "rows", "shards", "tail"], [1, 6, 3, 3])[0]
    low, high = {
        "page": (4032, 4092),
        "rows": (0, 4032),
        "shards": (pages, len(data) - 88),
        "tail": (len(data) - 88, len(data) - 4),
    }[part]
    base = PAGE_BYTES * some.randrange(len(index.pages)) if part in ("page", "rows") else 0
    at = base + some.randrange(low, high)
    if some.random() < 0.3:
        at -= at % 8
        value = some.choice([0, 1, 2**31, 2**48, 2**63, 2**64 - 1, some.getrandbits(64)])
        at = min(at, base + high - 8)
        data[at : at + 8] = struct.pack("<Q", value)
    else:
        for _ in range(some.choice([1, 1, 1, 2, 3])):
            data[min(base + high - 1, at + some.randrange(8))] = some.randrange(256)
    if part in ("page", "rows"):
        struct.pack_into("<I", data, base + 4092, crc32c(bytes(data[base : base + 4092])))
    if part == "shards":
        struct.pack_into("<I", data, len(data) - 12, crc32c(bytes(data[low:high])))
    struct.pack_into("<I", data, len(data) - 4, crc32c(bytes(data[-88:-4])))
    return bytes(data)


@pytest.mark.parametrize("part", range(5))
def test_mutations(world, tmp_path, part):
    some = random.Random(f"{SEED} {part}")
    files = [world.index] if part % 2 else world.in_two()
    path = copied(world.folder, tmp_path / "c")
    for i in range(60):
        for index in files:
            (path / index.file).write_bytes(file_of(index)[index.file])
        index = some.choice(files)
        data = mutation(index, some)
        (path / index.file).write_bytes(data)
        read_all(path, world.content, world.later)
        faults = verify(path).faults
        changed = [(at, a, b) for at, (a, b) in enumerate(zip(file_of(index)[index.file], data, strict=True)) if a != b]
        assert bool(faults) == is_wrong(path), (index.file, changed, [str(fault) for fault in faults])
        if i % 10 == 0:
            world.holds(path)
            for file in indices(path):
                file.unlink()
