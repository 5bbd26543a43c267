"""kdfast: a distillation engine for PyTorch that reads each logit once and writes each gradient once."""

from kdfast import cache, methods, reference
from kdfast.cache.error import CacheError
from kdfast.distiller import Distiller
from kdfast.spec.divergence import Divergence
from kdfast.loss import DistillLoss, distill_loss
from kdfast.ops._registry import backends
from kdfast.spec.packed import PackedTargets
from kdfast.spec.reference import DistillTerms
from kdfast.reporting.report import report
from kdfast.soft_targets import soft_targets
from kdfast.spec.sparse import LMHead, SparseTargets
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
