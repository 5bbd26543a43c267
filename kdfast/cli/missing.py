"""What a command says whose extra is not installed."""

from __future__ import annotations

import sys
from typing import Any

EXIT_USAGE = 2


def exit_missing(who: str, error: ModuleNotFoundError, extra: str) -> Any:
    """Names the extra and exits; a missing module of our own is a broken installation and stays a traceback."""
    package = (error.name or "").partition(".")[0]
    if package in {"", "kdfast"}:
        raise error
    print(
        f'{who} needs the package "{package}", which is not installed: pip install "kdfast[{extra}]"', file=sys.stderr
    )
    sys.exit(EXIT_USAGE)
