"""The one error of the job."""

from __future__ import annotations


class JobError(ValueError):
    """A teacher, data or options that a cache cannot be built from; the message says which and what would do."""
