"""The index of a directory in plain Python: read, written and held against its shards as csrc/cache/FORMAT.md, 9, says.

Written from the document alone, as ``format_parts``, whose numbers in brackets are those here. What is written is what
it is given, sealed with right checksums: also what the document forbids.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from format_parts import (
    COMPACT,
    DRAWN,
    FIXED,
    METHODS,
    Claim,
    Frame,
    Header,
    Part,
    crc32c,
    cut,
    read_index,
    read_journal,
)

PAGE_BYTES, PAGE_ROWS = 4096, 56
_ROW, _PAGE_END = struct.Struct("<16s48sII"), struct.Struct("<QQ40sI")
_ENTRY, _SHARD, _TAIL = struct.Struct("<QQ16sIIHHBBBB"), struct.Struct("<QQQQQQII"), struct.Struct("<8sIIQQQQQQQIII")


class Entry(NamedTuple):
    """A frame in the index of its shard [4]."""

    offset: int
    frame_bytes: int
    token_hash: bytes
    header_bytes: int
    tokens: int
    kept: int
    key_bytes: int
    kind: int
    flags: int
    method: int
    codec: int


class Row(NamedTuple):
    hash: bytes
    entry: Entry
    shard: int  # number in the file's list
    zero: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return hash_order(self.hash)


class Page(NamedTuple):
    rows: Sequence[Row]
    id: int
    number: int
    zero: bytes = bytes(40)
    count: int | None = None  # None: as many as there are
    rest: bytes = b""  # behind the rows


class Shard(NamedTuple):
    writer: int
    shard_id: int
    bytes: int
    frames_end: int
    samples: int
    tokens: int
    ordinal: int
    zero: int = 0

    @property
    def name(self) -> str:
        return f"{self.writer:016x}-{self.ordinal:06d}.shard"


class Tail(NamedTuple):
    magic: bytes
    version: int
    header_crc: int
    id: int
    previous: int
    generation: int
    rows: int
    keys: int
    buckets: int
    pages: int
    shards: int
    shards_crc: int
    zero: int


@dataclass(frozen=True)
class Index:
    """One file."""

    file: str
    pages: list[Page]
    shards: list[Shard]
    tail: Tail

    @property
    def rows(self) -> list[Row]:
        return [row for page in self.pages for row in page.rows]

    def find(self, key: str) -> list[Row]:
        """The rows of a key, from its bucket on for as long as a page is full and holds no greater hash."""
        digest, found = key_hash(key), []
        for page in self.pages[bucket_of(digest, self.tail.buckets) :]:
            found += [row for row in page.rows if row.hash == digest]
            if len(page.rows) < PAGE_ROWS or page.rows[-1].order > hash_order(digest):
                break
        return found


def key_hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def hash_order(digest: bytes) -> tuple[int, int]:
    first, second = struct.unpack("<QQ", digest)
    return first, second


def bucket_of(digest: bytes, buckets: int) -> int:
    return hash_order(digest)[0] * buckets >> 64


# Reading.


def read_tail(file: str, data: bytes, header: Header) -> Tail:
    """The tail of an index file, which has the length that it says."""
    part = cut(file, data, max(0, len(data) - 88), 88, "tail of the index")
    tail = Tail(*_TAIL.unpack(part.data[:84]))
    part.check(tail.magic == b"KDFPAGES", "magic of the index")
    part.check(tail.version == 1, f"version {tail.version} of the index", "version")
    part.check(1 <= tail.buckets <= tail.pages and tail.shards >= 1, "buckets, pages or shards")
    part.check(tail.shards <= tail.rows <= PAGE_ROWS * tail.pages, "more rows than pages hold, or too few")
    length = PAGE_BYTES * tail.pages + _SHARD.size * tail.shards + 88
    part.check(length <= len(data), "the index is shorter than it says", "truncated")
    part.check(length == len(data), "the index is longer than it says")
    part.sealed(88)
    part.check(tail.id != 0 and tail.zero == 0 and tail.keys <= tail.rows, "fields of the tail")
    part.check(tail.generation < 2**63, "generation")
    part.check(f"{tail.id:016x}.index" == file, "the index has another's name", "mismatch")
    part.check(tail.header_crc == header.crc, "the index is another cache's", "mismatch")
    return tail


def read_shards(file: str, data: bytes, tail: Tail) -> list[Shard]:
    part = cut(file, data, PAGE_BYTES * tail.pages, _SHARD.size * tail.shards, "shards of the index")
    part.check(crc32c(part.data) == tail.shards_crc, "CRC of the shards", "checksum")
    shards = [Shard(*fields) for fields in _SHARD.iter_unpack(part.data)]
    for shard in shards:
        part.check(shard.zero == 0 and shard.shard_id != 0 and shard.ordinal < 10**6, "fields of a shard")
        part.check(shard.frames_end <= shard.bytes <= 2**48, "bytes of a shard")
        part.check(1 <= shard.samples <= shard.bytes, "samples of a shard")
    part.check(len({shard.shard_id for shard in shards}) == len(shards), "a shard is there twice", "mismatch")
    part.check(sum(s.samples for s in shards) == tail.rows, "rows are not the samples of the shards", "mismatch")
    return shards


def _read_page(file: str, data: bytes, number: int, tail: Tail) -> Page:
    part = cut(file, data, PAGE_BYTES * number, PAGE_BYTES, "page")
    part.sealed(PAGE_BYTES)
    owner, its_number, zero, count = _PAGE_END.unpack(part.data[4032:4092])
    part.check(count <= PAGE_ROWS and not any(zero), "fields of a page")
    part.zero(72 * count, 4032, "what is behind the rows")
    part.check((owner, its_number) == (tail.id, number), "the page belongs elsewhere", "mismatch")
    rows = [Row(d, Entry(*_ENTRY.unpack(e)), *n) for d, e, *n in _ROW.iter_unpack(part.data[: 72 * count])]
    return Page(rows, owner, its_number)


def _check_row(part: Part, row: Row, shards: Sequence[Shard], header: Header) -> None:
    entry = row.entry
    part.check(row.zero == 0 and row.shard < len(shards) and entry.kind == 1, "fields of a row")
    part.check(1 <= entry.key_bytes <= 4096, "key_bytes of a row")
    part.check(104 <= entry.header_bytes <= 96 + 4096 + 8 * 2**14 and entry.header_bytes % 8 == 0, "header_bytes")
    part.check(
        entry.header_bytes <= entry.frame_bytes and entry.frame_bytes % 8 == entry.offset % 8 == 0, "frame_bytes"
    )
    part.check(entry.tokens <= 2**20 and entry.kept >= 1 and entry.tokens * entry.kept <= 2**28, "tokens or kept")
    known = entry.method < len(METHODS) and entry.codec in (FIXED, COMPACT, DRAWN)
    part.check(entry.flags < 16 and known, "flags, method or codec of a row")
    end = shards[row.shard].frames_end
    part.check(len(header.raw) + 32 <= entry.offset <= end - entry.frame_bytes, "a row's frame is not in its shard")


def read_index_file(file: str, data: bytes, header: Header) -> Index:
    """A file of an index with every check that it allows by itself."""
    tail = read_tail(file, data, header)
    shards = read_shards(file, data, tail)
    pages = [_read_page(file, data, number, tail) for number in range(tail.pages)]
    last, reached = (0, 0), 0  # pages from ``reached`` up to the one that is read are full
    for page in pages:
        part = Part(file, PAGE_BYTES * page.number, b"")
        for row in page.rows:
            part.check(last <= row.order, "rows are in no order")
            part.check(reached <= bucket_of(row.hash, tail.buckets) <= page.number, "a row is in no page of its bucket")
            last = row.order
            _check_row(part, row, shards, header)
        if len(page.rows) < PAGE_ROWS:
            reached = page.number + 1
    index, whole = Index(file, pages, shards, tail), Part(file, 0, b"")
    rows = index.rows
    whole.check(len(rows) == tail.rows, "the pages have not as many rows as the tail says", "mismatch")
    whole.check(len({(row.shard, row.entry.offset) for row in rows}) == len(rows), "a frame is there twice")
    of_shards = Counter(row.shard for row in rows)
    right = all(of_shards[number] == shard.samples for number, shard in enumerate(shards))
    whole.check(right, "a shard has not as many rows as samples", "mismatch")
    return index


def read_claims(files: Mapping[str, bytes], header: Header) -> dict[tuple[int, int], Claim]:
    """What all journals say of each shard, by writer and ordinal."""
    journals = [name for name in files if re.fullmatch(r"[0-9a-f]{16}\.journal", name)]
    return {(c.writer, c.ordinal): c for name in journals for c in read_journal(name, files[name], header)}


def _is_as_claimed(shard: Shard, claim: Claim | None, files: Mapping[str, bytes]) -> bool:
    if claim is None or not claim.finished or claim.dropped:
        return False
    said = (claim.shard_id, *claim.records[-1][:2])
    return said == (shard.shard_id, shard.bytes, shard.samples) and len(files.get(shard.name, b"")) == shard.bytes


def read_chain(files: Mapping[str, bytes], header: Header) -> list[Index]:
    """The files of a directory's index, the newest first: none where there is none, or it is of an older state.

    Raises where one of them is not right, or where the tail of any cannot be read, which may be the newest. Of an older
    state tails and lists of shards have to be right, its pages nobody reads.
    """
    names = [name for name in files if re.fullmatch(r"[0-9a-f]{16}\.index", name)]
    tails = [read_tail(name, files[name], header) for name in names]
    if not tails:
        return []
    newest = max(tails, key=lambda tail: tail.generation)
    chain: dict[str, list[Shard]] = {}
    following = newest.id
    while following:
        name = f"{following:016x}.index"
        there = name in files and name not in chain
        Part(name, 0, b"").check(there, "the index builds on a file that is not there, or on itself", "mismatch")
        tail = read_tail(name, files[name], header)
        chain[name], following = read_shards(name, files[name], tail), tail.previous
    shards = [shard for some in chain.values() for shard in some]
    twice = len({shard.shard_id for shard in shards}) < len(shards)
    Part(names[0], 0, b"").check(not twice, "a shard is in two files of the index", "mismatch")
    claims = read_claims(files, header)
    if not all(_is_as_claimed(shard, claims.get((shard.writer, shard.ordinal)), files) for shard in shards):
        return []
    return [read_index_file(name, files[name], header) for name in chain]


def entry_of(frame: Frame) -> Entry:
    key_bytes = len(frame.key.encode())
    return Entry(frame.offset, frame.size, frame.token_hash, frame.header_bytes, frame.tokens, frame.kept, key_bytes, 1,
                 frame.flags, frame.method, frame.codec)  # fmt: skip


def finished_shards(files: Mapping[str, bytes], header: Header) -> dict[Shard, list[Row]]:
    """What an index says of every finished shard, from the shards' own indices; of the rows' ``shard`` nothing (0)."""
    out = {}
    for claim in read_claims(files, header).values():
        if not claim.finished or claim.dropped:
            continue
        data = files[claim.name + ".shard"]
        frames, _ = read_index(claim.name + ".shard", data, claim.shard_id, len(header.raw) + 32)
        (frames_end,) = struct.unpack("<Q", data[-24:-16])
        tokens = sum(frame.tokens for frame in frames)
        shard = Shard(claim.writer, claim.shard_id, len(data), frames_end, len(frames), tokens, claim.ordinal)
        out[shard] = [Row(key_hash(frame.key), entry_of(frame), 0) for frame in frames]
    return out


def check_chain(chain: Sequence[Index], files: Mapping[str, bytes], header: Header) -> None:
    """Holds every row of an index in use against its shard."""
    finished = finished_shards(files, header)
    older: set[bytes] = set()
    for index in reversed(chain):
        whole = Part(index.file, 0, b"")
        for number, shard in enumerate(index.shards):
            whole.check(shard in finished, "a shard is not what the index says of it", "mismatch")
            rows = Counter(row._replace(shard=0) for row in index.rows if row.shard == number)
            whole.check(rows == Counter(finished[shard]), "rows are not those of the shard", "mismatch")
        hashes = {row.hash for row in index.rows}
        whole.check(index.tail.keys == len(hashes - older), "the number of keys", "mismatch")
        older |= hashes


# Writing.


def seal(data: bytes) -> bytes:
    return data + struct.pack("<I", crc32c(data))


def pack_page(page: Page) -> bytes:
    rows = b"".join(_ROW.pack(row.hash, _ENTRY.pack(*row.entry), row.shard, row.zero) for row in page.rows)
    count = len(page.rows) if page.count is None else page.count
    return seal((rows + page.rest).ljust(4032, b"\0") + _PAGE_END.pack(page.id, page.number, page.zero, count))


def pack_shards(shards: Iterable[Shard]) -> bytes:
    return b"".join(_SHARD.pack(*shard) for shard in shards)


def pack(pages: Iterable[Page], shards: Iterable[Shard], tail: Tail) -> bytes:
    """A file of these parts; their counts are what ``tail`` says, whatever there is."""
    return b"".join(map(pack_page, pages)) + pack_shards(shards) + seal(_TAIL.pack(*tail))


def place(rows: Iterable[Row], identity: int, buckets: int) -> list[Page]:
    """The pages of rows, each in that of its bucket or, where that and all up to there are full, in a later one."""
    pages: list[list[Row]] = [[] for _ in range(buckets)]
    at = 0
    for row in sorted(rows, key=lambda row: row.order):
        at = max(at, bucket_of(row.hash, buckets))
        at += len(pages[at]) == PAGE_ROWS
        if at == len(pages):
            pages.append([])
        pages[at].append(row)
    return [Page(one, identity, number) for number, one in enumerate(pages)]


def compose(
    shards: Mapping[Shard, Sequence[Row]],
    header: Header,
    identity: int,
    buckets: int = 1,
    *,
    previous: int = 0,
    generation: int = 1,
    older: Iterable[bytes] = (),
) -> Index:
    """A right file of these shards and their rows; ``older`` are the hashes of the files that it builds on."""
    rows = [row._replace(shard=number) for number, some in enumerate(shards.values()) for row in some]
    keys = len({row.hash for row in rows}.difference(older))
    tail = Tail(b"KDFPAGES", 1, header.crc, identity, previous, generation, 0, keys, buckets, 0, 0, 0, 0)
    return recounted(Index(f"{identity:016x}.index", place(rows, identity, buckets), list(shards), tail))


def recounted(index: Index) -> Index:
    """With a tail that counts what is there."""
    counts = {"rows": len(index.rows), "pages": len(index.pages), "shards": len(index.shards)}
    tail = index.tail._replace(**counts, shards_crc=crc32c(pack_shards(index.shards)))
    return Index(index.file, index.pages, index.shards, tail)
