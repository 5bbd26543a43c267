"""One student: its model, its optimizer, its place in the training run, and a step."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from kdfast.demo.data import batch_order, learning_rate_factor
from kdfast.demo.model import GPT
from kdfast.demo.settings import DemoSettings, Method
from kdfast.demo.targets import Targets
from kdfast.loss import distill_loss
from kdfast.spec.reduction import DistillTerms

TIMED = ("model", "loss", "optimizer", "data")


class Student:
    """A student in training; two with the same settings, method and seed take the same steps."""

    def __init__(self, settings: DemoSettings, method: Method, seed: int, vocab_size: int, samples: int) -> None:
        self.settings = settings
        self.method = method
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = GPT(settings.student(vocab_size))
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        # The order depends on the seed, not on the method: the three students see the same batches.
        self.order = batch_order(samples, settings.batch, settings.steps, seed)
        self.step = 0
        self.history: dict[str, list[float]] = {"soft": [], "hard": []}  # nats, each step
        self.probes: dict[str, list[float]] = {"step": [], "soft": [], "hard": []}  # nats, on held-out text
        self.seconds = dict.fromkeys(TIMED, 0.0)

    @property
    def done(self) -> bool:
        """Says whether all steps were taken."""
        return self.step >= self.settings.steps

    def advance(self, ids: Tensor, targets: Targets | None) -> None:
        """Takes one step.

        Args:
            ids: (N, S + 1) int64, the whole distillation set.
            targets: gives what the teacher said about some of its rows; None where labels are all there is.
        """
        clock = _Clock(self.seconds)
        rows = self.order[self.step]
        inputs, labels = ids[rows, :-1], ids[rows, 1:]
        target = None if targets is None else targets(rows)
        clock.lap("data")
        logits = self.model(inputs)
        clock.lap("model")
        # The graph is cut at the logits so that the loss and its gradient are timed apart from the model.
        leaf = logits.detach().requires_grad_()
        terms: Any
        if target is None or self.method.divergence is None:
            terms = distill_loss(leaf, None, labels, return_terms=True)
        else:
            terms = distill_loss(
                leaf,
                target,
                labels,
                divergence=self.method.divergence,
                temperature=self.method.temperature,
                alpha=self.method.alpha,
                return_terms=True,
            )
        terms.loss.backward()
        clock.lap("loss")
        logits.backward(leaf.grad)
        clock.lap("model")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate_factor(self.step, self.settings.steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("optimizer")
        _record(terms, self.history)
        self.step += 1

    def probe(self, ids: Tensor, teacher_logits: Tensor) -> None:
        """Notes forward KL to the teacher and cross-entropy on held-out text, at temperature 1 whatever the method.

        Called again at the same step, as after an interruption, it does nothing.
        """
        if self.step in self.probes["step"]:
            return
        with torch.inference_mode():
            terms: Any = distill_loss(self.model(ids[:, :-1]), teacher_logits, ids[:, 1:], return_terms=True)
        self.probes["step"].append(self.step)
        _record(terms, self.probes)

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on from here: tensors, numbers and strings."""
        return {
            "method": self.method.name,
            "seed": self.seed,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "probes": self.probes,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a stored state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history, self.probes, self.seconds = state["history"], state["probes"], state["seconds"]


def _record(terms: DistillTerms, curves: dict[str, list[float]]) -> None:
    if terms.soft is not None:
        curves["soft"].append(terms.soft.item())
    if terms.hard is not None:
        curves["hard"].append(terms.hard.item())


class _Clock:
    """Adds the time since the last lap to a named total."""

    def __init__(self, totals: dict[str, float]) -> None:
        self.totals = totals
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.totals[name] += now - self.last
        self.last = now
