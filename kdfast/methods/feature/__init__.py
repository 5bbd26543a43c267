"""Losses of what is inside a model: feature maps, hidden states, attention."""

from kdfast.methods.feature.attention_maps import AttentionMaps
from kdfast.methods.feature.attention_transfer import AttentionTransfer
from kdfast.methods.feature.fitnet import FitNet
from kdfast.methods.feature.fsp import FSP
from kdfast.methods.feature.minilm import MiniLM, MiniLMv2
from kdfast.methods.feature.nst import NST
from kdfast.methods.feature.tinybert import TinyBERT
from kdfast.methods.feature.vid import VID

__all__ = ["FSP", "NST", "VID", "AttentionMaps", "AttentionTransfer", "FitNet", "MiniLM", "MiniLMv2", "TinyBERT"]
