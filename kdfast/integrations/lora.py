"""An output projection that LoRA adapts, as the product with its weight and a low-rank one beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LoRA:
    """What PEFT's LoRA adds to a linear layer: ``scaling * hidden @ A.T @ B.T`` of each active adapter.

    As ``low_rank`` of :class:`kdfast.LMHead`, (..., R) and (V, R): the merged weight is never made, and gradients go to
    A and B alone where the layer's own weight is frozen.

    Args:
        layer: ``peft.tuners.lora.Linear`` around ``nn.Linear``.
        name: of the model, for messages.

    Raises:
        ValueError: a variant, as DoRA; dropout; a bias; a transposed weight.
    """

    def __init__(self, layer: Any, name: str) -> None:
        self.layer = layer
        self.name = name
        self._check()

    @staticmethod
    def adapts(layer: object) -> bool:
        """Whether a module is a linear layer that PEFT's LoRA adapts, and does now."""
        if type(layer).__module__ != "peft.tuners.lora.layer" or type(layer).__name__ != "Linear":
            return False
        whole: Any = layer
        return not (whole.merged or whole.disable_adapters)

    def _active(self) -> list[str]:
        return [adapter for adapter in self.layer.active_adapters if adapter in self.layer.lora_A]

    def _check(self) -> None:
        layer = self.layer
        for adapter in self._active():
            dropout = layer.lora_dropout[adapter]
            plain = type(layer.lora_A[adapter]) is type(layer.lora_B[adapter]) is nn.Linear
            what = (
                f"dropout {dropout.p}"
                if getattr(dropout, "p", 0.0)
                else "a variant of LoRA"
                if adapter in layer.lora_variant
                else "a bias of LoRA's"
                if layer.lora_B[adapter].bias is not None
                else "a transposed weight"
                if layer.fan_in_fan_out
                else "layers of its own"
                if not plain
                else ""
            )
            if what:
                msg = (
                    f"{self.name}: the LoRA adapter {adapter!r} of its output projection has {what}: give it dropout 0 "
                    "and nothing else, leave the projection out of target_modules, or use the model's own logits"
                )
                raise ValueError(msg)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """The two factors for hidden states (..., H), in their dtype; None where no adapter is active."""
        self._check()
        lows, ups = [], []
        for adapter in self._active():
            a, b = self.layer.lora_A[adapter], self.layer.lora_B[adapter]
            lows.append(a(hidden.to(a.weight.dtype)) * self.layer.scaling[adapter])
            ups.append(b.weight)
        if not lows:
            return None
        low, up = (parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in (lows, ups))
        return low.to(hidden.dtype), up.to(hidden.dtype)
