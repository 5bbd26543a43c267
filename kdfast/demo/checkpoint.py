"""The state of an unfinished run, in one file that is either whole or absent."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdfast.demo.settings import DemoError, DemoSettings

FILE_NAME = "checkpoint.pt"


@dataclass
class Progress:
    """How far a run has come."""

    finished: list[dict[str, Any]] = field(default_factory=list)  # results of the students that are done
    current: dict[str, Any] | None = None  # state of the student in training, tensors and numbers
    written: dict[str, Any] = field(default_factory=dict)  # what went into the cache, and in what time
    seconds: float = 0.0  # spent before the checkpoint


class Interrupted(Exception):
    """The run was asked to stop and has left its checkpoint."""


def save(folder: Path, settings: DemoSettings, progress: Progress) -> None:
    """Writes the checkpoint: a crash in the middle leaves the one before it untouched."""
    path = folder / FILE_NAME
    partial = path.with_suffix(".partial")
    state = {
        # Text, because what is read back must be tensors and plain values alone (weights_only).
        "fingerprint": json.dumps(settings.fingerprint()),
        "finished": json.dumps(progress.finished),
        "current": progress.current,
        "written": progress.written,
        "seconds": progress.seconds,
    }
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(folder: Path, settings: DemoSettings) -> Progress:
    """Reads the checkpoint of a run with the same settings.

    Raises:
        DemoError: there is none, it is damaged, or it belongs to a run with other settings.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        msg = f"--resume: {path} does not exist; leave --resume away to start a run, or name its folder with --out"
        raise DemoError(msg)
    try:
        state = torch.load(path, weights_only=True)
        stored = json.loads(state["fingerprint"])
        progress = Progress(json.loads(state["finished"]), state["current"], state["written"], state["seconds"])
    except Exception as error:  # torch.load raises whatever its reader stumbles over in a damaged file
        msg = f"--resume: {path} cannot be read ({error}); start over with --restart"
        raise DemoError(msg) from error
    wanted = settings.fingerprint()
    differing = [name for name in wanted if stored.get(name) != wanted[name]]
    if differing:
        each = ", ".join(f"{name} {stored.get(name)} there and {wanted[name]} now" for name in differing)
        msg = f"--resume: {path} belongs to a run with other settings ({each}): repeat those, or use --restart"
        raise DemoError(msg)
    return progress


def remove(folder: Path) -> None:
    """Deletes the checkpoint, if there is one."""
    (folder / FILE_NAME).unlink(missing_ok=True)
