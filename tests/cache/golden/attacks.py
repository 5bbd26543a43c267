"""Faults, one for each thing that the format forbids; ``make_cache`` keeps them as patches of the cache ``base``.

A row names the fault, the code that it gives and where: "open" where the cache cannot be opened, else the key whose
reading fails while all the others stay readable. ``settles`` marks codes that the document leaves to be inferred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import format_writer as w
from format_parts import GOLD, HASHED, RAGGED, SEEDED
from make_cache import ALICE, BOB, Files, Teacher, drop, files_of, journal_of, token_hash

VOCAB = 300
META: dict[str, object] = {"revision": "r", "teacher": "t"}
TEACHER = Teacher(VOCAB, (0.5,), metadata=META)
HEADER = TEACHER.header
ALL = RAGGED | GOLD | HASHED
TOKENS = [
    w.Fixed(-1.0, (299, 0, 7), (3, 400), (-0.5,), -2.0),
    w.Fixed(0.0, (), (), (0.25,), -1.0),
    w.Fixed(-0.75, (1, 2), (20,), (0.125,), -math.inf),
]
ONE = -math.log(1 + math.exp(-20 / 2**8))  # top of the last of them whose mass is 1
COUNTS = [w.Drawn(-1.0, (3, 90), (0, 2), None, -1.0), w.Drawn(-2.0, (), (), None, -1.0)]
WEIGHTS = [w.Drawn(-1.0, (3, 90), (0, 40), 0.125), w.Drawn(-2.0, (), (), 0.0)]


def fixed(key: str = "fixed", tokens: Sequence[w.Fixed] = TOKENS, kept: int = 3, **fields: Any) -> w.SampleFrame:
    given: dict[str, Any] = {"flags": ALL, "token_hash": token_hash([1, 2, 3]), "expect": False}
    return TEACHER.fixed(key, tokens, kept, **given | fields)


def drawn(tokens: Sequence[w.Drawn] = COUNTS, **fields: Any) -> w.SampleFrame:
    given = {"flags": RAGGED | GOLD | SEEDED, "seed": 5, "method": 2, "parameter": 4.0, "gap_order": 5, "order": 1}
    return TEACHER.drawn("drawn", tokens, 3, **{**given, "expect": False, **fields})


def pps(tokens: Sequence[w.Drawn] = WEIGHTS, **fields: Any) -> w.SampleFrame:
    given = {"flags": RAGGED, "method": 3, "grid": 5, "gap_order": 5, "order": 1}
    return TEACHER.drawn("pps", tokens, 3, **{**given, "expect": False, **fields})


def late(key: str = "late", **fields: Any) -> w.SampleFrame:
    return fixed(key, [w.Fixed(-1.0, (5,), (), (0.0,))], 1, flags=0, token_hash=bytes(16), **fields)


A = w.Shard(HEADER, 0xA0A0, ALICE, 0, [fixed(expect=True), drawn(expect=True), pps(expect=True)])
B = w.Shard(HEADER, 0xB1B1, BOB, 0, [late(expect=True), late("torn")], finished=False)


def cache(
    *, header: bytes = HEADER, a: w.Shard = A, b: w.Shard = B, first: Sequence[w.Record] | None = None, cut: int = 20
) -> Files:
    """``base``, with other parts in it; of B's second frame, which was not committed, ``cut`` bytes are not there."""
    if first is None:
        first = journal_of(header, [a], commits=[2])
    files = files_of(header, {ALICE: (first, [a]), BOB: (journal_of(header, [b], commits=[1], close=False), [b])})
    return files | {b.name: files[b.name][:-cut]}


BASE = cache(), TEACHER
Case = tuple[dict[str, Any], Files]


def case(name: str, code: str, files: Files, where: str = "open", settles: bool = False) -> Case:
    return {"name": name, "code": code, "where": where, "settles": settles}, files


def with_header(header: bytes) -> Files:
    return cache(header=header, a=replace(A, header=header), b=replace(B, header=header))


def headers() -> Iterator[Case]:
    n_at, end = 20, 32 + 8 + len(HEADER[40:-4].rstrip(b"\0"))
    meta = HEADER[40:end]

    def patched(at: int, data: bytes) -> Files:
        return with_header(w.header(VOCAB, (0.5,), metadata=meta, patch=[(at, data)]))

    yield case("header: magic", "corrupt", patched(0, b"KDFCACHF"))
    yield case("header: version 2", "version", patched(8, w.u32(2)))
    yield case("header: version 0", "version", patched(8, w.u32(0)))
    yield case("header: vocab_size 0", "corrupt", patched(16, w.u32(0)))
    yield case("header: vocab_size 2^24 + 1", "corrupt", patched(16, w.u32(2**24 + 1)))
    yield case("header: no temperature", "corrupt", patched(n_at, w.u8(0)))
    yield case("header: more temperatures than fit", "corrupt", patched(n_at, w.u8(3)))
    yield case("header: shift 2", "corrupt", patched(21, w.u8(2)))
    yield case("header: zero u16", "corrupt", patched(22, w.u16(1)))
    yield case("header: zero u32", "corrupt", patched(28, w.u32(1 << 31)))
    yield case("header: metadata_bytes beyond the end", "corrupt", patched(24, w.u32(end)))
    yield case("header: padding", "corrupt", patched(len(HEADER) - 5, b"\1"))
    for name, values in {
        "descend": (1.0, 0.5),
        "repeat": (1.0, 1.0),
        "0": (0.0, 1.0),
        "negative": (-1.0, 1.0),
        "infinite": (1.0, math.inf),
        "NaN": (math.nan, 1.0),
    }.items():
        yield case(f"header: temperatures {name}", "corrupt", with_header(w.header(VOCAB, values, metadata=meta)))
    yield case("header: 17 temperatures", "corrupt", with_header(w.header(VOCAB, [i + 1.0 for i in range(17)])))
    for name, text in (
        ("no JSON", b"{"),
        ("no object", b"[]"),
        ("empty", b""),
        ("no UTF-8", b'{"a":"\xff"}'),
        ("NaN", b'{"a":NaN}'),
        ("infinite", b'{"a":[-Infinity]}'),
        ("nested without end", b'{"a":' + b"[" * 5000),
    ):
        yield case(f"metadata: {name}", "corrupt", with_header(w.header(VOCAB, (0.5,), metadata=text)))
    yield case("cache.header: missing", "missing", {k: v for k, v in BASE[0].items() if k != "cache.header"})
    yield case("cache.header: cut", "truncated", BASE[0] | {"cache.header": HEADER[:-8]})
    yield case("cache.header: cut in its fixed part", "truncated", BASE[0] | {"cache.header": HEADER[:31]})
    yield case("cache.header: empty", "truncated", BASE[0] | {"cache.header": b""})
    yield case("cache.header: followed by something", "corrupt", BASE[0] | {"cache.header": HEADER + bytes(8)})
    yield case("cache.header: a bit", "checksum", BASE[0] | {"cache.header": w.patched(HEADER, [(50, b"~")])})
    longer = HEADER[:12] + w.u32(len(HEADER) + 8) + HEADER[16:-4] + bytes(8)
    yield case("header: 8 bytes too long", "corrupt", with_header(w.sealed(longer)))


def shards() -> Iterator[Case]:
    other = Teacher(VOCAB, (0.5,), metadata=META | {"revision": "s"}).header
    yield case("shard: other cache header", "mismatch", BASE[0] | {A.name: replace(A, header=other).pack()})
    bit = w.patched(BASE[0][A.name], [(50, b"~")])
    yield case("shard: a bit of its cache header", "checksum", BASE[0] | {A.name: bit})
    yield case("shard header: magic", "corrupt", cache(a=replace(A, own=[(0, b"KDFSHARE")])))
    yield case("shard header: shard_id", "mismatch", cache(a=replace(A, own=[(8, w.u64(7))])))
    yield case("shard header: writer", "mismatch", cache(a=replace(A, own=[(16, w.u64(BOB))])))
    yield case("shard header: ordinal", "mismatch", cache(a=replace(A, own=[(24, w.u32(1))])))
    bit = w.patched(BASE[0][A.name], [(len(HEADER) + 30, b"\0")])
    yield case("shard header: a bit", "checksum", BASE[0] | {A.name: bit})
    yield case("shard: missing", "missing", {k: v for k, v in BASE[0].items() if k != A.name})
    yield case("shard: open one missing", "missing", {k: v for k, v in BASE[0].items() if k != B.name})
    unnamed = {k if k != A.name else A.name.replace(".shard", ".open"): v for k, v in BASE[0].items()}
    yield case("shard: finished, not renamed", "missing", unnamed)
    yield case("shard: cut", "truncated", BASE[0] | {A.name: BASE[0][A.name][:-8]})
    yield case("shard: empty", "truncated", BASE[0] | {A.name: b""})
    committed = B.ends()[1]
    yield case(
        "shard: open one cut before its commit", "truncated", BASE[0] | {B.name: BASE[0][B.name][: committed - 1]}
    )
    yield case(
        "shard: something after the tail", "corrupt", BASE[0] | {A.name: BASE[0][A.name] + bytes(8)}, "open", True
    )


def indexes() -> Iterator[Case]:
    def patched(at: int, data: bytes) -> Files:
        return cache(a=replace(A, index=[(at, data)]))

    keys = 32 + 48 * 3
    yield case("index: magic", "corrupt", patched(0, b"KDFINDEY"))
    yield case("index: shard_id", "mismatch", patched(8, w.u64(1)))
    yield case("index: entries", "corrupt", patched(16, w.u64(4)))
    yield case("index: 2^64 - 1 entries", "corrupt", patched(16, w.u64(2**64 - 1)))
    yield case("index: key_bytes", "corrupt", patched(24, w.u64(14)))
    yield case("index: padding", "corrupt", cache(a=replace(A, index_extra=b"\1")))
    yield case("index: 8 bytes too long", "corrupt", cache(a=replace(A, index_extra=bytes(8))))
    yield case("index: a bit", "checksum", BASE[0] | {A.name: w.patched(BASE[0][A.name], [(A.ends()[-2] + 40, b"\7")])})
    first = A.first
    yield case("index: first frame not after the headers", "corrupt", patched(32, w.u64(first - 8)))
    yield case("index: a hole", "corrupt", patched(32 + 48, w.u64(A.ends()[1] + 8)))
    yield case("index: frame_bytes", "corrupt", patched(40, w.u64(A.ends()[1] - first + 8)))
    last = A.ends()[3] - A.ends()[2] - 8
    yield case("index: frames end before it", "corrupt", patched(32 + 48 * 2 + 8, w.u64(last)))
    yield case("index: kind 0", "corrupt", patched(32 + 44, w.u8(0)))
    yield case("index: kind 3", "corrupt", patched(32 + 44, w.u8(3)))
    yield case("index: a model with tokens", "corrupt", patched(32 + 44, w.u8(2)))
    yield case("index: key lengths", "corrupt", patched(32 + 42, w.u16(6)))
    yield case(
        "index: key without bytes", "corrupt", cache(a=replace(A, index=[(32 + 42, w.u16(0)), (80 + 42, w.u16(10))]))
    )
    yield case("index: tokens beyond the limit", "corrupt", patched(32 + 36, w.u32(2**20 + 1)))
    yield case("index: tokens x kept", "corrupt", patched(32 + 36, w.u32(2**13) + w.u16(2**16 - 1)))
    yield case("index: kept 0", "corrupt", patched(32 + 40, w.u16(0)))
    yield case("index: flag 16", "corrupt", patched(32 + 45, w.u8(16)))
    yield case("index: method 4", "corrupt", patched(32 + 46, w.u8(4)))
    yield case("index: codec 0", "corrupt", patched(32 + 47, w.u8(0)))
    yield case("index: codec 4", "corrupt", patched(32 + 47, w.u8(4)))
    yield case("index: NUL in a key", "corrupt", patched(keys + 1, b"\0"))
    yield case("index: key not UTF-8", "corrupt", patched(keys, b"\xc0\x80"))
    for at, data, name in (
        (16, b"\0", "token_hash"),
        (32, w.u32(64), "header_bytes"),
        (36, w.u32(4), "tokens"),
        (40, w.u16(2), "kept"),
        (45, w.u8(GOLD | HASHED), "flags"),
        (46, w.u8(1), "method"),
        (47, w.u8(2), "codec"),
    ):
        yield case(f"index: {name} is not the frame's", "mismatch", patched(32 + at, data), "fixed", True)
    yield case("index: key is not the frame's", "mismatch", patched(keys, b"fixeD"), "fixeD", True)

    def tailed(at: int, data: bytes) -> Files:
        return cache(a=replace(A, tail=[(at, data)]))

    whole, at = BASE[0][A.name], A.ends()[-2]
    yield case("tail: magic", "corrupt", BASE[0] | {A.name: whole[:-1] + b"U"})
    yield case("tail: shard_id", "mismatch", tailed(0, w.u64(1)))
    yield case("tail: offset", "corrupt", tailed(8, w.u64(at + 8)))
    yield case("tail: length", "corrupt", tailed(16, w.u64(2**64 - 8)))
    yield case("tail: index between multiples of 8", "corrupt", tailed(8, w.u64(at + 4) + w.u64(len(whole) - 36 - at)))
    yield case("tail: a bit", "checksum", BASE[0] | {A.name: w.patched(whole, [(len(whole) - 32, b"\0")])})


def one(frame: w.SampleFrame, index: w.Patch = ()) -> Files:
    """``base`` with a frame in the place of that of the same key."""
    frames = [frame if old.key == frame.key else old for old in A.frames]
    return cache(a=replace(A, frames=frames, index=index))


def bad(name: str, files: Files, key: str = "fixed", code: str = "corrupt", settles: bool = False) -> Case:
    return case(name, code, files, key, settles)


def frames() -> Iterator[Case]:
    sound = w.index(A.shard_id, A.first, A.packed())

    def patched(at: int, data: bytes, frame: w.SampleFrame = A.frames[0]) -> Files:
        entry = 32 + 48 * A.frames.index(frame)
        return one(replace(frame, patch=[(at, data)]), [(entry + 16, sound[entry + 16 : entry + 48])])

    table = 88 + 8
    yield bad("frame: magic", patched(0, b"KDFS"))
    yield bad("frame: offset", patched(16, w.u64(A.first + 8)), "fixed", "mismatch", True)
    yield bad("frame: shard_id", patched(24, w.u64(0xB1B1)), "fixed", "mismatch", True)
    yield bad("frame: header_bytes", one(A.frames[0], [(32 + 32, w.u32(128))]), "fixed", "mismatch", True)
    yield bad("frame: seed without its flag", patched(32, w.u64(1)))
    yield bad("frame: parameter of topk", patched(40, w.f64(0.5)))
    yield bad("frame: tokens beyond the limit", patched(64, w.u32(2**20 + 1)))
    yield bad("frame: more tokens than blocks", patched(64, w.u32(65)))
    yield bad("frame: no tokens, a block", patched(64, w.u32(0)))
    yield bad("frame: kept 0", patched(68, w.u16(0)))
    yield bad("frame: tokens x kept", one(_many(2**12 + 256, 2**16 - 1), [(32 + 36, w.u32(1))]))
    yield bad("frame: block_tokens 100", patched(72, w.u16(100)))
    yield bad("frame: block_tokens 0", patched(72, w.u16(0)))
    yield bad("frame: codec 0", patched(74, w.u8(0)))
    yield bad("frame: codec 4", patched(74, w.u8(4)))
    yield bad("frame: codec 3 with topk", patched(74, w.u8(3)))
    yield bad("frame: codec 1 with sample", patched(74, w.u8(1), A.frames[1]), "drawn")
    yield bad("frame: method 4", patched(75, w.u8(4)))
    yield bad("frame: grid 1", patched(76, w.u8(1)))
    yield bad("frame: grid 11", patched(76, w.u8(11)))
    yield bad("frame: flag 16", patched(77, w.u8(ALL | 16)))
    yield bad("frame: seeded topk", patched(77, w.u8(ALL | SEEDED)))
    yield bad("frame: token_hash without its flag", patched(77, w.u8(RAGGED | GOLD)))
    yield bad("frame: zero u16", patched(78, w.u16(1)))
    yield bad("frame: model of codec 1", patched(80, w.u64(A.first)))
    yield bad("frame: padding of the key", patched(88 + 7, b"\1"))
    yield bad("frame: length of a block", patched(table, w.u32(len(A.frames[0].blocks[0]) + 8)))
    yield bad("frame: length of a block not a multiple of 8", patched(table, w.u32(len(A.frames[0].blocks[0]) + 1)))
    most = 256 + 3 * (128 + 20 * 3)
    assert most % 8 == 4
    long = replace(A.frames[0], blocks=[A.frames[0].blocks[0].ljust(most + 4, b"\0")])
    yield bad("frame: a block longer than its tokens can be", one(long))
    yield bad("frame: blocks", patched(table + 8, w.u32(2)))
    for name, frame in {
        "key_bytes": replace(B.frames[0], patch=[(70, w.u16(9))]),
        "no key": replace(B.frames[0], key=b""),
        "NUL in a key": replace(B.frames[0], key=b"la\0te"),
        "key not UTF-8": replace(B.frames[0], key=b"\xed\xa0\x80"),
        "key of 4097 bytes": replace(B.frames[0], key=b"k" * 4097),
    }.items():
        yield case(f"frame: {name}", "corrupt", cache(b=replace(B, frames=[frame, B.frames[1]])))
    yield bad("frame: draws beyond the limit", patched(40, w.f64(2.0**24 + 2), A.frames[1]), "drawn")
    yield bad("frame: header_bytes is not a header's", one(replace(A.frames[0], damage=[(4, w.u32(96))])))
    yield bad(
        "frame: header_bytes of another", one(replace(A.frames[0], damage=[(4, w.u32(120))])), "fixed", "checksum"
    )
    yield bad(
        "frame: frame_bytes beyond the frame", one(replace(A.frames[0], damage=[(9, b"\7")])), "fixed", "truncated"
    )
    yield bad("frame: a bit of its header", one(replace(A.frames[0], damage=[(33, b"\1")])), "fixed", "checksum")
    yield bad(
        "frame: a bit of a block", one(replace(A.frames[0], damage=[(table + 8 + 8 + 3, b"\1")])), "fixed", "checksum"
    )
    for value in (0.0, -1.0, 1.5, math.nan, math.inf):
        yield bad(f"frame: {value} draws", patched(40, w.f64(value), A.frames[1]), "drawn")
    yield bad("frame: parameter of pps", patched(40, w.f64(1.0), A.frames[2]), "pps")
    for value in (-0.5, 1.5, math.nan):
        yield bad(f"frame: topp aims at {value}", one(fixed(method=1, parameter=value)), "fixed", "corrupt", True)
    for name, at, where in (("its header", 33, "open"), ("a block", 115, "late")):
        damaged = replace(B, frames=[replace(B.frames[0], damage=[(at, b"\1")]), B.frames[1]])
        yield case(f"frame: of an open shard, a bit of {name}", "checksum", cache(b=damaged), where, where == "open")


def fixed_blocks() -> Iterator[Case]:
    a, b, c = TOKENS
    faults = {
        "top above 0": [replace(a, top=1e-45), b, c],
        "top NaN": [replace(a, top=math.nan), b, c],
        "top infinite": [replace(a, top=-math.inf), b, c],
        "top of no entries": [a, replace(b, top=-1.0), c],
        "top -0 of no entries": [a, replace(b, top=-0.0), c],
        "lse infinite": [replace(a, lse=(math.inf,)), b, c],
        "lse NaN": [a, replace(b, lse=(math.nan,)), c],
        "gold above 0": [replace(a, gold=1e-45), b, c],
        "gold NaN": [replace(a, gold=math.nan), b, c],
        "an id beyond the vocabulary": [replace(a, ids=(VOCAB, 0, 7)), b, c],
        "a long escape for a short delta": [replace(a, deltas=(3, b"\xff" + w.u32(269))), b, c],
        "steps of 2^24": [replace(a, deltas=(1, 2**24 - 1)), b, c],
        "delta of 2^32 - 1": [replace(a, deltas=(1, 2**32 - 1)), b, c],
        "a nibble too many": [a, b, replace(c, deltas=(20, 1))],
        "k_eff above kept": [replace(a, ids=(299, 0, 7, 8), deltas=(3, 4, 5)), b, c],
        "an id twice": [a, b, replace(c, ids=(2, 2))],
        "a mass of 1.00003": [a, b, replace(c, top=ONE + 3e-5)],
        "a mass of 16": [replace(a, top=-0.0, ids=range(3, 19), deltas=[0] * 15), b, c],
        "a mass of 1.0003 at temperature 0.5": [replace(a, top=-0.0, ids=(4,), deltas=(), lse=(-3e-4,)), b, c],
    }
    for name, tokens in faults.items():
        settles = name.startswith("top -0")
        kept = 16 if name == "a mass of 16" else 3
        yield bad(f"fixed: {name}", one(fixed(tokens=tokens, kept=kept)), "fixed", "corrupt", settles)
    yield bad("fixed: something after the sections", one(fixed(block={"extra": b"\1"})))
    yield bad("fixed: 8 bytes too long", one(fixed(block={"extra": bytes(8)})))
    sections = A.frames[0].blocks[0]
    yield bad("fixed: sections cut off", one(replace(A.frames[0], blocks=[sections[:-8]])), settles=True)
    yield bad("fixed: a block of no bytes", one(replace(A.frames[0], blocks=[b""])), settles=True)
    last_of_ids = 4 * 3 * 3 + 2 * 3 + 3  # 27 bits
    spare = w.patched(sections, [(last_of_ids, w.u8(sections[last_of_ids] | 128))])
    yield bad("fixed: bits after the last id", one(replace(A.frames[0], blocks=[spare])))
    padding = w.patched(sections, [(len(sections) - 1, b"\1")])
    yield bad("fixed: padding", one(replace(A.frames[0], blocks=[padding])))


def drawn_blocks() -> Iterator[Case]:
    d, e = COUNTS
    for name, tokens in {
        "neg_entropy above 0": [replace(d, neg_entropy=1e-45), e],
        "neg_entropy NaN": [replace(d, neg_entropy=math.nan), e],
        "neg_entropy infinite": [d, replace(e, neg_entropy=-math.inf)],
        "gold above 0": [replace(d, gold=0.5), e],
        "an id beyond the vocabulary": [replace(d, ids=(3, VOCAB)), e],
        "more draws than there were": [replace(d, values=(0, 4)), e],
        "more draws than there were, together": [replace(d, values=(1, 2)), e],
        "value of 2^24": [replace(d, values=(0, 2**24)), e],
        "value of 2^40": [replace(d, values=(0, 2**40)), e],
        "k_eff above kept": [replace(d, ids=(1, 2, 3, 4), values=(0, 0, 0, 0)), e],
    }.items():
        yield bad(f"drawn: {name}", one(drawn(tokens=tokens)), "drawn")
    far = [replace(d, ids=(3, 2**25)), e]
    yield bad("drawn: a gap of 2^25", one(drawn(tokens=far, gap_order=0)), "drawn")
    yield bad("drawn: 8 bytes too long", one(drawn(block={"extra": bytes(8)})), "drawn")
    stream = A.frames[1].blocks[0]
    codes = 4 * 2 * 2 + 2
    yield bad(
        "drawn: gap order 24", one(replace(A.frames[1], blocks=[w.patched(stream, [(codes, w.u8(24))])])), "drawn"
    )
    yield bad(
        "drawn: value order 24", one(replace(A.frames[1], blocks=[w.patched(stream, [(codes + 1, w.u8(24))])])), "drawn"
    )
    last_of_stream = codes + 2 + 2  # 18 bits
    for name, block in {
        "bits after the stream": w.patched(stream, [(last_of_stream, w.u8(stream[last_of_stream] | 128))]),
        "padding": w.patched(stream, [(last_of_stream + 1, b"\1")]),
    }.items():
        yield bad(f"drawn: {name}", one(replace(A.frames[1], blocks=[block])), "drawn")
    zeros = w.padded(stream[: codes + 2] + bytes(6))
    yield bad("drawn: a stream of zeros", one(replace(A.frames[1], blocks=[zeros])), "drawn")
    f, g = WEIGHTS
    for name, weights, settles in (
        ("step 0", [replace(f, step=0.0), g], False),
        ("step negative", [replace(f, step=-1.0), g], False),
        ("step infinite", [replace(f, step=math.inf), g], False),
        ("step NaN", [replace(f, step=math.nan), g], False),
        ("step of no entries", [f, replace(g, step=0.5)], False),
        ("a mass that is infinite", [replace(f, values=(0, 32 * 91)), g], True),
        ("a value of more than 104 nats", [replace(f, values=(0, 32 * 104 + 1), step=1e-42), g], False),
    ):
        yield bad(f"pps: {name}", one(pps(weights)), "pps", "corrupt", settles)
    two = Teacher(VOCAB, (0.5, 1.0), metadata=META).header
    shards = replace(A, header=two, frames=A.frames[:2]), replace(B, header=two)
    yield case("drawn: two temperatures", "corrupt", cache(header=two, a=shards[0], b=shards[1]), "drawn")


def _many(tokens: int, kept: int) -> w.SampleFrame:
    """A frame whose header promises more than its blocks could hold."""
    return w.SampleFrame("fixed", tokens, kept, [bytes(8)] * (tokens // 256), flags=RAGGED, block_tokens=256)


def journals() -> Iterator[Case]:
    good = journal_of(HEADER, [A], commits=[2])  # begin, open, commit, finish, close
    name = f"{ALICE:016x}.journal"

    def at(number: int, **fields: Any) -> Files:
        return cache(first=[*good[:number], replace(good[number], **fields), *good[number + 1 :]])

    raw = BASE[0][name]
    yield case("journal: magic", "corrupt", at(1, patch=[(0, b"KDFK")]))
    yield case("journal: type 7", "corrupt", at(4, patch=[(4, w.u32(7))]))
    yield case("journal: type 0", "corrupt", at(4, patch=[(4, w.u32(0))]))
    yield case("journal: writer", "mismatch", at(1, patch=[(8, w.u64(BOB))]))
    yield case("journal: number", "corrupt", at(1, patch=[(16, w.u32(2))]))
    for what, at_record in (("in the middle", 128), ("of the last record", 256)):
        yield case(f"journal: a bit {what}", "checksum", BASE[0] | {name: w.patched(raw, [(at_record + 33, b"\7")])})
        yield case(
            f"journal: the CRC {what}", "checksum", BASE[0] | {name: w.patched(raw, [(at_record + 56, raw[:3])])}
        )
        yield case(f"journal: the end {what}", "corrupt", BASE[0] | {name: w.patched(raw, [(at_record + 63, b"D")])})
    yield case("journal: torn in the middle", "corrupt", BASE[0] | {name: w.patched(raw, [(191, b"\0")])})
    yield case("journal: torn twice", "checksum", BASE[0] | {name: w.patched(raw, [(260, b"\7")]) + raw[:9]})
    yield case("journal: zeros for two records", "corrupt", BASE[0] | {name: raw + bytes(128)})
    yield case("journal: begins without begin", "corrupt", cache(first=good[1:]))
    yield case("journal: begins twice", "corrupt", cache(first=[good[0], *good]))
    yield case("journal: goes on after close", "corrupt", cache(first=[*good, replace(good[4])]))
    yield case("journal: close of an open shard", "corrupt", cache(first=[*good[:3], replace(good[4], samples=2)]))
    given_up = drop(A)
    for what, records in {
        "of a shard not opened": [*good, replace(given_up, ordinal=1)],
        "of another shard_id": [*good, replace(given_up, shard_id=3)],
        "with bytes": [*good, replace(given_up, size=8)],
        "with samples": [*good, replace(given_up, samples=1)],
        "again": [*good, given_up, given_up],
        "and then a commit": [*good[:3], given_up, good[2]],
    }.items():
        yield case(f"journal: drop {what}", "corrupt", cache(first=records))
    second = replace(A, ordinal=1, shard_id=0xA1A1)
    unfinished = [*good[:3], replace(good[1], ordinal=1, shard_id=0xA1A1)]
    yield case("journal: opened before the last was finished", "corrupt", cache(first=unfinished) | {second.name: b""})
    yield case("journal: bytes between multiples of 8", "corrupt", at(2, size=good[2].size + 4))
    yield case("journal: bytes beyond the limit", "corrupt", at(3, size=2**48 + 8))
    yield case("journal: begin of another cache", "mismatch", at(0, shard_id=1))
    for field in ("ordinal", "size", "samples"):
        yield case(f"journal: {field} of begin", "corrupt", at(0, **{field: 1}))
    for field in ("ordinal", "shard_id", "size"):
        yield case(f"journal: {field} of close", "corrupt", at(4, **{field: 1}))
    yield case("journal: samples of close", "corrupt", at(4, samples=4))
    yield case("journal: samples of open", "corrupt", at(1, samples=1))
    yield case("journal: bytes of open", "mismatch", at(1, size=good[1].size - 8), "open", True)
    yield case(
        "journal: a shard_id of 0",
        "corrupt",
        cache(first=[replace(r, shard_id=0) if 0 < i < 4 else r for i, r in enumerate(good)]),
    )
    yield case("journal: commit of a shard not opened", "corrupt", at(2, ordinal=1))
    yield case("journal: commit of another shard_id", "corrupt", at(2, shard_id=3))
    yield case(
        "journal: commit after finish", "corrupt", cache(first=[*good[:4], replace(good[3], kind="commit"), good[4]])
    )
    yield case("journal: opened twice", "corrupt", cache(first=[*good[:2], *good[1:]]))
    yield case(
        "journal: bytes go back",
        "corrupt",
        cache(first=[*good[:3], replace(good[2], size=A.ends()[1], samples=1), *good[3:]]),
    )
    yield case("journal: commit inside a frame", "mismatch", at(2, size=A.ends()[2] - 8), "open", True)
    yield case("journal: samples of commit", "mismatch", at(2, samples=1), "open", True)
    more = [replace(good[3], samples=4), replace(good[4], samples=4)]
    yield case("journal: samples of finish", "mismatch", cache(first=[*good[:3], *more]), "open", True)
    yield case("journal: finish of fewer bytes", "corrupt", at(3, size=A.ends()[-2]), "open", True)
    skipped = replace(A, ordinal=1)
    yield case("journal: ordinals begin at 1", "corrupt", cache(a=skipped), "open", True)
    inside = journal_of(HEADER, [B], commits=[1], close=False)
    inside[2] = replace(inside[2], size=inside[2].size + 8)
    beyond = w.journal(BOB, inside)
    yield case(
        "journal: commit inside a frame header", "truncated", BASE[0] | {f"{BOB:016x}.journal": beyond}, "open", True
    )


def duplicates() -> Iterator[Case]:
    def twice(frame: w.SampleFrame) -> Files:
        return cache(b=replace(B, frames=[frame, B.frames[1]]))

    yield case("duplicate: other hash", "duplicate", twice(fixed(token_hash=token_hash([1, 2, 4]))), "fixed")
    yield case(
        "duplicate: one not hashed", "duplicate", twice(fixed(flags=RAGGED | GOLD, token_hash=bytes(16))), "fixed"
    )
    changed = [replace(COUNTS[0], neg_entropy=-1.5), COUNTS[1]]
    yield case("duplicate: other contents", "duplicate", twice(drawn(tokens=changed)), "drawn")
    hidden = drawn(damage=[(33, b"\1")])
    frames = [A.frames[0], hidden, A.frames[2]]
    cannot = cache(a=replace(A, frames=frames), b=replace(B, frames=[drawn(), B.frames[1]]))
    yield case("duplicate: cannot be compared", "checksum", cannot, "drawn")
    damaged = replace(A, frames=[replace(A.frames[0], damage=[(115, b"\1")]), *A.frames[1:]])
    later = replace(B, frames=[fixed(), B.frames[1]])
    yield case("duplicate: the first is damaged", "checksum", cache(a=damaged, b=later), "fixed")
    yield case("missing: a key", "missing", BASE[0] | {"ignored": b""}, "nowhere")


ATTACKS: tuple[Callable[[], Iterator[Case]], ...] = (
    headers,
    shards,
    indexes,
    frames,
    fixed_blocks,
    drawn_blocks,
    journals,
    duplicates,
)


def attacks() -> Iterator[Case]:
    for rule in ATTACKS:
        yield from rule()
