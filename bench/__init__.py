"""What is measured beside ``kdfast bench``: ``python -m bench.head`` and others, of the kdfast that is installed."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

# ``python -m`` puts the repository's folder first, where kdfast has no compiled core: behind what is installed with it.
sys.path.sort(key=lambda place: Path(place).resolve() == _ROOT)
