"""Random changes of caches whose checksums are right again, after csrc/cache/FORMAT.md; two readers must agree on each.

    format_fuzz.py [--seconds 600] [--seed N]

Every part of a file that a checksum covers is known from the cache as it was: headers, blocks, models, indices, tails
and the records of journals. Some bytes of one or two of them are changed, and the checksums over them made anew, from
the inside out, so that only what a value says can give it away. What the decoder of the document finds then, bit by bit
and code by code, kdfast must find, too, and ``verify`` must tell of it. Of a cache that is refused as a whole the codes
may differ: one change is often more than one fault, a header that is illegal and not the one that a journal names.
"""

from __future__ import annotations

import argparse
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from format_parts import crc32c
from format_readers import Document, Engine, found

from kdfast import CacheError
from kdfast.cache import verify

GOLDEN = Path(__file__).parent / "golden"
#: Caches of every codec and method, several writers, shards without an index, models that are replaced.
BASES = [*(GOLDEN / "cache-v1" / name for name in ("base", "compact_base", "compact", "models", "fixed", "writers")),
         GOLDEN / "written-v1" / "compact"]  # fmt: skip
#: What the fields of a file are likely to be compared with.
EDGES = [0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 257, 4095, 4096, 65535, 65536, (1 << 20) - 1, 1 << 20,
         (1 << 24) - 1, 1 << 24, (1 << 28) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 48]  # fmt: skip


class Covered(NamedTuple):
    """Bytes that a checksum covers, and where that stands."""

    begin: int
    end: int
    crc: int


def u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def u64(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", data, at)[0])


def parts_of_shard(data: bytes) -> Iterator[Covered]:
    """Those of a shard, each before what covers its checksum."""
    at = u32(data, 12)
    yield Covered(0, at - 4, at - 4)
    yield Covered(at, at + 28, at + 28)
    at += 32
    end = u64(data, len(data) - 24) if data[-4:] == b"KDFT" else len(data)
    while data[at : at + 4] in (b"KDFM", b"KDFR"):
        size = u64(data, at + 8)
        if at + size > end:  # what a writer left that died
            break
        if data[at : at + 4] == b"KDFM":
            payload = u32(data, at + 4)
            yield Covered(at + 56, at + 56 + payload, at + 40)
            yield Covered(at, at + 52, at + 52)
        else:
            header = u32(data, at + 4)
            blocks = u32(data, at + header - 8)
            table, place = at + header - 8 - 8 * blocks, at + header
            for entry in range(table, table + 8 * blocks, 8):
                yield Covered(place, place + u32(data, entry), entry + 4)
                place += u32(data, entry)
            yield Covered(at, at + header - 4, at + header - 4)
        at += size
    if end < len(data):
        last = len(data) - 32
        yield Covered(end, last - 4, last - 4)
        yield Covered(last, last + 24, last + 24)


def parts_of(name: str, data: bytes) -> list[Covered]:
    """Of any file of a cache, those that are sound."""
    parts: Iterable[Covered] = ()
    if name == "cache.header":
        parts = [Covered(0, len(data) - 4, len(data) - 4)]
    elif name.endswith(".journal"):
        parts = [Covered(at, at + 56, at + 56) for at in range(0, len(data) - 63, 64)]
    elif name.endswith((".shard", ".open")) and len(data) >= 16:
        parts = parts_of_shard(data)
    return [part for part in parts if is_sound(data, part)]


def is_sound(data: bytes, part: Covered) -> bool:
    """Whether all of it is there, and as it was written: not of what a writer left that died."""
    there = part.begin < part.end and max(part.end, part.crc + 4) <= len(data)
    return there and crc32c(data[part.begin : part.end]) == u32(data, part.crc)


def change(rng: random.Random, data: bytearray, part: Covered) -> None:
    """A few bytes of a part, as a bit, a byte, a small difference or a number at an edge."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, how = rng.randrange(part.begin, part.end), rng.randrange(5)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.randrange(256)
        elif how == 2:
            data[at] = (data[at] + rng.choice([-1, 1])) % 256
        else:
            width = rng.choice([1, 2, 4, 8])
            at = part.begin + (at - part.begin) // width * width
            number = (rng.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
            data[at : min(at + width, part.end)] = number[: part.end - at]


def mutated(rng: random.Random, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files with some of them changed, and every checksum right again."""
    places = {name: parts_of(name, data) for name, data in files.items()}
    out = dict(files)
    for name in rng.choices([name for name, parts in places.items() if parts], k=rng.choice([1, 1, 1, 2])):
        data = bytearray(out[name])
        change(rng, data, rng.choice(places[name]))
        for part in places[name]:
            data[part.crc : part.crc + 4] = struct.pack("<I", crc32c(bytes(data[part.begin : part.end])))
        out[name] = bytes(data)
    return out


def differs(folder: Path) -> str | None:
    """What the two readers do not agree on, in words."""
    expected, got = found(Document, folder), found(Engine, folder)
    if expected != got and not (isinstance(expected, str) and isinstance(got, str)):
        if isinstance(expected, str) or isinstance(got, str):
            return f"the document's decoder finds {shown(expected)}, kdfast {shown(got)}"
        keys = [key for key in {**expected, **got} if expected.get(key) != got.get(key)]
        return "; ".join(f"{key!r}: {shown(expected.get(key))}, kdfast {shown(got.get(key))}" for key in keys)
    try:
        faults = verify(folder).faults
    except CacheError as error:
        return None if isinstance(expected, str) else f"verify raises {error}"
    unread = [code for code in expected.values() if isinstance(code, str)] if isinstance(expected, dict) else []
    return f"verify finds nothing, a reader {unread}" if unread and not faults else None


def shown(outcome: object) -> object:
    return outcome if outcome is None or isinstance(outcome, str) else "values"


def run(seed: int, folder: Path, *, seconds: float = float("inf"), most: int = 1 << 62) -> tuple[int, int]:
    """How many caches were tried, and how many of them no longer say what they did.

    Raises:
        AssertionError: readers that do not agree; the cache stays in ``folder``.
    """
    begun, tried, changed = time.monotonic(), 0, 0
    folder = folder / "cache"
    bases = [{path.name: path.read_bytes() for path in sorted(base.iterdir())} for base in BASES]
    said = [found(Document, base) for base in BASES]
    while tried < most and time.monotonic() - begun < seconds:
        rng = random.Random(f"{seed} {tried}")
        which = rng.randrange(len(bases))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in mutated(rng, bases[which]).items():
            (folder / name).write_bytes(data)
        if (what := differs(folder)) is not None:
            msg = f"seed {seed}, cache {tried}, made of {BASES[which].name}: {what}; it is in {folder}"
            raise AssertionError(msg)
        tried += 1
        changed += found(Engine, folder) != said[which]
    return tried, changed


def main() -> int:
    """0; what readers do not agree on is an error."""
    parser = argparse.ArgumentParser(prog="format_fuzz.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    tried, changed = run(options.seed, Path(tempfile.mkdtemp(prefix="format-fuzz-")), seconds=options.seconds)
    print(f"{tried} caches, of which {changed} no longer say what they did; the two readers agree on all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
