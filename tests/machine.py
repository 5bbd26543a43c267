"""What this machine can run: the instruction sets of the compiled core, and the backends."""

from __future__ import annotations

try:
    from kdfast import _core
except ImportError:
    _core = None

ISAS = _core.supported_isas() if _core is not None else []
BACKENDS = ["reference", *(f"cpu-{isa}" for isa in ISAS)]
