"""kdfast: a distillation engine for PyTorch that reads each logit once and writes each gradient once."""

from kdfast import reference
from kdfast.divergence import Divergence
from kdfast.loss import DistillLoss, distill_loss
from kdfast.ops._registry import backends
from kdfast.reference import DistillTerms
from kdfast.soft_targets import soft_targets
from kdfast.targets import LMHead, SparseTargets
from kdfast.uld import uld_loss

__version__ = "0.1.0"

__all__ = [
    "DistillLoss",
    "DistillTerms",
    "Divergence",
    "LMHead",
    "SparseTargets",
    "__version__",
    "backends",
    "distill_loss",
    "reference",
    "soft_targets",
    "uld_loss",
]
