"""What a trainer has to know of the models it is given."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from kdfast.integrations.huggingface import WithoutAdapters, head_of
from kdfast.methods.layers import unwrapped
from kdfast.methods.loss import LossLike, Term, as_loss
from kdfast.methods.projection import Projection

#: Names of transformers' tables of models that predict the next token; encoder-decoder models among them do not.
_CAUSAL = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISION_2_SEQ")
_CAUSAL_LOSSES = ("ForCausalLM", "ForConditionalGeneration")


def is_causal(model: nn.Module) -> bool:
    """Whether a model's logits at position i are of token i + 1: as of a causal language model of transformers."""
    if "transformers" not in sys.modules:
        return False
    from transformers.models.auto import modeling_auto as auto

    inner: Any = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    names = {name for kind in _CAUSAL for name in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).values()}
    kinds = [kind.__name__ for kind in type(inner).__mro__]
    listed = any(kind in names or kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    return listed or getattr(inner, "loss_type", None) in _CAUSAL_LOSSES


def head_for(option: str, model: Any, given: Any, losses: Sequence[LossLike]) -> Projection | None:
    """The output projection of a model, as a trainer's option has it.

    Args:
        option: its name, for messages.
        model: or another teacher.
        given: True, False, a Projection, or None: where there is one, and every loss is kdfast's own, which does not
            look at logits by itself.
        losses: of the trainer.

    Raises:
        TypeError: another ``given``.
        ValueError: as :func:`kdfast.integrations.huggingface.head_of`.
    """
    if not (given is None or isinstance(given, (bool, Projection))):
        msg = f"{option} must be True, False, a kdfast.methods.Projection or None, got {type(given).__name__}"
        raise TypeError(msg)
    if isinstance(given, Projection):
        return given
    if given is False or not isinstance(model, nn.Module):
        return None
    if given is None:
        inner: Any = unwrapped(model)
        there = hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None
        if not there and not isinstance(inner, WithoutAdapters):
            return None
        kinds = [type(as_loss(loss)) for loss in losses] if isinstance(losses, (list, tuple)) else []
        if any(kind is Term or kind.__module__.partition(".")[0] != "kdfast" for kind in kinds):
            return None
    try:
        return head_of(model)
    except ValueError as error:
        msg = f"{error} ({option}=False takes the model's own logits)"
        raise ValueError(msg) from error


def in_place(teacher: nn.Module) -> bool:
    """Whether a teacher's modules are where they are to be: dispatched, quantised or sharded, or the student's own."""
    inner: Any = unwrapped(teacher)
    if hasattr(inner, "hf_device_map") or getattr(inner, "quantization_method", None) is not None:
        return True
    if isinstance(inner, WithoutAdapters):
        return True
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in teacher.parameters())
