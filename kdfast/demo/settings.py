"""What a run of the demonstration does, and the ways in which a student is trained."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kdfast.demo.model import GPTConfig
from kdfast.spec.divergence import Divergence
from kdfast.spec.reference import TAIL_RULES


class DemoError(RuntimeError):
    """The run cannot start or go on as asked; the message says what to change."""


@dataclass(frozen=True)
class Method:
    """One way to train the student."""

    divergence: str | None  # None: labels only, the teacher is not asked
    temperature: float
    alpha: float  # weight of the distillation term
    online: bool = False  # all of the teacher's logits, in memory; False: what the cache keeps of them

    @property
    def name(self) -> str:
        """Returns the name used in files and results."""
        return "labels" if self.divergence is None else f"{self.divergence}{'-online' * self.online}"

    @property
    def title(self) -> str:
        """Returns the name shown in tables and legends."""
        if self.divergence is None:
            return "labels only"
        return f"distilled, {self.divergence}{', online' * self.online}"


@dataclass(frozen=True)
class DemoSettings:
    """Everything the outcome depends on besides the machine, the thread count and the versions."""

    quick: bool = False
    seeds: tuple[int, ...] = (0,)
    temperature: float = 1.0
    alpha: float = 0.9
    divergence: str = "jsd"  # of the third student
    online: bool = False  # trains with all of the teacher's logits, not from the cache
    compare: bool = True  # adds a student by forward_kl with all logits, for the cached one to be measured against
    k: int = 64  # entries a token in the cache
    steps: int = 800
    batch: int = 8  # sequences
    context: int = 256  # tokens
    train_sequences: int = 800
    held_out_sequences: int = 400
    calibration_sequences: int = 64  # of the held-out ones, for fitting a temperature
    probe_sequences: int = 32  # of the held-out ones, for the curves
    probe_every: int = 50  # steps
    checkpoint_every: int = 100  # steps
    width: int = 64
    layers: int = 2
    heads: int = 2
    learning_rate: float = 4e-3
    warmup: int = 50  # steps
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "train_sequences"):
            if getattr(self, name) < 1:
                msg = f"{name} must be at least 1, got {getattr(self, name)}"
                raise DemoError(msg)
        if not self.temperature > 0:
            msg = f"temperature must be > 0, got {self.temperature}"
            raise DemoError(msg)
        if not 0 <= self.alpha <= 1:
            msg = f"alpha must be between 0 (labels only) and 1 (teacher only), got {self.alpha}"
            raise DemoError(msg)
        if self.divergence == "forward_kl":
            msg = "divergence is that of the third student; the second one has forward_kl already: name another"
            raise DemoError(msg)
        try:
            Divergence(self.divergence)
        except ValueError as error:
            raise DemoError(str(error)) from error
        served = TAIL_RULES["bucket"]
        if not self.online and self.divergence not in served:
            msg = (
                f"divergence {self.divergence} needs all of the teacher's logits, and the cache keeps {self.k} entries "
                f"a token: add --online, or name one of {', '.join(served)}"
            )
            raise DemoError(msg)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Returns the ways of training, labels only first: the distilled ones are measured against it."""
        methods = [
            Method(None, 1.0, 0.0),
            Method("forward_kl", self.temperature, self.alpha, self.online),
            Method(self.divergence, self.temperature, self.alpha, self.online),
        ]
        if self.compare and not self.online:
            methods.append(replace(methods[1], online=True))
        return tuple(methods)

    def changed(self, **values: Any) -> DemoSettings:
        """Returns the settings with some values replaced; None leaves a value as it is."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def shrunk(self) -> DemoSettings:
        """Returns the settings of `--quick`: the same path in well under a minute, too short to mean anything."""
        return replace(
            self,
            quick=True,
            steps=60,
            train_sequences=96,
            held_out_sequences=48,
            calibration_sequences=12,
            probe_sequences=8,
            probe_every=20,
            checkpoint_every=20,
            warmup=10,
        )

    def student(self, vocab_size: int) -> GPTConfig:
        """Returns the student's shape."""
        return GPTConfig(vocab_size, self.width, self.layers, self.heads, self.context)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must agree between an interrupted run and the one that goes on with it."""
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()},
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        }
