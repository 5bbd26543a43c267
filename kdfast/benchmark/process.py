"""What the operating system says of this process: page faults and peak memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current resident size


def minor_page_faults() -> int | None:
    """Minor page faults of this process so far, all threads; None where the system does not count them."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """Resident memory that ``run`` needs at its peak, above what is resident before it; None where not measurable.

    What it returns or leaves behind counts. Linux only; exact to about a megabyte.
    """
    _return_free_memory()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except OSError:  # not Linux, or a container that does not let a process reset its peak
        return None
    run()
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _return_free_memory() -> None:
    """Free memory that the allocator keeps would be used again without showing up as growth."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def _status_bytes(key: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None
