"""What ran: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Returns what figures are recorded beside."""
    return {
        "kdfast": importlib.metadata.version("kdfast"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
        "system": platform.system(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
