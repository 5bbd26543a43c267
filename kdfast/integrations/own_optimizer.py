"""The optimizer of a Distiller's own parameters, inside a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers


class OwnOptimizer(transformers.TrainerCallback):
    """Clips, steps and zeroes the losses' own parameters with every optimizer step of a trainer.

    Apart from the student's optimizer, as a wrapper's takes no parameters but the wrapped model's. Its learning rate is
    the trainer's of the moment; gradients are clipped by their own norm.

    Args:
        trainer: a ``transformers.Trainer``.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.optimizer: torch.optim.Optimizer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the student's step, after which a scaler of fp16 gradients has another scale."""
        own = self.optimizer
        if own is None:
            return
        scaler = self.trainer.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(own)
        if args.max_grad_norm:
            parameters = [p for group in own.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        for group in own.param_groups:
            group["lr"] = self.trainer._get_learning_rate()
        if scaler is None:
            own.step()
        else:
            scaler.step(own)
        own.zero_grad()

    def zero_grad(self) -> None:
        """Forgets gradients that a run left which was broken off."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any] | None:
        """Of the optimizer; None where the losses have no parameters."""
        return None if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes up what :meth:`state_dict` gave."""
        if self.optimizer is not None and state is not None:
            self.optimizer.load_state_dict(dict(state))
