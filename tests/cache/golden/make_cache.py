"""Writes the golden caches of version 1 and what they hold: PYTHONPATH=tests/cache.

Everything is fixed (ids, seeds, times), so that a second run changes nothing. A cache is a folder, what a reader must
find in it a JSON file of the same name; ``invalid.json`` holds faults as patches of the cache ``base``, and
``invalid_compact.json`` of ``compact_base``.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import format_writer as w
import numpy as np
from format_compact_writer import Model, Token, compact_block
from format_parts import COMPACT, DRAWN, GOLD, HASHED, METHODS, RAGGED, SEEDED

FOLDER = Path(__file__).parent / "cache-v1"
TIME = 1_700_000_000_000_000_000
ALICE, BOB = 0x00000000A11CE000, 0xB0B0B0B0B0B0B0B0
Files = dict[str, bytes]


def _f32(values: Sequence[float | None]) -> list[float | str]:
    """The values as fp32, exactly; JSON has no infinity."""
    return [str(x) if math.isinf(x) else x for x in map(float, np.array(values, np.float32))]


@dataclass
class Teacher:
    """What a cache's header says, and the frames that go with it."""

    vocab_size: int
    temperatures: tuple[float, ...]
    shift: int = 1
    metadata: dict[str, object] = field(default_factory=dict)
    text: bytes | None = None  # of the metadata, where a writer would have put it otherwise
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def header(self) -> bytes:
        text = json.dumps(self.metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        return w.header(self.vocab_size, self.temperatures, shift=self.shift, metadata=self.text or text)

    @property
    def others(self) -> list[float]:
        return [t for t in self.temperatures if t != 1]

    def _frame(self, frame: w.SampleFrame, tokens: Sequence[w.Fixed | w.Drawn], expect: bool, **more: Any) -> None:
        if not expect:
            return
        gold = [t.gold for t in tokens] if frame.flags & GOLD else None
        self.samples[str(frame.key)] = {
            "method": METHODS[frame.method],
            "codec": frame.codec,
            "grid": frame.grid,
            "parameter": frame.parameter,
            "seed": frame.seed if frame.flags & SEEDED else None,
            "token_hash": frame.token_hash.hex() if frame.flags & HASHED else None,
            "kept": frame.kept,
            "k_eff": [len(t.ids) for t in tokens],
            "ids": [list(t.ids) for t in tokens],
            "lse": {},
            "gold": None if gold is None else _f32(gold),
            "logprobs": None,
            "mass": None,
            "neg_entropy": None,
            "step": None,
        } | more

    def fixed(
        self,
        key: str,
        tokens: Sequence[w.Fixed],
        kept: int,
        *,
        flags: int = 0,
        block_tokens: int = 64,
        expect: bool = True,
        **fields: Any,
    ) -> w.SampleFrame:
        """A frame of codec 1; ``expect``: it is the one that a reader gives back; ``block`` goes to ``fixed_block``."""
        width = max(1, (self.vocab_size - 1).bit_length())
        more = fields.pop("block", {})
        cuts = range(0, len(tokens), block_tokens)
        blocks = [w.fixed_block(tokens[i : i + block_tokens], width, ragged=bool(flags & RAGGED), **more) for i in cuts]
        frame = w.SampleFrame(key, len(tokens), kept, blocks, flags=flags, block_tokens=block_tokens, **fields)
        self._by_rank(frame, tokens, expect)
        return frame

    def compact(
        self,
        key: str,
        tokens: Sequence[Token],
        kept: int,
        coding: Model,
        *,
        flags: int = 0,
        block_tokens: int = 64,
        expect: bool = True,
        **fields: Any,
    ) -> w.SampleFrame:
        """A frame of codec 2, as ``fixed``; coded by ``coding``, the model that the field ``model`` says."""
        more = fields.pop("block", {})
        cuts = range(0, len(tokens), block_tokens)
        ragged = bool(flags & RAGGED)
        blocks = [compact_block(tokens[i : i + block_tokens], coding, ragged=ragged, **more) for i in cuts]
        frame = w.SampleFrame(
            key, len(tokens), kept, blocks, codec=COMPACT, flags=flags, block_tokens=block_tokens, **fields
        )
        self._by_rank(frame, tokens, expect)
        return frame

    def _by_rank(self, frame: w.SampleFrame, tokens: Sequence[w.Fixed], expect: bool) -> None:
        """What a reader finds in a frame of codec 1 or 2."""
        rows = []
        if expect:
            for t in tokens:
                steps = np.cumsum([0, *t.deltas])[: len(t.ids)]
                rows.append(_f32(list(np.float32(t.top) - (steps * 0.5**frame.grid).astype(np.float32))))
        lse = {str(t): _f32([token.lse[i] for token in tokens]) for i, t in enumerate(self.others)}
        self._frame(frame, tokens, expect, logprobs=rows, lse=lse)

    def drawn(
        self,
        key: str,
        tokens: Sequence[w.Drawn],
        kept: int,
        *,
        flags: int = 0,
        gap_order: int = 0,
        order: int = 0,
        block_tokens: int = 64,
        expect: bool = True,
        **fields: Any,
    ) -> w.SampleFrame:
        """A frame of codec 3, as ``fixed``."""
        more = fields.pop("block", {})
        cuts = range(0, len(tokens), block_tokens)
        blocks = [
            w.drawn_block(
                tokens[i : i + block_tokens],
                kept,
                ragged=bool(flags & RAGGED),
                gap_order=gap_order,
                order=order,
                **more,
            )
            for i in cuts
        ]
        frame = w.SampleFrame(
            key, len(tokens), kept, blocks, codec=DRAWN, flags=flags, block_tokens=block_tokens, **fields
        )
        if not expect:
            return frame
        if METHODS[frame.method] == "sample":
            masses = [_f32([(v + 1) / frame.parameter for v in t.values]) for t in tokens]
            steps = None
        else:
            masses = [
                _f32([float(np.float32(t.step)) * math.exp(v * 0.5**frame.grid) for v in t.values]) for t in tokens
            ]
            steps = _f32([t.step for t in tokens])
        self._frame(frame, tokens, expect, mass=masses, step=steps, neg_entropy=_f32([t.neg_entropy for t in tokens]))
        return frame

    def expected(self) -> bytes:
        """JSON, a line for each sample."""
        about = {name: getattr(self, name) for name in ("vocab_size", "temperatures", "shift", "metadata")}
        lines = [
            f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}" for key, value in sorted(self.samples.items())
        ]
        samples = ",\n".join(lines)
        return (json.dumps(about, ensure_ascii=False)[:-1] + f',\n"samples": {{\n{samples}\n}}}}\n').encode()


def token_hash(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=16).digest()


def journal_of(
    header: bytes, shards: Sequence[w.Shard], *, commits: Sequence[int] = (), close: bool = True, time: int = TIME
) -> list[w.Record]:
    """The records of one writer: after each number of frames in ``commits`` a commit, then finish where that is due.

    Frames of models count among those, but not as samples.
    """
    records = [w.Record("begin", shard_id=struct.unpack("<I", header[-4:])[0], time=time)]

    def add(kind: str, shard: w.Shard, size: int, samples: int) -> None:
        records.append(w.Record(kind, shard.ordinal, shard.shard_id, size, samples, time + len(records)))

    for shard in shards:
        ends = shard.ends()
        add("open", shard, ends[0], 0)
        for count in commits:
            if count <= len(shard.frames):
                add("commit", shard, ends[count], len(shard.samples(count)))
        if shard.finished:
            add("finish", shard, ends[-1], len(shard.samples()))
    if close:
        total = sum(len(shard.samples()) for shard in shards)
        records.append(w.Record("close", samples=total, time=time + len(records)))
    return records


def drop(shard: w.Shard, time: int = TIME) -> w.Record:
    return w.Record("drop", shard.ordinal, shard.shard_id, time=time)


def files_of(header: bytes, writers: dict[int, tuple[Sequence[w.Record], Sequence[w.Shard]]]) -> Files:
    files = {"cache.header": header}
    for writer, (records, shards) in writers.items():
        files[f"{writer:016x}.journal"] = w.journal(writer, records)
        files |= {shard.name: shard.pack() for shard in shards}
    return files


def with_manifest(files: Files, shards: Sequence[w.Shard], committed: Sequence[int]) -> Files:
    rows = [
        {
            "file": shard.name,
            "bytes": shard.ends()[-1 if shard.finished and n == len(shard.frames) else n],
            "samples": len(shard.samples(n)),
            "tokens": sum(frame.tokens for frame in shard.samples(n)),
            "shard_id": f"{shard.shard_id:016x}",
        }
        for shard, n in zip(shards, committed, strict=True)
    ]
    totals = {name: sum(int(str(row[name])) for row in rows) for name in ("samples", "tokens", "bytes")}
    return files | {"manifest.json": w.manifest(files["cache.header"], rows, **totals)}


def empty() -> tuple[Files, Teacher]:
    teacher = Teacher(50257, (1.0,), metadata={"teacher": "none"})
    return {"cache.header": teacher.header}, teacher


AnyToken = TypeVar("AnyToken", bound=w.Fixed)


def possible(token: AnyToken, others: Sequence[float]) -> AnyToken:
    """The token with a top, and an lse at each of ``others``, so far from 0 that no mass is above 1, on any grid."""
    if not token.ids:
        return token
    below = np.cumsum([0, *token.deltas]) * 0.5**10
    top = token.top - math.log(np.exp(-below).sum())
    lse = [x + math.log(np.exp((top - below) / t).sum()) for x, t in zip(token.lse, others, strict=True)]
    return replace(token, top=top, lse=lse)


def _tokens_fixed(
    rng: random.Random, n: int, vocab: int, others: Sequence[float], sizes: Sequence[int], gold: bool
) -> list[w.Fixed]:
    """Random tokens of ``sizes`` entries in turn; one delta in six needs an escape, some a long one."""
    tokens = []
    for i in range(n):
        k = sizes[i % len(sizes)]
        deltas: list[int | bytes] = [rng.randrange(rng.choices((15, 270, 4000), (40, 9, 1))[0]) for _ in range(k - 1)]
        lse = [rng.uniform(0, 5) for _ in others]
        top = -rng.uniform(0, 4) if k else 0.0
        token = w.Fixed(top, rng.sample(range(vocab), k), deltas, lse, -rng.uniform(0, 4) if gold else None)
        tokens.append(possible(token, others))
    return tokens


def fixed() -> tuple[Files, Teacher]:
    """Codec 1: every flag, both escapes at their bounds, several blocks, samples of 0 and 1 tokens."""
    rng = random.Random(1)
    meta: dict[str, object] = {
        "dtype": "bfloat16",
        "revision": 'å/β "quoted"',
        "teacher": "tiny",
        "tokenizer": "0123",
        "own": {"a": [1, None]},
    }
    teacher = Teacher(1000, (0.5, 1.0, 2.0), metadata=meta)
    edges = [0, 14, 15, 269, 270, 65536]
    corner = [
        w.Fixed(-1.5, (0, 999, 1, 2, 3, 4, 5), edges, (-0.25, 1.5), -0.5),
        w.Fixed(-0.0, (7,), (), (0.0, 0.0), -math.inf),
        w.Fixed(0.0, (), (), (0.0, 6.9), -3.0),
        w.Fixed(-1e-42, (5, 6), (2**24 - 1,), (0.0, 1e30), -0.0),
        w.Fixed(-3.4028234663852886e38, (8, 9), (1,), (-1e30, 0.0), -1e-45),
    ]
    ids, others = [1, -1, 2**62, 0, 50], teacher.others
    two_blocks = _tokens_fixed(rng, 65, 1000, others, [4], gold=False)
    one = _tokens_fixed(rng, 1, 1000, others, [2], gold=True)
    ragged = _tokens_fixed(rng, 30, 1000, others, [1, 5, 0, 2, 8], gold=False)
    frames = [
        teacher.fixed(
            "corner", corner, 7, flags=RAGGED | GOLD | HASHED, method=1, parameter=0.9, token_hash=token_hash(ids)
        ),
        teacher.fixed("two blocks", two_blocks, 4, grid=2),
        teacher.fixed("no tokens", [], 3, flags=HASHED, token_hash=token_hash([])),
        teacher.fixed("ключ/鍵", one, 2, flags=GOLD, grid=10),
        teacher.fixed("ragged", ragged, 9, flags=RAGGED, block_tokens=256),
    ]
    shard = w.Shard(teacher.header, 0x1122334455667788, ALICE, 0, frames)
    files = files_of(teacher.header, {ALICE: (journal_of(teacher.header, [shard], commits=[2, 5]), [shard])})
    return with_manifest(files, [shard], [5]), teacher


def drawn() -> tuple[Files, Teacher]:
    """Codec 3: both methods, narrow and wide k_eff, codes and masses at their bounds."""
    rng = random.Random(2)
    teacher = Teacher(2**24, (4.0,), shift=0, metadata={})

    def token(k: int, largest: int, step: float | None = None, gold: float | None = None) -> w.Drawn:
        ids = sorted(rng.sample(range(2**24), k))
        return w.Drawn(-rng.uniform(0, 9), ids, [rng.randrange(largest) for _ in ids], step, gold)

    counts = [token(5, 4), w.Drawn(0.0, [0], [2**24 - 1]), w.Drawn(-0.0, [2**24 - 1], [0]), token(9, 40)]
    pps = [token(6, 900, 0.0078125, -1.0), w.Drawn(-2.5, [], [], 0.0, -math.inf), token(6, 3, 1e-3, 0.0)]
    pps += [w.Drawn(-1.0, [4, 5, 6], [0, 1, 2**14], 1e-30, -0.25), w.Drawn(-1.0, [7], [104 * 256], 1e-42, -0.5)]
    frames = [
        teacher.drawn(
            "sample",
            counts,
            9,
            flags=RAGGED | SEEDED,
            gap_order=0,
            order=2,
            method=2,
            parameter=2.0**24,
            seed=2**64 - 1,
        ),
        teacher.drawn("pps", pps, 300, flags=RAGGED | GOLD | SEEDED, gap_order=21, order=7, method=3, grid=8, seed=0),
        teacher.drawn("even", [token(3, 2), token(3, 2)], 3, gap_order=23, order=0, method=2, parameter=6.0),
        teacher.drawn(
            "nothing", [w.Drawn(0.0, [], [])], 1, flags=RAGGED, gap_order=0, order=23, method=2, parameter=1.0
        ),
        teacher.drawn(
            "blocks", [token(2, 5, 0.5) for _ in range(66)], 2, gap_order=22, order=1, method=3, block_tokens=64
        ),
    ]
    shard = w.Shard(teacher.header, 2**64 - 1, BOB, 0, frames)
    files = files_of(teacher.header, {BOB: (journal_of(teacher.header, [shard]), [shard])})
    return with_manifest(files, [shard], [5]), teacher


def smallest() -> tuple[Files, Teacher]:
    """One column, a temperature that is not 1, a shard without frames, metadata as no writer puts them; all closed."""
    teacher = Teacher(1, (2.0,), metadata={"b": 2, "a": [None]}, text=b' {"b": 1,\n"a": [null], "b":2 }\t')
    frames = [
        teacher.fixed("0", [w.Fixed(0.0, (0,), (), (0.0,))], 1),
        teacher.drawn("1", [w.Drawn(-0.5, (0,), (1,))], 2, flags=RAGGED | SEEDED, method=2, parameter=2.0, seed=1),
    ]
    shards = [w.Shard(teacher.header, 1, 0, 0, []), w.Shard(teacher.header, 2, 0, 1, frames)]
    files = files_of(teacher.header, {0: (journal_of(teacher.header, shards), shards)})
    return with_manifest(files, shards, [0, 2]), teacher


def writers() -> tuple[Files, Teacher]:
    """Writers that died in every way, and keys that several of them wrote."""
    teacher = Teacher(300, (1.0, 2.0), metadata={"teacher": "t"})

    def one(key: str, top: float, *, expect: bool = True, ids: Sequence[int] | None = None) -> w.SampleFrame:
        hashed: dict[str, Any] = {} if ids is None else {"flags": HASHED, "token_hash": token_hash(ids)}
        return teacher.fixed(key, [w.Fixed(top, (3, 4), (5,), (1.0,))], 2, expect=expect, **hashed)

    # Alice closed; her second copy of "twice" and of "same" were committed after Bob's.
    alice = [
        w.Shard(teacher.header, 11, ALICE, 0, [one("a", -1.0), one("b", -2.0)]),
        w.Shard(teacher.header, 12, ALICE, 1, [one("same", -3.0), one("twice", -9.0, expect=False, ids=[1])]),
    ]
    # Bob died while he wrote a frame and then a record: "lost" was written whole and never committed.
    bob = [
        w.Shard(teacher.header, 21, BOB, 0, [one("twice", -4.0, ids=[1]), one("c", -5.0)]),
        w.Shard(
            teacher.header, 22, BOB, 1, [one("same", -3.0), one("d", -6.0), one("lost", -7.0, expect=False)], False
        ),
    ]
    bob[1] = replace(bob[1], beyond=bytes(range(1, 60)))
    records = journal_of(teacher.header, bob, commits=[2], close=False, time=TIME - 100)
    torn = w.Record("commit", 1, 22, bob[1].ends()[3], 3, TIME).pack(BOB, len(records))
    # Carol died between renaming her shard and recording that: what the index adds to her last commit does not count.
    carol_id = 0xCA401
    carol = [w.Shard(teacher.header, 31, carol_id, 0, [one("e", -8.0), one("f", -8.5, expect=False)])]
    # Dave died at his first record, Erin before it, Frank between creating a shard and recording that: a file system
    # has given his record its length and not yet its bytes.
    stray = w.Shard(teacher.header, 61, 0xF6, 0, [one("g", -1.0, expect=False)], False)
    # Repair gave up Gina's first shard after she had closed, and removed its file; the open one of Hugo it has left.
    gina_id, hugo_id = 0x61A, 0xF00
    gina = [
        w.Shard(teacher.header, 71, gina_id, 0, [one("b", -7.0, expect=False)]),
        w.Shard(teacher.header, 72, gina_id, 1, [one("h", -8.0)]),
    ]
    hugo = w.Shard(teacher.header, 81, hugo_id, 0, [one("c", -9.0, expect=False)], False)
    files = files_of(
        teacher.header,
        {
            ALICE: (journal_of(teacher.header, alice, commits=[1]), alice),
            BOB: (records, bob),
            carol_id: (journal_of(teacher.header, carol, commits=[1], close=False)[:-1], carol),
            0xDA7E: ([], []),
            0xE1: ([], []),
            0xF6: (journal_of(teacher.header, [], close=False), [stray]),
            gina_id: ([*journal_of(teacher.header, gina, time=TIME - 200), drop(gina[0])], gina),
            hugo_id: ([*journal_of(teacher.header, [hugo], commits=[1], close=False), drop(hugo)], [hugo]),
        },
    )
    del files[gina[0].name]
    files[f"{0xF6:016x}.journal"] += bytes(64)
    files[f"{BOB:016x}.journal"] += torn[:63]
    files[f"{0xDA7E:016x}.journal"] = w.journal(0xDA7E, journal_of(teacher.header, [], close=False))[:20]
    files |= {"notes.txt": b"ignored", "1.journal": b"ignored"}
    return with_manifest(files, [*alice, *bob, *carol, gina[1]], [2, 2, 2, 2, 1, 1]), teacher


VALID = {f.__name__: f for f in (empty, fixed, drawn, smallest, writers)}


def runs(old: bytes, new: bytes) -> list[tuple[int, bytes]]:
    """Where ``new`` differs from ``old``, of equal length; runs less than 4 bytes apart are one."""
    places = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    out: list[tuple[int, int]] = []
    for i in places:
        if out and i - out[-1][1] < 4:
            out[-1] = (out[-1][0], i + 1)
        else:
            out.append((i, i + 1))
    return [(a, new[a:b]) for a, b in out]


def alike(a: bytes, b: bytes) -> int:
    """How many bytes two strings have in common from the start on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def difference(base: Files, files: Files) -> list[dict[str, object]]:
    """Patches that make ``files`` of ``base``: bytes at an offset, over as many or ``instead_of`` another number."""
    out: list[dict[str, object]] = [{"file": name, "delete": True} for name in sorted(base.keys() - files.keys())]
    for name, new in sorted(files.items()):
        old = base.get(name)
        if old == new:
            continue
        if old is None:
            old = b""
        if len(new) == len(old):
            out += [{"file": name, "offset": at, "bytes": piece.hex()} for at, piece in runs(old, new)]
            continue
        start = alike(old, new)
        end = alike(old[start:][::-1], new[start:][::-1])
        middle = new[start : len(new) - end]
        out.append({"file": name, "offset": start, "bytes": middle.hex(), "instead_of": len(old) - start - end})
    return out


def made() -> dict[str, bytes]:
    """Every golden file, by its path below the folder."""
    import attacks
    import compact_attacks
    import compact_caches

    out: dict[str, bytes] = {}
    for name, make in (VALID | compact_caches.VALID).items():
        files, teacher = make()
        out |= {f"{name}/{file}": data for file, data in files.items()}
        out[f"{name}.json"] = teacher.expected()
    for base, invalid, rows in (("base", "invalid", attacks), ("compact_base", "invalid_compact", compact_attacks)):
        files, teacher = rows.BASE
        out |= {f"{base}/{file}": data for file, data in files.items()}
        out[f"{base}.json"] = teacher.expected()
        cases = [{**about, "patches": difference(files, attacked)} for about, attacked in rows.attacks()]
        out[f"{invalid}.json"] = ("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n").encode()
    return out


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, data in made().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    main()
