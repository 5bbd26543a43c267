"""Worked recipes: ``python -m examples.digits`` and others, each a loop of one's own around ``kdfast.Distiller``.

Run from the repository's folder they use the kdfast that is installed, not the sources beside them.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

if "kdfast" not in sys.modules and not any((_ROOT / "kdfast").glob("_core*.so")):
    # ``python -m`` looks for kdfast here first, where it has no compiled core.
    _places, sys.path = sys.path, [place for place in sys.path if Path(place).resolve() != _ROOT]
    try:
        import kdfast  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "kdfast":
            raise
        sys.exit('the examples need kdfast installed: pip install ".[examples]"')
    finally:
        sys.path = _places
