"""Where documents come from: text files, JSON lines, data sets of the ``datasets`` package, arrays of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdfast.cache.error import JobError
from kdfast.cache.job.samples import Document, Messages
from kdfast.cache.job.turns import Turns
from kdfast.cache.keys import require_unicode

#: A directory that holds one of these was written by ``save_to_disk``.
_SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """Data to run a teacher over.

    A text file is a document named by its path below the directory that was given; its samples are always numbered,
    "a.txt:0". A record of JSON lines or of a saved data set is named by ``id_field``, or by its number, counted over
    all files in their order; so is a row of a 2-D array. A 1-D array is one sequence, and its samples are counted.

    Args:
        paths: files .txt, .jsonl or .npy, directories of .txt files, or directories of ``Dataset.save_to_disk``; all of
            one of these kinds.
        field: of a record: its text, a list of its token ids, or a conversation, a list of messages.
        id_field: of a record: its key; None: its number.
        split: of a saved ``DatasetDict``.

    Raises:
        JobError: paths that are not there, of several kinds, or of none.
    """

    paths: Sequence[Path]
    field: str = "text"
    id_field: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        kinds = {_kind(path) for path in self.paths}
        if len(kinds) != 1:
            found = "nothing" if not kinds else ", ".join(sorted(kinds))
            msg = f"the data must be of one kind, text, .jsonl, .npy or a saved data set; got {found}"
            raise JobError(msg)
        if self.split is not None and kinds != {"saved"}:
            msg = "--split is for a saved data set"
            raise JobError(msg)
        if self.id_field is not None and kinds & {"text", "array"}:
            msg = "--id-field is for records, of .jsonl or of a saved data set"
            raise JobError(msg)

    def documents(self, length: int, rank: int = 0, world: int = 1) -> Iterator[Document]:
        """The documents of a process among ``world``, in the order of the data; a 1-D array in pieces of ``length``.

        Those of other processes are neither decoded nor parsed. One that is large is given to all, as ``shared``.
        """
        kind = _kind(self.paths[0])
        if kind == "text":
            return self._texts(rank, world)
        if kind == "array":
            return self._arrays(length, rank, world)
        return self._records(self._lines(rank, world) if kind == "lines" else self._rows(rank, world))

    def _texts(self, rank: int, world: int) -> Iterator[Document]:
        files: dict[str, Path] = {}
        for given in self.paths:
            found = sorted(given.rglob("*.txt")) if given.is_dir() else [given]
            for path in found:
                name = path.relative_to(given).as_posix() if given.is_dir() else path.name
                _require_unicode(name, "the name of a text file", ascii(str(path)))
                if name in files:
                    msg = f"two text files are named {name!r}, {files[name]} and {path}: give a directory above them"
                    raise JobError(msg)
                files[name] = path
        if not files:
            msg = f"no .txt file in {', '.join(str(p) for p in self.paths)}"
            raise JobError(msg)
        sizes = [path.stat().st_size for path in files.values()]
        turns = Turns(rank, world, sum(sizes))
        for (name, path), size in zip(files.items(), sizes, strict=True):
            if turns.take(size):
                yield Document(name, _decoded(path.read_bytes(), str(path)), True, turns.read, turns.shared)

    def _lines(self, rank: int, world: int) -> Iterator[_Record]:
        turns, number = Turns(rank, world, sum(path.stat().st_size for path in self.paths)), 0
        for path in self.paths:
            with path.open("rb") as file:
                for at, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    if turns.take(len(line)):
                        where = f"{path}, line {at}"
                        try:
                            value = json.loads(_decoded(line, where))
                        except JobError:
                            raise
                        except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets in brackets
                            msg = f"{where}: no JSON: {error}"
                            raise JobError(msg) from error
                        yield _Record(number, where, value, turns.read, turns.shared)
                    number += 1

    def _rows(self, rank: int, world: int) -> Iterator[_Record]:
        import datasets

        held = []
        for path in self.paths:
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if self.split not in data:
                    got = "none was given" if self.split is None else f"got {self.split!r}"
                    msg = f"{path} has the splits {', '.join(sorted(data))}: pass one as --split; {got}"
                    raise JobError(msg)
                data = data[self.split]
            elif self.split is not None:
                msg = f"{path} has no splits: leave --split out"
                raise JobError(msg)
            held.append((path, data.with_format(None)))
        total, before = sum(len(data) for _, data in held), 0
        turns = Turns(rank, world, total)
        for path, data in held:
            mine = np.fromiter((row for row in range(len(data)) if turns.take(1)), np.int64)
            for row, value in zip(mine.tolist(), data.select(mine), strict=True):
                yield _Record(before + row, f"{path}, row {row}", value, (before + row + 1) / total, turns.shared)
            before += len(data)

    def _records(self, records: Iterator[_Record]) -> Iterator[Document]:
        for number, where, record, read, shared in records:
            if not isinstance(record, Mapping):
                msg = f"{where}: a record must be an object, got {type(record).__name__}"
                raise JobError(msg)
            key: object = number if self.id_field is None else _of(record, self.id_field, where, "--id-field")
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                msg = f"{where}: field {self.id_field!r} must be a text or a whole number, got {type(key).__name__}"
                raise JobError(msg)
            content = _of(record, self.field, where, "--field")
            held = content if isinstance(content, str) else _messages(content, where) or _token_ids(content, where)
            for text, field in ((key, self.id_field), (held, self.field)):
                if isinstance(text, str) and not text.isascii():
                    _require_unicode(text, f"field {field!r}", where)
            yield Document(str(key), held, False, read, shared)

    def _arrays(self, length: int, rank: int, world: int) -> Iterator[Document]:
        arrays = []
        for path in self.paths:
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                msg = f"{path}: no array: {error}"
                raise JobError(msg) from error
            if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
                msg = f"{path}: an array must be 1-D or 2-D of whole numbers, got {array.shape} {array.dtype}"
                raise JobError(msg)
            arrays.append(array)
        turns, number = Turns(rank, world, sum(a.size for a in arrays)), 0
        for array in arrays:
            rows = array if array.ndim == 2 else (array[i : i + length] for i in range(0, len(array), length))
            for row in rows:
                if turns.take(len(row)):
                    yield Document(str(number), np.array(row, dtype=np.int64), False, turns.read, turns.shared)
                number += 1


class _Record(NamedTuple):
    number: int  # over all files
    where: str
    value: Any
    read: float
    shared: bool


def _kind(path: Path) -> str:
    if not path.exists():
        msg = f"{path} does not exist"
        raise JobError(msg)
    if path.is_dir():
        return "saved" if any((path / name).exists() for name in _SAVED) else "text"
    kind = {".txt": "text", ".jsonl": "lines", ".npy": "array"}.get(path.suffix)
    if kind is None:
        msg = f"{path} is no .txt, .jsonl or .npy file"
        raise JobError(msg)
    return kind


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"{where}: no UTF-8: {error.reason} at byte {error.start}"
        raise JobError(msg) from error


def _require_unicode(text: str, what: str, where: str) -> None:
    try:
        require_unicode(text, what)
    except ValueError as error:
        msg = f"{where}: {error}"
        raise JobError(msg) from error


def _of(record: Mapping[str, Any], field: str, where: str, option: str) -> Any:
    if field not in record:
        msg = f"{where} has no field {field!r}, it has {', '.join(map(str, record)) or 'none'}: pass {option}"
        raise JobError(msg)
    return record[field]


def _messages(content: object, where: str) -> Messages | None:
    """A conversation; None where it is something else."""
    if not isinstance(content, list) or not content or not all(isinstance(one, Mapping) for one in content):
        return None
    for number, message in enumerate(content):
        if not isinstance(message.get("role"), str):
            msg = f"{where}: message {number} must have a role, it has {', '.join(map(str, message)) or 'nothing'}"
            raise JobError(msg)
    try:
        require_unicode(json.dumps(content, ensure_ascii=False, default=str), "a message")
    except ValueError as error:
        msg = f"{where}: {error}"
        raise JobError(msg) from error
    return content


def _token_ids(content: object, where: str) -> npt.NDArray[np.int64]:
    whole = isinstance(content, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in content)
    if not whole:
        msg = f"{where}: the field must be a text, a list of token ids or one of messages, got {type(content).__name__}"
        raise JobError(msg)
    try:
        return np.array(content, dtype=np.int64)
    except OverflowError as error:
        msg = f"{where}: a token id has more than 64 bits"
        raise JobError(msg) from error
