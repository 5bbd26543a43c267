"""What the machine is."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "triton", "numpy", "liger-kernel", "speculators", "fla-core", "trl", "cut-cross-entropy")


def versions(device: Any) -> dict[str, str]:
    """Names and versions, as the tables print them."""
    import torch

    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        commit = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} (rehearsal)"
    return {"device": name, "commit": commit or "unknown", "python": platform.python_version()} | found
