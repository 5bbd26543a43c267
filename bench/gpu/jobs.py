"""Work in processes of its own, so that a fault or a hang costs what it happened in and nothing else.

A process takes items one after another and writes a line of JSON for what it found, as it finds it. One that dies, or
says nothing for as long as an item may take, loses the item that it had begun, and another takes the rest.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
#: Seconds between looks at a process.
GLANCE = 0.05
#: Lines of a log that are kept of a process that died.
TAIL = 30

DONE, FAILED, CRASHED, TIMED_OUT, NOT_RUN = "done", "failed", "crashed", "timed out", "not run"
#: Why an item is not done where nothing is wrong with it.
LATE = "out of time"


@dataclass
class Outcome:
    """What came of an item."""

    item: str
    state: str = NOT_RUN
    result: dict[str, Any] = field(default_factory=dict)  # all that was written before the end, whatever the end
    note: str = ""  # why it is not done; of a failure the whole traceback
    log: str = ""  # the file's name
    seconds: float = 0.0


@dataclass
class Runner:
    """Where processes run, until when, and what they are told."""

    folder: Path  # for what they write
    environment: dict[str, str]
    deadline: float  # seconds of time.monotonic
    rehearse: bool = False
    sabotage: int = 0  # every so many-th item aborts or hangs, in turn; 0: none. For rehearsals
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(
        self,
        kind: str,
        items: Sequence[str],
        *,
        limit: float,
        prefix: Sequence[str] = (),
        arguments: Sequence[str] = (),
        workers: int = 1,
        per_process: int = 1,
    ) -> Iterator[Outcome]:
        """Outcomes of all items, each as it is there.

        Args:
            kind: a function of :mod:`bench.gpu.worker`.
            items: names that it knows, each once.
            limit: seconds that an item may take, the start of its process included.
            prefix: a command that runs the process, such as a checker of memory.
            arguments: further ones of the process.
            workers: processes at a time.
            per_process: items that a process takes, one after another.
        """
        shares = [items[k : k + per_process] for k in range(0, len(items), per_process)]
        command = [*prefix, sys.executable, str(WORKER), kind, *arguments]
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._share, kind, command, share, limit) for share in shares]
            for future in concurrent.futures.as_completed(futures):
                yield from future.result()

    def _share(self, kind: str, command: list[str], items: Sequence[str], limit: float) -> list[Outcome]:
        outcomes = {item: Outcome(item) for item in items}
        left = list(items)
        while left and time.monotonic() < self.deadline:
            ended = self._process(kind, command, left, outcomes, limit)
            # one that began nothing would begin nothing again
            left = [item for item in left if outcomes[item].state == NOT_RUN] if ended else []
        for item in left:
            if not outcomes[item].note:
                outcomes[item].note = LATE
        return list(outcomes.values())

    def _process(
        self, kind: str, command: list[str], items: list[str], outcomes: dict[str, Outcome], limit: float
    ) -> bool:
        """One process over the items that are left; whether it ended any."""
        number = next(self.numbers)
        name = f"{kind}-{number:03d}"
        said, log = self.folder / f"{name}.jsonl", self.folder / f"{name}.log"
        said.touch()
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, "--out", str(said), *(["--rehearse"] if self.rehearse else []), "--", *items],
                env=self.environment | self._fault(number),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        begun, size, why = time.monotonic(), 0, ""
        since = begun
        while process.poll() is None:
            time.sleep(GLANCE)
            now = time.monotonic()
            if said.stat().st_size != size:
                size, since = said.stat().st_size, now
            if now - since > limit or now > self.deadline:
                why = f"nothing for {limit:.0f} s" if now <= self.deadline else LATE
                end(process)
        status = process.wait()
        current = _read(said, outcomes)
        if current is not None:  # begun and not ended
            outcome = outcomes[current]
            outcome.state = NOT_RUN if why == LATE else TIMED_OUT if why else CRASHED
            outcome.note = why or f"{_status(status)}; {_tail(log)}"
        elif status and all(outcomes[item].state == NOT_RUN for item in items):
            for item in items:
                outcomes[item].state, outcomes[item].note = CRASHED, why or f"{_status(status)}; {_tail(log)}"
        ended = [item for item in items if outcomes[item].state != NOT_RUN]
        for item in ended:
            outcomes[item].log = log.name
            outcomes[item].seconds = outcomes[item].seconds or time.monotonic() - begun
        return bool(ended)

    def _fault(self, number: int) -> dict[str, str]:
        if not self.sabotage or number % self.sabotage != self.sabotage - 1:
            return {}
        return {"KDFAST_GPU_SUITE_FAULT": ("abort", "hang")[number // self.sabotage % 2]}


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that leads its session, with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.wait()


def _read(said: Path, outcomes: dict[str, Outcome]) -> str | None:
    """Takes over what a process wrote; the item that it had begun and not ended."""
    current = None
    for line in said.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by the end of the process
            continue
        outcome = outcomes[entry["item"]]
        outcome.result |= entry.get("result", {})
        current = entry["item"]
        if "state" in entry:
            outcome.state, outcome.note, outcome.seconds = entry["state"], entry["note"], entry["seconds"]
            current = None
    return current


def _status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
