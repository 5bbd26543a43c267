"""kdfast: a distillation engine for PyTorch that reads each logit once and writes each gradient once."""

from importlib.util import find_spec
from pathlib import Path

if find_spec("kdfast._core") is None:  # before anything runs, slowly and unasked, in plain PyTorch
    _here = Path(__file__).parent
    if (_here.parent / "CMakeLists.txt").exists():
        _why = (
            f"Python found the source tree at {_here}, which is not built: start it in another folder (or with "
            'python -P), where the installed package is found; pip install ".[test]" there installs it'
        )
    else:
        _why = f"{_here} was not built for this Python: pip install --force-reinstall kdfast"
    _why = f"kdfast has no compiled extension kdfast._core. {_why}"
    raise ImportError(_why)

from kdfast import cache, methods, reference
from kdfast.cache.error import CacheError
from kdfast.distiller import Distiller
from kdfast.divergence import Divergence
from kdfast.loss import DistillLoss, distill_loss
from kdfast.ops._registry import backends
from kdfast.packed import PackedTargets
from kdfast.reference import DistillTerms
from kdfast.reporting.report import report
from kdfast.soft_targets import soft_targets
from kdfast.targets import LMHead, SparseTargets
from kdfast.uld import uld_loss

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "DistillLoss",
    "DistillTerms",
    "Distiller",
    "Divergence",
    "LMHead",
    "PackedTargets",
    "SparseTargets",
    "__version__",
    "backends",
    "cache",
    "distill_loss",
    "methods",
    "reference",
    "report",
    "soft_targets",
    "uld_loss",
]
