"""The load-balancing loss of a mixture of experts' router, which a model adds to the loss that it computes itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdfast.methods.layers import unwrapped

#: Where models of transformers keep its coefficient: options of the configuration, or of a part of it.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "ffn_config.moe_loss_weight")


def router_loss(model: nn.Module, raw: Any) -> Tensor | None:
    """The loss times its coefficient, of what a student returned; None where it returned none.

    A model of transformers returns it, as ``aux_loss``, where its configuration has ``output_router_logits=True``.

    Raises:
        ValueError: a model that returns one, and whose configuration names no coefficient.
    """
    found = raw.get("aux_loss") if isinstance(raw, dict) else getattr(raw, "aux_loss", None)
    if not isinstance(found, Tensor):
        return None
    inner: Any = unwrapped(model)
    configs = [inner.config] if hasattr(inner, "config") else []
    if configs and hasattr(configs[0], "get_text_config"):
        configs.append(configs[0].get_text_config())
    for config in configs:
        for path in _COEFFICIENTS:
            value: Any = config
            for name in path.split("."):
                value = getattr(value, name, None)
            if isinstance(value, (int, float)):
                return found * value
    msg = (
        f"{type(inner).__name__} returns aux_loss, and its configuration has no coefficient of it "
        f"({', '.join(_COEFFICIENTS)}): name one, or configure output_router_logits=False"
    )
    raise ValueError(msg)
