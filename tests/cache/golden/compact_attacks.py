"""Faults of compact frames and their models; ``make_cache`` keeps them as patches of the cache ``compact_base``.

Rows are as in ``attacks``. What is wrong with a model is wrong with both its copies, where not said otherwise.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import format_writer as w
from attacks import ONE, Case, bad, case
from format_compact_writer import Symbol, Token, copies, in_place, number, raw_model
from format_parts import GOLD, HASHED, RAGGED, align8
from make_cache import ALICE, BOB, Files, Teacher, files_of, journal_of, token_hash

VOCAB = 5
TEACHER = Teacher(VOCAB, (0.5, 1.0))
HEADER = TEACHER.header
FIRST = len(HEADER) + 32
MODEL = raw_model(VOCAB, 1, listed=[4, 0], class_bits=1)
PAYLOAD = MODEL.payload(VOCAB)
SIZE = align8(56 + len(PAYLOAD))
TOKENS = [
    Token(-1.0, (0, 4, 2), (3, 400), (-0.5,), -2.0, row_class=1),
    Token(0.0, (), (), (0.25,), -1.0),
    Token(-0.75, (1, 2), (20,), (0.125,), -math.inf),
    Token(-0.75, (3,), (), (1.0,), -0.5),
    Token(-1.5, (4, 3), (0,), (2.0,), -0.25),
]


def coded(tokens: Sequence[Token] = TOKENS, key: str = "compact", kept: int = 3, **fields: Any) -> w.SampleFrame:
    given: dict[str, Any] = {"flags": RAGGED | GOLD | HASHED, "token_hash": token_hash(range(5)), "expect": False}
    return TEACHER.compact(key, tokens, kept, MODEL, **given | fields)


OTHER = TEACHER.fixed("other", [w.Fixed(-1.0, (1, 2), (7,), (0.5,))], 2)
SOUND = coded(expect=True)
LATE = coded([TOKENS[0]], "late", flags=GOLD, token_hash=bytes(16), expect=True)
TORN = replace(LATE, key="torn")


def cache(
    models: Sequence[w.ModelFrame] = tuple(copies(PAYLOAD)),
    frame: w.SampleFrame | None = None,
    index: w.Patch = (),
    open_models: Sequence[w.ModelFrame] = tuple(copies(PAYLOAD)),
    commit: tuple[int, int] | None = None,
) -> Files:
    """``compact_base``, with other parts in it; ``commit`` is that of the open shard in bytes and samples."""
    frames = in_place(FIRST, [*models, OTHER, frame or SOUND])
    a = w.Shard(HEADER, 0xA0A0, ALICE, 0, frames, index=index)
    b = w.Shard(HEADER, 0xB1B1, BOB, 0, in_place(FIRST, [*open_models, LATE, TORN]), finished=False)
    records = journal_of(HEADER, [b], commits=[len(b.frames) - 1], close=False)
    if commit:
        records[-1] = replace(records[-1], size=commit[0], samples=commit[1])
    return files_of(HEADER, {ALICE: (journal_of(HEADER, [a]), [a]), BOB: (records, [b])})


BASE = cache(), TEACHER
SHARD, OPEN = f"{ALICE:016x}-000000.shard", f"{BOB:016x}-000000.open"


def damaged(at: int, new: bytes, name: str = SHARD, number_of_copies: int = 2) -> Files:
    """Bytes over those of both copies, or of the first, behind their checksums' back."""
    patches = [(FIRST + copy * SIZE + at, new) for copy in range(number_of_copies)]
    return BASE[0] | {name: w.patched(BASE[0][name], patches)}


def patched(at: int, first: bytes, second: bytes | None = None) -> Files:
    """Bytes over those of both copies, under a checksum that is right."""
    models = [replace(m, patch=[(at, new)]) for m, new in zip(copies(PAYLOAD), (first, second or first), strict=True)]
    return cache(models)


def headers() -> Iterator[Case]:
    most = 2**24
    yield bad("model: magic", damaged(0, b"KDFN"), "compact")
    yield bad("model: payload_bytes 0", patched(4, w.u32(0) + w.u64(56)), "compact")
    yield bad("model: payload_bytes beyond the limit", patched(4, w.u32(most + 1) + w.u64(most + 64)), "compact")
    yield bad("model: frame_bytes", patched(8, w.u64(SIZE + 8)), "compact")
    yield bad("model: longer than what is there", patched(4, w.u32(4096) + w.u64(56 + 4096)), "compact", "truncated")
    yield bad("model: a bit of its header", damaged(44, b"\1"), "compact", "checksum")
    yield bad("model: a bit of its payload", damaged(60, b"\7"), "compact", "checksum")
    yield bad("model: the CRC of its payload", patched(40, w.u32(7)), "compact", "checksum")
    own = [FIRST, FIRST + SIZE]
    elsewhere = [w.u64(at + 8) for at in own]
    both = [elsewhere[copy] + w.u64(0xA0A0) + elsewhere[0] for copy in (0, 1)]
    yield bad("model: offset", patched(16, *both), "compact", "mismatch", True)
    yield bad("model: shard_id", patched(24, w.u64(0xB1B1)), "compact", "mismatch", True)
    yield bad("model: copy of another", patched(32, w.u64(FIRST + 8)), "compact")
    yield bad("model: zero at 44", patched(44, w.u32(1)), "compact")
    yield bad("model: zero at 48", patched(48, w.u32(1 << 31)), "compact")
    yield bad("model: padding", damaged(SIZE - 1, b"\1"), "compact")
    first, second = (w.ModelFrame(PAYLOAD, copy) for copy in (0, 1))
    lost = replace(first, damage=[(60, b"\7")])
    yield bad("model: the only copy", cache([lost]), "compact", "checksum")
    yield bad("model: another behind a damaged one", cache([lost, first]), "compact", "checksum")
    headless = replace(first, damage=[(44, b"\7")])
    yield bad("model: another behind a damaged header", cache([headless, first]), "compact", "checksum")
    same = replace(second, damage=[(60, b"\7")])
    yield bad("model: one copy's header, the other's payload", cache([headless, same]), "compact", "checksum")
    yield bad("model: one copy's payload, the other's header", cache([lost, replace(second, damage=[(44, b"\7")])]),
              "compact", "checksum")  # fmt: skip


def frames() -> Iterator[Case]:
    at = FIRST + 2 * SIZE

    def named(model: int) -> Files:
        return cache(frame=coded(patch=[(80, w.u64(model))]))

    own = at + len(OTHER.pack(at, 0))
    yield bad("compact: model 0", named(0), "compact", settles=True)
    yield bad("compact: model between multiples of 8", named(FIRST + 4), "compact")
    yield bad("compact: its own place as model", named(own), "compact")
    yield bad("compact: model behind it", named(own + 8 * 1000), "compact")
    yield bad("compact: a sample as model", named(at), "compact", settles=True)
    yield bad("compact: a second copy as model", named(FIRST + SIZE), "compact", "mismatch", True)
    yield bad("compact: with sample", cache(frame=coded(patch=[(75, w.u8(2))])), "compact")
    yield bad("compact: seeded", cache(frame=coded(patch=[(77, w.u8(15))])), "compact")


def payloads() -> Iterator[Case]:
    def of(payload: bytes) -> Files:
        return cache(list(copies(payload)))

    def at(offset: int, new: bytes, instead_of: int = 1) -> Files:
        return of(PAYLOAD[:offset] + new + PAYLOAD[offset + instead_of :])

    def with_(**fields: Any) -> Files:
        return of(replace(MODEL, **fields).payload(VOCAB))

    for layout in (0, 2):
        yield bad(f"model: layout {layout}", at(0, w.u8(layout)), "compact", "version")
    yield bad("model: no classes", at(1, w.u8(0)), "compact")
    yield bad("model: 65 classes", at(1, w.u8(65)), "compact")
    yield bad("model: a class too many", at(1, w.u8(3)), "compact")
    yield bad("model: other temperatures", at(2, w.u8(0)), "compact", "mismatch", True)
    yield bad("model: another vocabulary", at(3, w.u8(6)), "compact", "mismatch", True)
    yield bad("model: a number in two bytes for one", at(3, bytes([VOCAB | 128, 0])), "compact")
    yield bad("model: a number of six bytes", at(3, bytes([VOCAB | 128, 128, 128, 128, 128, 1])), "compact")
    yield bad("model: more ids listed than there are", at(4, w.u8(6) + bytes([0b11010001, 0b1011000, 0]), 2), "compact")
    yield bad("model: a listed id beyond the vocabulary", with_(listed=[4, 5]), "compact")
    yield bad("model: an id listed twice", with_(listed=[4, 4]), "compact")
    yield bad("model: bits after the last id", at(5, w.u8(PAYLOAD[5] | 64)), "compact")
    yield bad("model: cut in its last number", of(PAYLOAD[:-1]), "compact")
    yield bad("model: cut in an alphabet", of(PAYLOAD[:20]), "compact")
    yield bad("model: cut after its layout", of(PAYLOAD[:1]), "compact")
    yield bad("model: followed by something", of(PAYLOAD + b"\0"), "compact")
    whole = Symbol(0, 16, 2048)
    for name, kept in {
        "no symbols": [],
        "no slots": [whole, Symbol(1, 0, 0)],
        "too few slots": [whole._replace(frequency=2047)],
        "too many slots": [whole, Symbol(1, 0, 1)],
        "2^32 slots": [Symbol(0, 0, 2**32), whole],
    }.items():
        yield bad(f"model: an alphabet of {name}", with_(kept=kept), "compact")
    kept_at = PAYLOAD.index(number(1) + number(1) + w.u8(16) + number(2048))
    yield bad("model: raw bits of 0", at(kept_at + 2, w.u8(0)), "compact")
    yield bad("model: more symbols than slots", at(kept_at, number(2049)), "compact")
    yield bad("model: 33 raw bits", with_(top=[Symbol(0, 33, 2048)]), "compact")
    many = [Symbol(i, 0, 1) for i in range(256)] + [Symbol(256, 0, 2048 - 256)]
    yield bad("model: 257 symbols of deltas", with_(deltas=[many, *MODEL.deltas[1:]]), "compact")
    beyond = [Symbol(1, 32, 2048)]
    for name, fields in {
        "classes": {"classes": [Symbol(1, 1, 2048)]},
        "kept": {"kept": [Symbol(1, 16, 2048)]},
        "top": {"top": beyond},
        "gold": {"gold": [Symbol(4096, 0, 2048)]},
        "lse": {"lse": [beyond]},
        "deltas": {"deltas": [*MODEL.deltas[:39], [Symbol(1, 24, 2048)]]},
        "ids": {"ids": [MODEL.ids[0], [Symbol(3, 3, 8192)]]},
        "base": {"kept": [whole._replace(frequency=2047), Symbol(2**32, 0, 1)]},
    }.items():
        yield bad(f"model: values of {name} beyond their limit", with_(**fields), "compact")


def blocks() -> Iterator[Case]:
    a, b, *rest = TOKENS
    c = rest[0]
    for name, tokens in {
        "k_eff above kept": [replace(a, ids=(0, 4, 2, 1), deltas=(3, 4, 5)), b, *rest],
        "an id beyond the vocabulary": [replace(a, ids=(0, 5, 2)), b, *rest],
        "an id twice": [replace(a, ids=(0, 4, 0)), b, *rest],
        "steps of 2^24": [replace(a, deltas=(1, 2**24 - 1)), b, *rest],
        "top above 0": [replace(a, top=1e-45), b, *rest],
        "top NaN": [replace(a, top=math.nan), b, *rest],
        "top infinite": [replace(a, top=-math.inf), b, *rest],
        "top of no entries": [a, replace(b, top=-1.0), *rest],
        "top -0 of no entries": [a, replace(b, top=-0.0), *rest],
        "lse infinite": [replace(a, lse=(math.inf,)), b, *rest],
        "lse NaN": [a, replace(b, lse=(math.nan,)), *rest],
        "gold above 0": [replace(a, gold=1e-45), b, *rest],
        "gold NaN": [a, replace(b, gold=math.nan), *rest],
        "a mass of 1.00003": [replace(a, ids=(1,), top=-0.0, deltas=(), lse=(0.0,)), b, replace(c, top=ONE + 3e-5)],
        "a mass of 1.0003 at temperature 0.5": [replace(a, top=-0.0, ids=(4,), deltas=(), lse=(-3e-4,)), b, *rest],
    }.items():
        yield bad(f"compact: {name}", cache(frame=coded(tokens)), "compact", settles=name.startswith("top -0"))
    lists_1 = replace(MODEL, listed=[4, 1])  # what this writes as 1 is read as 0
    twice = [replace(a, ids=(0, 1, 2)), b, *rest]
    frame = TEACHER.compact("compact", twice, 3, lists_1, flags=RAGGED | GOLD, expect=False)
    yield bad("compact: an id twice, once from the list", cache(frame=frame), "compact")

    def lanes(change: Any, tokens: Sequence[Token] = TOKENS) -> Files:
        def changed(given: list[tuple[int, list[int]]]) -> None:
            given[:] = change(given)

        return cache(frame=coded(tokens, block={"change": changed}))

    few = TOKENS[:3]
    for name, files in {
        "a first state below 2^32": lanes(lambda x: [(2**32 - 1, x[0][1]), *x[1:]]),
        "a first state of an empty lane": lanes(lambda x: [*x[:3], (2**32 + 1, [])], few),
        "a word of an empty lane": lanes(lambda x: [*x[:3], (2**32, [7])], few),
        "a word too many": lanes(lambda x: [x[0], (x[1][0], [*x[1][1], 0]), *x[2:]]),
        "a word that is not there": lanes(lambda x: [(x[0][0], x[0][1][:-1]), *x[1:]]),
        "a last state that is not 2^32": cache(frame=coded(block={"last_states": (2**32, 2**32, 2**32, 2**33)})),
        "something after the lanes": cache(frame=coded(block={"extra": bytes(7) + b"\1"})),
        "8 bytes too long": cache(frame=coded(block={"extra": bytes(8)})),
    }.items():
        yield bad(f"compact: {name}", files, "compact")
    block = SOUND.blocks[0]
    for name, one in {
        "cut off": block[:-8],
        "of no bytes": b"",
        "of 16 words": w.padded(w.u32(4) * 4),
        "with words beyond it": w.patched(block, [(8, w.u32(2**32 - 1))]),
    }.items():
        yield bad(f"compact: a block {name}", cache(frame=replace(SOUND, blocks=[one])), "compact")
    odd = next(f for f in (coded(TOKENS[:n]) for n in range(1, 6)) if sum(struct.unpack_from("<4I", f.blocks[0])) % 2)
    spare = w.patched(odd.blocks[0], [(len(odd.blocks[0]) - 1, b"\1")])
    yield bad("compact: padding", cache(frame=replace(odd, blocks=[spare])), "compact")
    damage = [(len(SOUND.pack(0, 0)) - 9, b"\1")]
    yield bad("compact: a bit of a block", cache(frame=coded(damage=damage)), "compact", "checksum")


def indexes() -> Iterator[Case]:
    for name, at, new in (
        ("token_hash", 16, b"\1"),
        ("header_bytes", 32, w.u32(64)),
        ("tokens", 36, w.u32(1)),
        ("kept", 40, w.u16(1)),
        ("key_bytes", 42, w.u16(1)),
        ("kind 1", 44, w.u8(1)),
        ("flags", 45, w.u8(1)),
        ("method", 46, w.u8(1)),
        ("codec", 47, w.u8(2)),
    ):
        yield case(f"index: {name} of a model", "corrupt", cache(index=[(32 + 48 + at, new)]))


def open_shards() -> Iterator[Case]:
    yield case("model: of an open shard, a bit of its header", "checksum", damaged(44, b"\1", OPEN, 1), "open", True)
    yield case("model: of an open shard, magic", "corrupt", damaged(0, b"KDFN", OPEN, 1), "open", True)
    yield bad("model: of an open shard, a bit of its payload", damaged(60, b"\7", OPEN), "late", "checksum")
    end = FIRST + 2 * SIZE
    yield case("journal: commit inside a model", "truncated", cache(commit=(FIRST + SIZE + 64, 0)), "open", True)
    yield case("journal: commit inside a model's header", "truncated", cache(commit=(end - SIZE + 8, 0)), "open", True)
    yield case("journal: a model as a sample", "mismatch", cache(commit=(end, 1)), "open", True)


def attacks() -> Iterator[Case]:
    for group in (headers, frames, payloads, blocks, indexes, open_shards):
        yield from group()
