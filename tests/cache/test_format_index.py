"""The index of a directory, as ``format_index`` has it from the document: what kdfast writes, reads and leaves out."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import torch
from conftest import SEED
from format_index import (
    PAGE_BYTES,
    check_chain,
    compose,
    finished_shards,
    read_chain,
    read_index_file,
)
from format_readers import Document, Engine, bits, found
from index_world import (
    V,
    World,
    chain_of,
    copied,
    file_of,
    files_of,
    header_of,
    holds,
    indices,
    is_wrong,
    read_all,
    targets,
    token_ids,
    write,
)

from kdfast import CacheError, soft_targets
from kdfast.cache import Reader, Writer, repair, verify


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("index"))


# What kdfast writes.


def test_what_is_written_is_what_the_document_says(tmp_path):
    path = tmp_path / "c"
    some = random.Random(SEED)
    texts = ["x", "é", "日本", "é" * 2048, "z" * 4096, "\U0001f600" * 1024, *(chr(some.randrange(1, 127)) for _ in "1")]
    texts += [
        "".join(chr(some.choice([65, 233, 0x65E5, 0x1F600]) + some.randrange(9)) for _ in range(n))
        for n in range(3, 40)
    ]
    texts += [f"{i}" * some.randrange(1, 9) for i in range(200)]
    texts = list(dict.fromkeys(texts))
    written = 0
    for size, some_bytes in ((60, 1), (100, 2000), (len(texts), 1 << 20)):
        write(path, texts[written:size], shard_bytes=some_bytes)
        written = size
        if size == 100:
            write(path, [], shard_bytes=1)
        files = files_of(path)
        header = header_of(files)
        chain = read_chain(files, header)
        check_chain(chain, files, header)
        assert sorted(path.name for path in indices(path)) == sorted(index.file for index in chain)
        shards = finished_shards(files, header)
        assert sorted(shard for index in chain for shard in index.shards) == sorted(shards)
        assert Reader(path).indexed_shards == len(shards)
        for key in texts[:written]:
            (row,) = (row for index in chain for row in index.find(key))
            assert row.entry.key_bytes == len(key.encode())
        assert not any(index.find(key) for index in chain for key in ["", "no", *texts[written:]])
    assert len({shard.writer for shard in shards}) == 3
    assert len(shards) > 60


def test_samples_of_one_key_are_all_there(tmp_path):
    """Equal ones, and others: each writer of two that are open at once knows nothing of what the other writes."""
    path = tmp_path / "c"
    write(path, ["before"])
    with Writer(path, vocab_size=V) as one, Writer(path, vocab_size=V) as other:
        for name, writer in (("one", one), ("other", other)):
            for i in range(70):
                writer.write(f"same {i}", targets(), token_ids(f"same {i}"))
            for i in range(10):
                writer.write(f"{name} {i}", targets(), token_ids(name))
            writer.write("other tokens", targets(), token_ids(name))
            writer.write("hashed once", targets(), token_ids("hashed once") if writer is one else None)
            writer.write("never hashed", targets())
            torch.manual_seed(SEED)
            writer.write("never hashed but equal", targets())
    files = files_of(path)
    chain = read_chain(files, header_of(files))
    check_chain(chain, files, header_of(files))
    assert sum(index.tail.keys for index in chain) == 95 == len(Reader(path)) == len(set(Reader(path)))
    assert sum(index.tail.rows for index in chain) == 169
    assert all(len([row for index in chain for row in index.find(f"same {i}")]) == 2 for i in range(70))
    content = found(Engine, path)
    assert content == found(Document, path) == found(Engine, copied(path, tmp_path / "bare"))
    assert {key for key, value in content.items() if value == "duplicate"} == {
        "other tokens", "hashed once", "never hashed"
    }  # fmt: skip


def test_files_are_merged_as_they_grow(tmp_path):
    path, expected = tmp_path / "c", [300]
    write(path, [f"big {i}" for i in range(300)])
    for i in range(40):
        write(path, [f"small {i}"])
        together = 1
        while expected and expected[-1] <= 4 * together:
            together += expected.pop()
        expected.append(together)
        chain = chain_of(path)
        assert [index.tail.rows for index in chain] == expected[::-1]
        assert chain[0].tail.generation == i + 2
        assert len(indices(path)) == len(chain) <= 4
    assert verify(path).faults == []


# What kdfast reads.


def test_an_index_that_a_version_wrote_stays_readable():
    folder = Path(__file__).parent / "golden" / "index-v1"
    files = files_of(folder)
    header = header_of(files)
    chain = read_chain(files, header)
    check_chain(chain, files, header)
    assert [index.tail.rows for index in chain] == [10, 120]
    reader = Reader(folder)
    assert reader.indexed_shards == len(reader.shards()) == 3
    assert len(reader) == 130
    for i in range(130):
        assert reader[f"sample {i}"].ids.tolist() == [[i % 40, (i + 1) % 40]]
    assert found(Engine, folder) == found(Document, folder)


@pytest.mark.parametrize("buckets", [1, 2, 3, 8])
def test_an_index_that_python_wrote_is_used(world, tmp_path, buckets):
    index = compose(world.shards, world.header, 1 << 63, buckets, generation=7)
    assert read_index_file(index.file, file_of(index)[index.file], world.header) == index
    path = copied(world.folder, tmp_path / "c", file_of(index))
    reader, bare = Reader(path), Reader(world.folder)
    assert (reader.indexed_shards, bare.indexed_shards) == (len(world.shards), 0)
    assert len(reader) == len(bare) == len(world.keys)
    assert list(reader) == list(bare)
    assert all(key in reader for key in world.keys)
    assert not any(f"no {i}" in reader for i in range(200))
    assert found(Engine, path) == world.content
    assert verify(path).faults == []
    write(path, ["one more"])
    assert (len(Reader(path)), Reader(path).indexed_shards) == (len(world.keys) + 1, len(world.shards) + 1)
    assert not is_wrong(path)


def test_a_chain_that_python_wrote_is_used(world, tmp_path):
    older, newer = world.in_two()
    path = copied(world.folder, tmp_path / "c", file_of(older) | file_of(newer))
    assert not is_wrong(path)
    assert Reader(path).indexed_shards == len(world.shards)
    assert found(Engine, path) == world.content
    assert list(Reader(path)) == list(Reader(world.folder))
    world.holds(path, wrong=False)


@pytest.mark.parametrize("copies", [56, 57, 130])
def test_equal_hashes_over_the_end_of_a_page(tmp_path, copies):
    """As many writers have written one key, all before the first of them was closed: rows of one hash fill pages."""
    path = tmp_path / "c"
    writers = [Writer(path, vocab_size=V, threads=1, temperatures=(1.0,)) for _ in range(copies)]
    for i, writer in enumerate(writers):
        writer.write("same", targets(), token_ids("same"))
        writer.write(f"own {i}", targets(), token_ids(f"own {i}"))
        writer.commit()
    for writer in writers:
        writer.close()
    files = files_of(path)
    header = header_of(files)
    check_chain(read_chain(files, header), files, header)
    bare = copied(path, tmp_path / "bare")
    content = found(Engine, bare)
    assert content == found(Engine, path)
    for buckets in (1, 5):
        index = compose(finished_shards(files, header), header, 9, buckets)
        rows = index.find("same")
        assert len(rows) == copies
        path = copied(bare, tmp_path / f"{buckets}", file_of(index))
        reader = Reader(path)
        assert (len(reader), reader.indexed_shards) == (copies + 1, copies)
        holds(path, content, wrong=False)


# What is of another moment.


def told(folder):
    """What a reader says, in words that do not depend on where the cache lies."""
    try:
        reader = Reader(folder)
    except CacheError as error:
        return error.code, str(error).replace(str(folder), "")
    skipped = Reader(folder, damaged="skip")
    return found(Engine, folder), [str(fault).replace(str(folder), "") for fault in skipped.damage], sorted(reader)


def test_a_journal_that_was_cut_back(world, tmp_path):
    path = copied(world.folder, tmp_path / "c", file_of(world.index))
    bare = copied(world.folder, tmp_path / "bare")
    for journal in sorted(bare.glob("*.journal")):
        data = journal.read_bytes()
        for end in range(0, len(data), 64):
            for folder in (path, bare):
                (folder / journal.name).write_bytes(data[:end])
            assert told(path) == told(bare)
            assert [fault.code for fault in verify(path).faults] == [fault.code for fault in verify(bare).faults]
        for folder in (path, bare):
            (folder / journal.name).write_bytes(data)
    assert Reader(path).indexed_shards == len(world.shards)
    assert read_all(path, world.content) == len(world.content)


@pytest.mark.parametrize("change", ["gone", "shorter", "longer", "empty", "renamed"])
def test_a_shard_that_is_not_what_it_was(world, tmp_path, change):
    folders = [copied(world.folder, tmp_path / "c", file_of(world.index)), copied(world.folder, tmp_path / "bare")]
    name = random.Random(SEED).choice(world.index.shards).name
    for folder in folders:
        file = folder / name
        data = file.read_bytes()
        if change == "renamed":
            file.rename(file.with_suffix(".open"))
        elif change == "gone":
            file.unlink()
        else:
            file.write_bytes({"shorter": data[:-8], "longer": data + bytes(8), "empty": b""}[change])
    assert told(folders[0]) == told(folders[1])
    assert Reader(folders[0], damaged="skip").indexed_shards == 0
    assert sorted(Reader(folders[0], damaged="skip")) == sorted(Reader(folders[1], damaged="skip"))
    faults = [[fault.code for fault in verify(folder).faults] for folder in folders]
    assert faults[0] == faults[1] != []
    repair(folders[0])
    assert verify(folders[0]).faults == []


def test_a_damaged_frame_is_what_it_is_without_an_index(world, tmp_path):
    some = random.Random(SEED)
    path, bare = copied(world.folder, tmp_path / "c", file_of(world.index)), copied(world.folder, tmp_path / "bare")
    for _ in range(25):
        shard = some.choice(world.index.shards)
        data = (bare / shard.name).read_bytes()
        at = some.randrange(len(world.header.raw) + 32, shard.frames_end)
        for folder in (path, bare):
            (folder / shard.name).write_bytes(data[:at] + bytes([data[at] ^ 1 << some.randrange(8)]) + data[at + 1 :])
        assert Reader(path).indexed_shards == len(world.shards)
        if (path / shard.name).read_bytes() == (bare / shard.name).read_bytes():
            assert found(Engine, path) == found(Engine, bare)
        for folder in (path, bare):
            (folder / shard.name).write_bytes(data)


def test_an_index_of_an_older_moment(tmp_path):
    path, old = tmp_path / "c", {}
    for n in range(4):
        write(path, [f"{n} {i}" for i in range(60)], shard_bytes=4000)
        old[n] = files_of(path)
    content, shards = found(Engine, copied(path, tmp_path / "bare")), len(Reader(path).shards())
    for n in range(3):
        again = copied(
            path, tmp_path / f"{n}", {name: data for name, data in old[n].items() if name.endswith(".index")}
        )
        reader = Reader(again)
        assert 0 < reader.indexed_shards < shards
        assert (len(reader), sorted(reader)) == (240, sorted(content))
        assert all(key in reader for key in content)
        holds(again, content, wrong=False)
        write(again, ["more"])
        assert Reader(again).indexed_shards == shards + 1
    # And one of a later moment than the rest.
    early = copied(path, tmp_path / "early")
    for file in early.iterdir():
        file.unlink()
    for name, data in {**old[1], **{n: d for n, d in old[3].items() if n.endswith(".index")}}.items():
        (early / name).write_bytes(data)
    assert Reader(early).indexed_shards == 0
    holds(early, {key: value for key, value in content.items() if key[0] in "01"}, wrong=False)


@pytest.mark.parametrize("vocab_size", [V, V + 1])
def test_an_index_of_another_cache(world, tmp_path, vocab_size):
    with Writer(tmp_path / "other", vocab_size=vocab_size, temperatures=(1.0,)) as writer:
        for key in world.keys:
            writer.write(key, soft_targets(torch.randn(3, vocab_size), k=4), token_ids(key))
    (index,) = indices(tmp_path / "other")
    path = copied(world.folder, tmp_path / "c", {index.name: index.read_bytes()})
    assert read_all(path, world.content) == len(world.content)
    assert Reader(path).indexed_shards == 0
    world.holds(path)


def spoil(path, how):
    for file in indices(path):
        size = file.stat().st_size
        if how == "gone":
            file.unlink()
        elif how == "cut":
            os.truncate(file, 0)
        else:
            with file.open("r+b") as out:
                for page in range(size // PAGE_BYTES):
                    out.seek(PAGE_BYTES * page + 100)
                    out.write(b"damage")


@pytest.mark.parametrize("how", ["bits", "cut", "gone"])
@pytest.mark.parametrize("files", [1, 2])
def test_an_index_that_is_damaged_while_it_is_used(world, tmp_path, how, files):
    made = {}
    for index in [world.index] if files == 1 else world.in_two():
        made |= file_of(index)
    path = copied(world.folder, tmp_path / "c", made)
    used, forked, threaded = (Engine(path) for _ in range(3))
    some = world.keys[:10]

    def is_right(engine, keys):
        return all(bits(engine.fields(key)) == world.content[key] for key in keys)

    assert all(is_right(engine, some) for engine in (used, threaded, forked))
    spoil(path, how)
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = is_right(forked, world.keys) and len(forked.cache) == 120 and "no" not in forked.cache
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    start, right = threading.Barrier(4), []

    def read(seed):
        keys = random.Random(f"{SEED} {seed}").sample(world.keys, 120)
        start.wait()
        right.append(is_right(threaded, keys))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4
    assert is_right(used, world.keys)
    assert is_right(forked, world.keys)
    assert sorted(used.cache) == sorted(world.keys)
    assert (len(used.cache), "no" in used.cache, "k7" in used.cache) == (120, False, True)
    assert sorted(threaded.cache) == sorted(world.keys)
    world.holds(path, wrong=how != "gone")
