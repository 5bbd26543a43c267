"""What a power cut may leave of recorded file operations, as far as POSIX promises anything.

A file's data are safe once ``fdatasync`` has returned; before that every write may be there, missing, half there, or
there as zeros, whatever became of others. A name (created, linked, renamed, removed) is safe once its directory was
synchronised; before that each may have happened or not. Names are applied in order, as journalling file systems do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Operation:
    """A recorded call; ``data`` of a write."""

    kind: str
    words: list[str]
    data: bytes = b""


def parse(trace: bytes) -> list[Operation]:
    operations, at = [], 0
    while at < len(trace):
        end = trace.index(b"\n", at)
        kind, *words = trace[at:end].decode().split(" ")
        at = end + 1
        data = b""
        if kind == "write":
            size = int(words[2])
            data, at = trace[at : at + size], at + size
        operations.append(Operation(kind, words, data))
    return operations


@dataclass
class File:
    safe: bytes = b""
    pending: list[Operation] = field(default_factory=list)


class Disk:
    """The state of one directory: what is safe, and what has been asked for since."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}  # by inode
        self.names: dict[str, str] = {}  # safe: name -> inode
        self.pending: list[tuple[str, list[str]]] = []  # of names
        self.marks: list[str] = []

    def apply(self, op: Operation) -> None:
        match op.kind:
            case "create":
                self.files[op.words[0]] = File()  # an inode may be used again
                self.pending.append(("create", [op.words[1], op.words[0]]))
            case "write" | "truncate":
                self.files[op.words[0]].pending.append(op)
            case "sync":
                file = self.files[op.words[0]]
                file.safe, file.pending = _written(file.safe, file.pending), []
            case "syncdir":
                self.names, self.pending = _named(self.names, self.pending), []
            case "rename" | "link" | "unlink":
                self.pending.append((op.kind, op.words))
            case "mark":
                self.marks.append(" ".join(op.words))
            case _:
                raise ValueError(op.kind)

    def leave(self, directory: Path, rng: random.Random, how: str) -> None:
        """Writes into an empty directory what a crash now leaves: nothing that is not safe, all, or some of it."""
        pending = {"nothing": [], "all": self.pending}.get(how)
        if pending is None:
            pending = [op for op in self.pending if rng.random() < 0.5]
        for name, inode in _named(self.names, pending).items():
            file = self.files[inode]
            if how == "nothing":
                content = file.safe
            elif how == "all":
                content = _written(file.safe, file.pending)
            else:
                content = _written(file.safe, list(_damaged(file.pending, rng)))
            (directory / name).write_bytes(content)


def _written(content: bytes, operations: list[Operation]) -> bytes:
    out = bytearray(content)
    for op in operations:
        if op.kind == "truncate":
            del out[int(op.words[1]) :]
            continue
        offset = int(op.words[1])
        out.extend(bytes(max(0, offset + len(op.data) - len(out))))
        out[offset : offset + len(op.data)] = op.data
    return bytes(out)


def _damaged(operations: list[Operation], rng: random.Random) -> Iterator[Operation]:
    for op in operations:
        fate = rng.choice(["there", "lost", "torn", "zeroed", "torn, rest zeroed"])
        if op.kind == "truncate" or fate == "there":
            yield op
        elif fate != "lost":
            cut = 0 if fate == "zeroed" else rng.randrange(len(op.data) + 1)
            rest = b"" if fate == "torn" else bytes(len(op.data) - cut)
            yield Operation("write", op.words, op.data[:cut] + rest)


def _named(names: dict[str, str], operations: list[tuple[str, list[str]]]) -> dict[str, str]:
    out = dict(names)
    for kind, words in operations:
        match kind:
            case "create":
                out[words[0]] = words[1]
            case "link" | "rename" if words[0] in out:
                out[words[1]] = out[words[0]]
                if kind == "rename":
                    del out[words[0]]
            case "unlink":
                out.pop(words[0], None)
    return out
