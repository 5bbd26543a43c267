"""Losses of a model's outputs: its logits against the teacher's."""

from kdfast.methods.response.adaptive_kl import AdaptiveKL, adaptive_kl_loss
from kdfast.methods.response.dist import DIST, dist_loss
from kdfast.methods.response.dkd import DKD, dkd_loss
from kdfast.methods.response.kd import KD, CrossEntropy
from kdfast.methods.response.nkd import NKD, nkd_loss
from kdfast.methods.response.standardised import LogitStandardisation, standardised_loss
from kdfast.methods.response.temperature import LearnedTemperature
from kdfast.methods.response.ttm import TTM, WTTM, ttm_loss

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "NKD",
    "TTM",
    "WTTM",
    "AdaptiveKL",
    "CrossEntropy",
    "LearnedTemperature",
    "LogitStandardisation",
    "adaptive_kl_loss",
    "dist_loss",
    "dkd_loss",
    "nkd_loss",
    "standardised_loss",
    "ttm_loss",
]
