"""Two lessons in about a minute, on scikit-learn's 8 x 8 digits.

**Omit the 3.** A student that has never seen a 3 learns it all the same: in the teacher's soft targets for the other
digits stands how much each of them looks like a 3 (Hinton et al., section 3). Expect 88.8 +- 3.0 % of the held-out 3s,
and none from labels alone (10 seeds).

**100 labels.** A teacher that saw the whole training half says more about 100 digits than their labels do. Expect
89.0 +- 3.6 %, and 82.6 +- 5.5 % from labels alone; the seeds are paired, and the teacher won on each of the ten.

    python -m examples.digits [--seeds 10] [--seed 0] [--quick] [--out digits-report]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print as show
from torch import Tensor, nn

import kdfast
from examples.data import Split, digits
from examples.models import Perceptron
from examples.training import accuracy, batches, spread
from kdfast.methods import KD, CrossEntropy, Loss

OMITTED = 3


def train(
    student: nn.Module, teacher: nn.Module | None, losses: list[Loss], x: Tensor, y: Tensor, epochs: int, seed: int
) -> None:
    """A training loop of one's own; the lines with ``distiller`` are all that distillation adds."""
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    student.train()
    with kdfast.Distiller(student, teacher, losses) as distiller:
        for rows in batches(len(x), 128, epochs, seed):
            loss, _ = distiller((x[rows], y[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def teach(data: Split, seed: int, epochs: int) -> nn.Module:
    """A teacher of 256 hidden units that saw the whole training half."""
    torch.manual_seed(seed)
    teacher = Perceptron(64, 256)
    train(teacher, None, [CrossEntropy()], data.x, data.y, epochs, seed)
    return teacher


def omit(data: Split, teacher: nn.Module, seed: int, epochs: int) -> dict[str, float]:
    """Students that never saw a 3, from labels and from the teacher: per cent of the held-out 3s that they know."""
    seen, threes = data.y != OMITTED, data.test_y == OMITTED
    found = {}
    for name, losses in {"labels": [CrossEntropy()], "teacher": [KD(temperature=8.0, alpha=1.0)]}.items():
        torch.manual_seed(1000 + seed)  # the same first weights, then the same batches: the seeds are paired
        student = Perceptron(64, 32)
        train(student, teacher, losses, data.x[seen], data.y[seen], epochs, seed)
        found[name] = accuracy(student, data.test_x[threes], data.test_y[threes])
    return found


def hundred(data: Split, teacher: nn.Module, seed: int, epochs: int) -> tuple[dict[str, float], dict[str, nn.Module]]:
    """Students of 8 hidden units on 100 digits, with labels alone and with the teacher: per cent right."""
    found: dict[str, float] = {}
    students: dict[str, nn.Module] = {}
    for name, losses in {"labels": [CrossEntropy()], "teacher": [KD(temperature=4.0, alpha=0.9)]}.items():
        torch.manual_seed(1000 + seed)
        students[name] = Perceptron(64, 8)
        train(students[name], teacher, losses, data.x[:100], data.y[:100], 5 * epochs, seed)
        found[name] = accuracy(students[name], data.test_x, data.test_y)
    return found, students


def main(
    seeds: Annotated[int, typer.Option(min=1, help="runs to average")] = 10,
    seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="one seed and few epochs, to see that it runs")] = False,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("digits-report"),
) -> None:
    """Learns the digits with a teacher, and without."""
    torch.set_num_threads(1)  # the models are too small for more
    seeds, epochs = (1, 5) if quick else (seeds, 60)
    omitted, labelled = [], []
    for number in range(seed, seed + seeds):
        data = digits(number)
        teacher = teach(data, number, epochs)
        omitted.append(omit(data, teacher, number, epochs))
        found, students = hundred(data, teacher, number, epochs)
        labelled.append(found)
        show(f"seed {number}: 3s known {omitted[-1]}, 100 labels {found}")
    for title, results in (("unseen 3s", omitted), ("100 labels", labelled)):
        for name in ("labels", "teacher"):
            show(f"{title}, from {name}: {spread([one[name] for one in results], 1)} % over {seeds} seeds")
    held_out = list(zip(data.test_x.split(100), data.test_y.split(100), strict=True))
    print(
        kdfast.report(
            students["teacher"],
            teacher,
            held_out,
            baseline=students["labels"],
            describe=lambda x: x.view(8, 8),
            title="100 labels, the last seed",
            out=out,
        )
    )


if __name__ == "__main__":
    typer.run(main)
