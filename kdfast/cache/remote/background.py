"""Work that is done ahead, by a few threads, until somebody needs its result."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable


class Background:
    """Calls ``work(item)`` for items to come; an error is kept for whoever waits for the item.

    The threads end when nothing is left to do, and do not keep the process from ending.
    """

    def __init__(self, work: Callable[[int], None], threads: int = 4) -> None:
        self._work = work
        self._most = threads
        self._threads = 0
        self._changed = threading.Condition()
        self._queue: deque[int] = deque()
        self._running: set[int] = set()
        self._errors: dict[int, BaseException] = {}

    def ask(self, items: Iterable[int], *, keep: bool) -> None:
        """These next, in this order; then what was asked for before, with ``keep``, or else none of it."""
        with self._changed:
            wanted = [item for item in dict.fromkeys(items) if item not in self._running]
            old = [item for item in self._queue if item not in wanted] if keep else []
            self._queue = deque(wanted + old)
            for item in wanted:
                self._errors.pop(item, None)  # it is tried again
            for _ in range(min(self._most - self._threads, len(self._queue))):
                self._threads += 1
                threading.Thread(target=self._run, name="kdfast prefetch", daemon=True).start()

    def wait(self, item: int) -> None:
        """Returns when an item is done, or at once where nobody has begun it: that is then for the caller.

        Raises:
            Exception: what went wrong with it; raised once.
        """
        with self._changed:
            if item in self._queue:
                self._queue.remove(item)
            self._changed.wait_for(lambda: item not in self._running)
            error = self._errors.pop(item, None)
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._threads -= 1
                    return
                item = self._queue.popleft()
                self._running.add(item)
            error = None
            try:
                self._work(item)
            except BaseException as caught:  # for the reader of this item, which is told all of it
                error = caught
            with self._changed:
                self._running.discard(item)
                if error is not None:
                    self._errors[item] = error
                self._changed.notify_all()
