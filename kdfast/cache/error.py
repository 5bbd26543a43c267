"""The errors of the cache."""

from __future__ import annotations


class JobError(ValueError):
    """A teacher, data or options that a cache cannot be built from; the message says which and what would do."""


class CacheError(ValueError):
    """A cache, or a part of one, that is not what it should be; raised in place of a value that might be wrong.

    Attributes:
        code: what kind of fault: "missing", "version", "truncated", "checksum", "corrupt", "mismatch", "duplicate",
            "misaligned", or "system" where the operating system refused.
        path: the file or directory, or None where it is not known.
        key: the sample, or None where the fault is not about one.
        offset: the byte in the file, or None.
    """

    def __init__(
        self, what: str, code: str, path: str | None = None, key: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(what, code, path, key, offset)
        self.code = code
        self.path = path
        self.key = key
        self.offset = offset

    def __str__(self) -> str:
        where = [] if self.path is None else [self.path]
        where += [] if self.key is None else [f"sample {self.key!r}"]
        where += [] if self.offset is None else [f"byte {self.offset}"]
        return f"{self.args[0]} [{self.code}; {', '.join(where)}]" if where else f"{self.args[0]} [{self.code}]"


CacheError.__module__ = "kdfast"  # where it is for users, and for what they pickle
