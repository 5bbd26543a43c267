"""What becomes of a second sample of one key."""

from __future__ import annotations

from typing import Literal, TypeAlias

#: Of a key and token ids that are there already, where the targets are others: an error, or the first stays.
OnDuplicate: TypeAlias = Literal["error", "keep"]


def keeps_duplicates(on_duplicate: OnDuplicate) -> bool:
    """Whether the first stays, without a word.

    Raises:
        ValueError: neither "error" nor "keep".
    """
    if on_duplicate not in ("error", "keep"):
        msg = f'on_duplicate must be "error" or "keep", got {on_duplicate!r}'
        raise ValueError(msg)
    return on_duplicate == "keep"
