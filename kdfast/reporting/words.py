"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """The number and what is counted, "1 seed" or "1,200 seeds"; ``plural`` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def were_there(number: int) -> str:
    """Of what is not copied or written a second time."""
    return f"{number:,} {'was' if number == 1 else 'were'} there already"
