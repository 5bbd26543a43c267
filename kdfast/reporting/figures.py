"""From what a pass over the loader kept to the figures of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.reporting.calibration import expected_calibration_error, reliability
from kdfast.reporting.measure import Columns, Model, Observed
from kdfast.reporting.uncertainty import mean, share, share_difference

BUCKETS = 8  # of the teacher's entropy, with about as many positions each


def model_figures(model: Model, observed: Observed) -> dict[str, Any]:
    """Figures of one model: its task, its calibration, and where it is not the teacher its agreement and errors.

    Parts that need labels are None without them.
    """
    columns = observed.models[model.name]
    found: dict[str, Any] = {
        "name": model.name,
        "role": model.role,
        "classes": observed.classes[model.name],
        "task": None,
        "calibration": None,
        "against_teacher": None,
        "errors": None,
    }
    if observed.labels is not None:
        found["task"] = _task(columns, observed)
        found["calibration"] = _calibration(columns, observed.labels)
    if model.role == "teacher":
        return found
    teacher = next(iter(observed.models.values()))
    found["against_teacher"] = _against(columns, teacher, observed)
    if observed.labels is not None:
        found["errors"] = _errors(columns, teacher, observed.labels, observed.example)
    return found


def _task(columns: Columns, observed: Observed) -> dict[str, Any]:
    assert observed.labels is not None
    assert columns.nats is not None
    assert columns.label_in_top is not None
    nats = mean(columns.nats, observed.example, least=0.0)
    return {
        "accuracy": share(columns.top1 == observed.labels, observed.example),
        "top_k_accuracy": share(columns.label_in_top, observed.example),
        "nats": nats,
        "perplexity": _exp(nats),
    }


def _exp(estimate: dict[str, Any]) -> dict[str, Any]:
    """The interval's ends carry over; the standard error is the first-order one."""
    keys = ("value", "low", "high")
    found = {key: None if estimate[key] is None else _finite(estimate[key]) for key in keys}
    se, value = estimate["se"], found["value"]
    found["se"] = None if se is None or value is None else se * value
    return found


def _finite(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None


def _calibration(columns: Columns, labels: Tensor) -> dict[str, Any]:
    correct = (columns.top1 == labels).double()
    bins = reliability(columns.confidence, correct)
    return {
        "ece": expected_calibration_error(bins),
        "confidence": columns.confidence.double().mean().item(),
        "accuracy": correct.mean().item(),
        "reliability": bins,
    }


def _against(columns: Columns, teacher: Columns, observed: Observed) -> dict[str, Any]:
    assert columns.kl is not None
    assert columns.overlap is not None
    return {
        "agreement": share(columns.top1 == teacher.top1, observed.example),
        "top_k_agreement": mean(columns.overlap, observed.example, least=0.0, most=1.0),
        "kl": mean(columns.kl, observed.example, least=0.0),
    }


def _errors(columns: Columns, teacher: Columns, labels: Tensor, example: Tensor) -> dict[str, Any]:
    taught, right = teacher.top1 == labels, columns.top1 == labels
    same = columns.top1 == teacher.top1
    wrong = ~taught
    return {
        "teacher_errors": int(wrong.sum()),
        "inherited": share(same[wrong], example[wrong]),
        "corrected": share(right[wrong], example[wrong]),
        "other": share((~same & ~right)[wrong], example[wrong]),
        "teacher_right": int(taught.sum()),
        "introduced": share(~right[taught], example[taught]),
    }


def entropy_buckets(observed: Observed, models: Sequence[Model]) -> list[dict[str, Any]]:
    """Positions by the teacher's entropy: KL and agreement of every model in each bucket.

    Buckets are cut at quantiles; where many positions have one entropy, there are fewer.
    """
    entropy = observed.entropy.double()
    ordered = entropy.sort().values
    n = len(ordered)
    edges = torch.unique(ordered[torch.arange(1, BUCKETS, device="cpu") * n // BUCKETS])  # a bucket's low end is in it
    edges = edges[edges > ordered[0]]
    bucket = torch.bucketize(entropy, edges, right=True)
    teacher = next(iter(observed.models.values()))
    found = []
    for number in range(len(edges) + 1):
        here = bucket == number
        example = observed.example[here]
        row: dict[str, Any] = {
            "low": entropy[here].min().item(),
            "high": entropy[here].max().item(),
            "positions": int(here.sum()),
            "share": int(here.sum()) / n,
            "models": {},
        }
        for model in models:
            columns = observed.models[model.name]
            if columns.kl is not None:
                row["models"][model.name] = {
                    "kl": mean(columns.kl[here], example, least=0.0),
                    "agreement": share((columns.top1 == teacher.top1)[here], example),
                }
        found.append(row)
    return found


def comparisons(observed: Observed, models: Sequence[Model]) -> list[dict[str, Any]]:
    """Paired differences, first less second: of every student with the teacher and with the label-only student."""
    pairs = [(m, o) for m in models if m.role == "student" for o in models if o.role in ("teacher", "baseline")]
    teacher = next(iter(observed.models.values()))
    example, labels = observed.example, observed.labels
    found = []
    for one, other in pairs:
        a, b = observed.models[one.name], observed.models[other.name]
        row: dict[str, Any] = {"first": one.name, "second": other.name, "second_role": other.role}
        row |= {"accuracy": None, "nats": None, "perplexity_ratio": None, "agreement": None, "kl": None}
        if labels is not None and a.nats is not None and b.nats is not None:
            row["accuracy"] = share_difference(a.top1 == labels, b.top1 == labels, example)
            row["nats"] = mean(a.nats.double() - b.nats.double(), example)
            row["perplexity_ratio"] = _exp(row["nats"])
        if a.kl is not None and b.kl is not None:
            row["agreement"] = share_difference(a.top1 == teacher.top1, b.top1 == teacher.top1, example)
            row["kl"] = mean(a.kl.double() - b.kl.double(), example)
        found.append(row)
    return found
