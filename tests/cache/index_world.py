"""A cache of one moment and the next, whose index is whatever a test says, and what must hold of it."""

from __future__ import annotations

import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import SEED
from format_index import (
    Index,
    Row,
    check_chain,
    compose,
    finished_shards,
    key_hash,
    pack,
    pack_shards,
    place,
    read_chain,
    recounted,
)
from format_parts import FormatError, crc32c, read_header
from format_readers import Engine, Packed, bits, found

from kdfast import CacheError, soft_targets
from kdfast.cache import Reader, Writer, repair, verify

V = 50
CODES = {"missing", "version", "truncated", "checksum", "corrupt", "mismatch", "duplicate", "misaligned"}
MOST_BYTES = 256 << 20  # that an index may make a reader take


def targets(tokens=3):
    return soft_targets(torch.randn(tokens, V), k=4)


def write(path, keys, **options):
    """Samples whose token ids are those of their key, so that a key written again has them again."""
    with Writer(path, vocab_size=V, threads=1, **options) as writer:
        for key in keys:
            writer.write(key, targets(), token_ids(key))


def token_ids(key):
    return torch.tensor([*key_hash(key)[:3]])


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def header_of(files):
    return read_header("cache.header", files["cache.header"])


def chain_of(folder):
    files = files_of(folder)
    return read_chain(files, header_of(files))


def indices(folder):
    return sorted(folder.glob("*.index"))


def copied(folder, to, index=None):
    """A cache without its index, and with the files ``index`` instead."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.index", "manifest.json"))
    for name, data in (index or {}).items():
        (to / name).write_bytes(data)
    return to


def file_of(index):
    return {index.file: pack(index.pages, index.shards, index.tail)}


def is_wrong(folder):
    """Whether the document finds fault with the index in use, or the newest."""
    files = files_of(folder)
    try:
        check_chain(read_chain(files, header_of(files)), files, header_of(files))
    except FormatError:
        return True
    return False


@contextmanager
def in_bounds():
    """Whoever takes more memory is refused it."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(ask):
    """What is answered, or the code of the refusal."""
    try:
        return ask()
    except CacheError as error:
        if error.code not in CODES:
            raise
        return error.code


def read_all(folder, content, later=None):
    """How many keys are read, each of them right; the others are refused.

    ``later`` has what the key's other frame holds, for an index that keeps the first from us.
    """
    read = 0
    with in_bounds():
        engine, packed = (attempt(lambda kind=kind: kind(folder)) for kind in (Engine, Packed))
        if engine in CODES:
            return 0
        attempt(lambda: len(engine.cache))
        attempt(engine.keys)
        for number, (key, want) in enumerate(content.items()):
            ids = token_ids(key)
            right = (want, (later or {}).get(key, want), *CODES)
            got = attempt(lambda key=key: bits(engine.fields(key)))
            assert got in right, key
            there = attempt(lambda key=key, ids=ids: engine.check_tokens(key, ids))
            assert there is None or there in CODES
            if number % 10 == 0 or got != want:
                assert attempt(lambda key=key: bits(packed.fields(key))) in right, key
                assert attempt(lambda key=key, ids=ids: engine.check_tokens(key, ids + 1)) in CODES, key
                attempt(lambda key=key: (key in engine.cache, engine.cache.tokens(key), engine.cache.prefetch([key])))
            read += got == want and there is None
    return read


def holds(folder, content, wrong=None, later=None):
    """The rule of a cache whose index is whatever it is; ``wrong`` where it is or is not, else the document says."""
    read_all(folder, content, later)
    faults = verify(folder).faults
    assert bool(faults) == (is_wrong(folder) if wrong is None else wrong), [str(fault) for fault in faults]
    repair(folder)
    assert verify(folder).faults == []
    assert read_all(folder, content) == len(content)
    assert sorted(Reader(folder)) == sorted(content)
    assert not is_wrong(folder)


class World:
    """A cache of three writers with some duplicates, what is in it, and an index of three pages and one bucket."""

    def __init__(self, folder):
        torch.manual_seed(SEED)
        keys = [f"k{i}" for i in range(120)]
        write(folder / "full", keys[:60], shard_bytes=3000)
        write(folder / "full", keys[60:100], shard_bytes=1500)
        with Writer(folder / "full", vocab_size=V) as one, Writer(folder / "full", vocab_size=V) as other:
            for key in keys[100:]:
                one.write(key, targets(), token_ids(key))
            one.commit()
            names = sorted(path.name for path in (folder / "full").glob("*.journal"))
            for key in keys[100:110]:
                other.write(key, targets(), token_ids(key))
        self.folder = copied(folder / "full", folder / "bare")
        self.keys = keys
        self.content = found(Engine, self.folder)
        assert sorted(self.content) == sorted(keys)
        assert not any(value in CODES for value in self.content.values())
        self.later = self.read_by_others(folder, names)
        self.files = files_of(self.folder)
        self.header = header_of(self.files)
        self.shards = finished_shards(self.files, self.header)
        self.index = compose(self.shards, self.header, 0xABCD)
        assert [len(page.rows) for page in self.index.pages] == [56, 56, 18]

    def read_by_others(self, folder, names):
        """What the frames hold that do not count."""
        for name in names:
            alone = copied(self.folder, folder / name)
            (alone / name).unlink()
            later = found(Engine, alone)
            if len(later) == len(self.keys) - 10:
                return {key: later[key] for key in self.keys[100:110]}
        raise AssertionError

    def holds(self, path, wrong=None):
        holds(path, self.content, wrong, self.later)

    def with_rows(self, rows):
        index = self.index
        return recounted(Index(index.file, place(rows, index.tail.id, 1), index.shards, index.tail))

    def with_row(self, number, **fields):
        """The entry's or the row's fields are others."""
        rows = self.index.rows
        row = rows[number]
        of_row = {name: fields.pop(name) for name in Row._fields if name in fields}
        rows[number] = row._replace(entry=row.entry._replace(**fields), **of_row)
        return self.with_rows(rows)

    def with_page(self, place, **fields):
        index = self.index
        pages = list(index.pages)
        pages[place] = pages[place]._replace(**fields)
        return Index(index.file, pages, index.shards, index.tail)

    def with_shard(self, place, **fields):
        index = self.index
        shards = list(index.shards)
        shards[place] = shards[place]._replace(**fields)
        return Index(index.file, index.pages, shards, index.tail._replace(shards_crc=crc32c(pack_shards(shards))))

    def with_tail(self, **fields):
        index = self.index
        return Index(index.file, index.pages, index.shards, index.tail._replace(**fields))

    def in_two(self, identities=(1, 2), previous=(0, 1), generations=(1, 2)):
        """Files of half of the shards each, the older first."""
        halves = [dict(list(self.shards.items())[i::2]) for i in range(2)]
        older = {row.hash for rows in halves[0].values() for row in rows}
        return [
            compose(halves[i], self.header, identities[i], 2, previous=previous[i], generation=generations[i],
                    older=older if i else ())
            for i in range(2)
        ]  # fmt: skip
