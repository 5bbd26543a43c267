"""Caches changed at random behind right checksums, some of them; ``make nightly`` tries them for twenty minutes."""

from __future__ import annotations

import random

import format_fuzz
import pytest
from conftest import SEED
from format_readers import Document, Engine, found


def test_two_readers_agree_on_changed_caches(tmp_path):
    tried, changed = format_fuzz.run(SEED, tmp_path, most=1000)
    assert tried == 1000
    assert changed > 500


@pytest.mark.parametrize("base", format_fuzz.BASES, ids=lambda base: base.name)
def test_every_checksum_is_known(base, tmp_path):
    """They cover the files; each made wrong is a fault, or of what is there twice, and both readers say the same."""
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    rng, unnoticed, tried = random.Random(SEED), 0, 0
    said = found(Document, base)
    for name, data in files.items():
        parts = format_fuzz.parts_of(name, data)
        if name.endswith((".shard", ".header")):
            covered = {at for part in parts for at in (*range(part.begin, part.end), *range(part.crc, part.crc + 4))}
            assert len(covered) >= 0.9 * len(data) or base.name == "models"  # some of which are damaged
        for part in parts:
            spoilt = bytearray(data)
            spoilt[rng.randrange(part.crc, part.crc + 4)] ^= 1 << rng.randrange(8)
            folder = tmp_path / str(tried)
            folder.mkdir()
            for other, content in files.items():
                (folder / other).write_bytes(bytes(spoilt) if other == name else content)
            assert found(Document, folder) == found(Engine, folder)
            unnoticed += found(Engine, folder) == said
            tried += 1
    assert tried > 5
    assert unnoticed < tried / 2
