"""One student by one method, and all of a task into its file."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kdfast
from examples.suite.methods import Method, fitting
from examples.suite.tasks import Task, logits
from examples.training import batches, cosine, parameters


def student(task: Task, method: Method, seed: int) -> dict[str, float]:
    """Trains a student; runs of one seed share first weights and batches, whatever the method.

    Returns:
        Held-out accuracy and agreement with the teacher in per cent, and seconds of training.
    """
    size, epochs = task.settings["batch"], task.settings["epochs"]
    count = len(task.data.x)
    steps = epochs * (count // size)
    torch.manual_seed(seed)
    model = task.student()

    def batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": task.data.x[rows], "rows": rows, "labels": task.data.y[rows], "index": rows}

    started = time.perf_counter()
    with kdfast.Distiller(model, task.teacher, method.losses(task.layers, steps)) as distiller:
        distiller.prepare(batch(torch.arange(size)))
        optimizer = torch.optim.Adam([*model.parameters(), *distiller.parameters()], lr=task.settings["lr"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
        model.train()
        for rows in batches(count, size, epochs, seed):
            loss, _ = distiller(batch(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - started
    found = logits(model, task.data.test_x).argmax(-1)
    return {
        "accuracy": 100.0 * (found == task.data.test_y).double().mean().item(),
        "agreement": 100.0 * (found == task.teacher_test).double().mean().item(),
        "seconds": seconds,
    }


def task_results(task: Task, seeds: list[int], path: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Runs what the task's file does not hold yet, a seed at a time, and writes the file after each run.

    Returns:
        The file's content.
    """
    methods = fitting(task.layers)
    results = _begun(task, path)
    for seed in seeds:
        for method in methods:
            row = results["methods"].setdefault(method.name, {"setting": method.setting, "runs": {}})
            if row["setting"] != method.setting:
                row.update(setting=method.setting, runs={})
            if str(seed) in row["runs"]:
                continue
            row["runs"][str(seed)] = student(task, method, seed)
            report(f"{task.name}, seed {seed}, {method.name}: {row['runs'][str(seed)]['accuracy']:.2f} %")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _begun(task: Task, path: Path) -> dict[str, Any]:
    """What stands in the file, or a new beginning where its settings are other ones."""
    settings = task.settings | {"train": len(task.data.x), "test": len(task.data.test_x)}
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found
    return {
        "task": task.name,
        "title": task.title,
        "settings": settings,
        "teacher": {
            "accuracy": 100.0 * (task.teacher_test == task.data.test_y).double().mean().item(),
            "parameters": task.teacher_parameters,
        },
        "student": {"parameters": parameters(task.student())},
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "threads": 1},
        "methods": {},
    }
