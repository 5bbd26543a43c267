"""What the methods are compared on: data, a teacher that is trained once, a student, and its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import Split, digits, fashion_mnist
from examples.fashion_mnist import teach
from examples.models import Perceptron, StudentCNN
from examples.suite.methods import Layers
from examples.suite.transformer import Transformer
from examples.training import batches, kept, outputs


class Replay(nn.Module):
    """A teacher that was run once over the training inputs: called with their rows, it gives what it gave then.

    Its layers are stood in for by identities, which a loss captures like the layers themselves.
    """

    def __init__(self, teacher: nn.Module, x: Tensor, layers: Sequence[str]) -> None:
        super().__init__()
        seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            teacher.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen[name].append(output)
            )
            for name in layers
        ]
        self.logits = outputs(teacher, x)
        for hook in hooks:
            hook.remove()
        self.stored = {name: torch.cat(parts).clone() for name, parts in seen.items()}
        for name in layers:
            self.add_module(name, nn.Identity())

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of the inputs at these rows."""
        for name, tensor in self.stored.items():
            self.get_submodule(name)(tensor[rows])
        return self.logits[rows]


@dataclass(frozen=True)
class Task:
    """One comparison; ``settings`` is all that its figures depend on besides the code."""

    name: str
    title: str
    data: Split
    teacher: nn.Module
    teacher_test: Tensor  # (N,) classes that the teacher gives for the held-out part
    teacher_parameters: int
    student: Callable[[], nn.Module]
    layers: Layers
    settings: dict[str, Any]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, classes) of a model that may return more than them."""
    model.eval()
    with torch.inference_mode():
        found = model(x)
    part: Tensor = found["logits"] if isinstance(found, dict) else found
    return part.clone()


def perceptron_digits(*, quick: bool) -> Task:
    """64-8-10 students of a 64-256-10 teacher, 100 labels."""
    data, epochs = digits(0), 2 if quick else 60
    teacher = _taught(f"digits-perceptron-{epochs}", lambda: Perceptron(64, 256), data, epochs)
    few = Split(data.x[:100], data.y[:100], data.test_x, data.test_y)
    settings = {"batch": 50, "epochs": 1 if quick else 150, "lr": 1e-2}
    return Task(
        "digits",
        "scikit-learn digits, 100 labels, 64-8-10 student, 64-256-10 teacher that saw all 898",
        few,
        Replay(teacher, few.x, ["hidden"]),
        logits(teacher, data.test_x).argmax(-1),
        sum(p.numel() for p in teacher.parameters()),
        lambda: Perceptron(64, 8),
        Layers(few.y),
        settings,
    )


def transformer_digits(*, quick: bool) -> Task:
    """Two layers of width 16 that learn from four of width 64, 100 labels."""
    data, epochs = digits(0), 2 if quick else 40
    teacher = _taught(f"digits-transformer-{epochs}", lambda: Transformer(64, 4), data, epochs)
    few = Split(data.x[:100], data.y[:100], data.test_x, data.test_y)
    return Task(
        "transformer",
        "The same digits as eight rows, 100 labels, transformers of 2 layers of 16 and 4 of 64",
        few,
        teacher,
        logits(teacher, data.test_x).argmax(-1),
        sum(p.numel() for p in teacher.parameters()),
        lambda: Transformer(16, 2),
        Layers(few.y, attention=True),
        {"batch": 50, "epochs": 1 if quick else 75, "lr": 5e-3},
    )


def cnn_fashion(*, quick: bool) -> Task:
    """A narrow strided network on 1,000 labels; 32 channels, as FSP needs as many as the teacher has."""
    data = fashion_mnist()
    if quick:
        data = data.first(1000, 300)
    teacher = teach(data, 1 if quick else 8)
    few = Split(data.x[: 100 if quick else 1000], data.y[: 100 if quick else 1000], data.test_x, data.test_y)
    return Task(
        "fashion-mnist",
        "Fashion-MNIST, 1,000 labels, strided CNN of 51 thousand parameters, CNN teacher that saw all 60,000",
        few,
        Replay(teacher, few.x, ["stage1", "stage2", "hidden"]),
        outputs(teacher, data.test_x).argmax(-1),
        sum(p.numel() for p in teacher.parameters()),
        lambda: StudentCNN(32),
        Layers(few.y, maps="{stage1,stage2}", last_map="stage2"),
        {"batch": 100, "epochs": 1 if quick else 20, "lr": 2e-3},
    )


TASKS: dict[str, Callable[..., Task]] = {
    "digits": perceptron_digits,
    "transformer": transformer_digits,
    "fashion-mnist": cnn_fashion,
}


def _taught(name: str, make: Callable[[], nn.Module], data: Split, epochs: int) -> nn.Module:
    def train(teacher: nn.Module) -> None:
        optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
        for rows in batches(len(data.x), 64, epochs, 0):
            found = teacher(data.x[rows])
            loss = F.cross_entropy(found["logits"] if isinstance(found, dict) else found, data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    torch.manual_seed(0)
    return kept(name, make, train)
