"""As much of a journal as speaks of finished shards only (FORMAT.md, section 7)."""

from __future__ import annotations

import struct
from collections.abc import Set as AbstractSet

_RECORD = struct.Struct("<4sIQIIQQQQI4s")
_OPEN, _FINISH, _DROP = 2, 4, 6


def finished_part(journal: bytes, shard_ids: AbstractSet[int] | None = None) -> bytes:
    """The longest beginning after which every shard is finished or given up: an older state of the cache.

    Args:
        journal: its bytes, of which a torn last record is left out; the engine checks them, this does not.
        shard_ids: those that the state is to hold, or None for any.
    """
    there: set[int] = set()
    unfinished: set[int] = set()
    length = 0
    for at in range(0, len(journal) - _RECORD.size + 1, _RECORD.size):
        if journal[at + _RECORD.size - 1] == 0:
            break
        _, kind, _, _, _, shard_id, *_ = _RECORD.unpack_from(journal, at)
        if kind == _OPEN:
            there.add(shard_id)
            unfinished.add(shard_id)
        elif kind == _FINISH:
            unfinished.discard(shard_id)
        elif kind == _DROP:
            there.discard(shard_id)
            unfinished.discard(shard_id)
        if not unfinished and (shard_ids is None or there == shard_ids):
            length = at + _RECORD.size
    return journal[:length]


def dropped(journal: bytes) -> set[int]:
    """The ids of the shards that were given up."""
    records = (_RECORD.unpack_from(journal, at) for at in range(0, len(journal) - _RECORD.size + 1, _RECORD.size))
    return {record[5] for record in records if record[1] == _DROP}
