"""Distillation methods: losses between a student and its teachers, for :class:`kdfast.Distiller`.

``response`` compares logits, ``feature`` what is inside the models, ``relation`` how samples lie to each other.
"""

from kdfast.methods.batch import Inputs, split_batch
from kdfast.methods.feature import (
    FSP,
    NST,
    VID,
    AttentionMaps,
    AttentionTransfer,
    FitNet,
    MiniLM,
    MiniLMv2,
    TinyBERT,
)
from kdfast.methods.loss import Loss, Term
from kdfast.methods.projection import Projection
from kdfast.methods.relation import CC, CRD, PKT, RKD, SP
from kdfast.methods.response import (
    DIST,
    DKD,
    KD,
    NKD,
    TTM,
    WTTM,
    AdaptiveKL,
    CrossEntropy,
    LearnedTemperature,
    LogitStandardisation,
    adaptive_kl_loss,
    dist_loss,
    dkd_loss,
    nkd_loss,
    standardised_loss,
    ttm_loss,
)
from kdfast.methods.schedule import Cosine, Linear, WarmUp
from kdfast.methods.step import Outputs, Step

__all__ = [
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "FSP",
    "KD",
    "NKD",
    "NST",
    "PKT",
    "RKD",
    "SP",
    "TTM",
    "VID",
    "WTTM",
    "AdaptiveKL",
    "AttentionMaps",
    "AttentionTransfer",
    "Cosine",
    "CrossEntropy",
    "FitNet",
    "Inputs",
    "LearnedTemperature",
    "Linear",
    "LogitStandardisation",
    "Loss",
    "MiniLM",
    "MiniLMv2",
    "Outputs",
    "Projection",
    "Step",
    "Term",
    "TinyBERT",
    "WarmUp",
    "adaptive_kl_loss",
    "dist_loss",
    "dkd_loss",
    "nkd_loss",
    "split_batch",
    "standardised_loss",
    "ttm_loss",
]
