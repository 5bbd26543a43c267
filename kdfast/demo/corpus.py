"""The corpus: Python's own standard library, present on every machine that runs this package.

A file belongs to the held-out part or to the training part by a hash of its path alone, so that the decision is
the same on every machine and every Python version: the teacher that ships with the package never saw a file that
is held out here, whichever interpreter runs the demonstration.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HELD_OUT_PERCENT = 8

# Tests are missing from many distributions' packages, so including them would make the corpus depend on the
# machine. The code tables of `encodings`, the help texts of `pydoc_data` and the build settings in
# `_sysconfigdata*` are generated files, not source that anybody wrote. The rest is not the standard library.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
SKIPPED_PREFIXES = ("_sysconfigdata",)


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus."""

    name: str  # path below the library's root, with forward slashes
    text: str


@dataclass(frozen=True)
class Corpus:
    """The two parts of the corpus, each sorted by name."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def split_key(name: str) -> str:
    """Returns the name that is hashed: `re/__init__.py` and `re.py` are the same module and must not be split."""
    return name[: -len("/__init__.py")] + ".py" if name.endswith("/__init__.py") else name


def percentile(name: str) -> int:
    """Returns a number of 0 to 99, by the path (relative, forward slashes) alone."""
    digest = hashlib.sha256(split_key(name).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


def is_held_out(name: str) -> bool:
    """Says whether the file of that path belongs to the held-out part."""
    return percentile(name) < HELD_OUT_PERCENT


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads the standard library's source.

    Args:
        root: folder to read instead of the running Python's standard library.

    Returns:
        Both parts, sorted by name.

    Raises:
        FileNotFoundError: the folder holds no source on one side of the split (a zipped or stripped library).
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = sorted(_read(folder), key=lambda file: file.name)
    train = tuple(file for file in files if not is_held_out(file.name))
    held_out = tuple(file for file in files if is_held_out(file.name))
    if not train or not held_out:
        msg = (
            f"{folder} holds {len(files)} usable .py files, too few for a corpus: run the demonstration with a "
            "Python whose standard library is installed as source files"
        )
        raise FileNotFoundError(msg)
    return Corpus(train, held_out)


def _read(folder: Path) -> list[SourceFile]:
    files = []
    for path in folder.rglob("*.py"):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        if SKIPPED_FOLDERS.intersection(name.parts[:-1]) or name.name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a few library files are Latin-1 on purpose; a dangling link is no text
            continue
        if text.strip():
            files.append(SourceFile(str(name), text))
    return files
