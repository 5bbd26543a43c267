"""What can go wrong in a benchmark, by who has to act."""

from __future__ import annotations


class BenchError(Exception):
    """The question cannot be answered as put: a bad name, file or setting. `kdfast bench` exits 2."""


class WrongResultError(Exception):
    """A competitor's loss or gradient differs from kdfast's, so its time means nothing. `kdfast bench` exits 1."""
