"""The golden caches of compact frames; ``make_cache`` writes them with the others."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import format_writer as w
from format_compact_writer import Token, copies, in_place, model_of, raw_model
from format_parts import GOLD, HASHED, RAGGED
from make_cache import ALICE, BOB, Files, Teacher, files_of, journal_of, possible, token_hash, with_manifest


def _tokens(
    rng: random.Random, n: int, vocab: int, others: Sequence[float], sizes: Sequence[int], *, gold: bool
) -> list[Token]:
    """Tokens of ``sizes`` entries in turn, and of two classes; few ids are frequent, and most deltas small."""
    tokens = []
    for i in range(n):
        k = sizes[i % len(sizes)]
        ids = sorted(rng.sample(range(vocab), k), key=lambda i: i * rng.random())
        deltas = [rng.randrange(rng.choices((3, 40, 4000), (40, 9, 1))[0]) for _ in range(k - 1)]
        lse = [rng.uniform(0, 5) for _ in others]
        top = -rng.uniform(0, 4) if k else 0.0
        token = Token(top, ids, deltas, lse, -rng.uniform(0, 4) if gold else None, row_class=i % 2)
        tokens.append(possible(token, others))
    return tokens


def compact() -> tuple[Files, Teacher]:
    """Codec 2: every flag, numbers at their bounds, several blocks, every place of a delta, codes not the shortest."""
    rng = random.Random(3)
    teacher = Teacher(300, (0.5, 1.0, 4.0), metadata={"teacher": "tiny"})
    edges = [0, 1, 2, 3, 4, 65536]
    corner = [
        Token(-2.0, (0, 299, 1, 2, 3, 4, 5), edges, (-0.25, 1.5), -0.5),
        Token(-0.0, (7,), (), (0.0, 0.0), -math.inf, row_class=1),
        Token(0.0, (), (), (0.0, 6.9), -3.0),
        Token(-1e-42, (5, 6), (2**24 - 1,), (0.0, 1e30), -0.0),
        Token(-3.4028234663852886e38, (8, 9), (1,), (-1e30, 0.0), -1e-45, row_class=1),
    ]
    two_blocks = _tokens(rng, 65, 300, teacher.others, [2], gold=False)
    long = _tokens(rng, 1, 300, teacher.others, [70], gold=False)
    model = model_of([*corner, *two_blocks, *long], 300, 2, listed=9)
    ids = [1, -1, 2**62, 0, 50]
    given = {"flags": RAGGED | GOLD | HASHED, "token_hash": token_hash(ids)}
    frames = [
        *copies(model.payload(300)),
        teacher.compact("corner", corner, 7, model, method=1, parameter=0.9, **given),
        teacher.compact("any codes", corner, 7, model, flags=RAGGED | GOLD, block={"choose": rng.choice}),
        teacher.compact("two blocks", two_blocks, 2, model, grid=2),
        teacher.fixed("fixed", corner, 7, flags=RAGGED | GOLD),
        teacher.compact("no tokens", [], 3, model, flags=HASHED, token_hash=token_hash([])),
        teacher.compact("places", long, 70, model, grid=10, block_tokens=256),
    ]
    first = len(teacher.header) + 32
    shard = w.Shard(teacher.header, 0x2233445566778899, ALICE, 0, in_place(first, frames))
    files = files_of(teacher.header, {ALICE: (journal_of(teacher.header, [shard], commits=[3]), [shard])})
    return with_manifest(files, [shard], [len(frames)]), teacher


def models() -> tuple[Files, Teacher]:
    """Several models in a shard, each with a copy that is damaged, and models in a shard that is still open."""
    rng = random.Random(4)
    teacher = Teacher(1, (1.0,))
    few = [Token(-0.25, (0,), ()), Token(0.0, (), ()), Token(-2.0, (0,), ())]
    some = [replace(t, top=-rng.random() if t.ids else 0.0) for t in few]
    plain, lists, learned = raw_model(1, 0), raw_model(1, 0, listed=[0], class_bits=3), model_of(some, 1, 0, listed=1)
    bit = [(57, b"\7")]  # of the payload
    frames = [
        w.ModelFrame(plain.payload(1), damage=bit),
        w.ModelFrame(plain.payload(1), 1),
        teacher.compact("raw", few, 1, plain, flags=RAGGED),
        *copies(lists.payload(1)),
        w.ModelFrame(learned.payload(1)),
        w.ModelFrame(learned.payload(1), 1, damage=[(9, b"\7"), *bit]),
        teacher.compact("learned", some, 1, learned, flags=RAGGED, model=2),
        teacher.compact("lists", few, 1, lists, flags=RAGGED, model=1),
        teacher.compact("raw again", [few[0]] * 70, 1, plain),
    ]
    first = len(teacher.header) + 32
    closed = w.Shard(teacher.header, 41, ALICE, 0, in_place(first, frames))
    files = files_of(teacher.header, {ALICE: (journal_of(teacher.header, [closed], commits=[5]), [closed])})
    header_of_second = closed.ends()[3]  # of the model that "lists" names: its first copy has lost its header
    files[closed.name] = w.patched(files[closed.name], [(header_of_second + 4, b"\xff\xff\xff")])
    frames = [
        w.ModelFrame(learned.payload(1), damage=bit),
        w.ModelFrame(learned.payload(1), 1),
        teacher.compact("open", some, 1, learned, flags=RAGGED),
        *copies(plain.payload(1)),
        teacher.compact("open, raw", few[::-1], 1, plain, flags=RAGGED, model=1),
        teacher.compact("not committed", few, 1, plain, flags=RAGGED, model=1, expect=False),
    ]
    left = w.Shard(teacher.header, 42, BOB, 0, in_place(first, frames), False)
    records = journal_of(teacher.header, [left], commits=[1, 4, 6], close=False)
    files |= files_of(teacher.header, {BOB: (records, [left])})
    return with_manifest(files, [closed, left], [len(closed.frames), 6]), teacher


VALID = {f.__name__: f for f in (compact, models)}
