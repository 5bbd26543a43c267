"""What a run reports of its students, beside what each of them has."""

from __future__ import annotations

import statistics
from typing import Any

from kdfast.demo.settings import DemoSettings
from kdfast.demo.student import TIMED

SUMMARISED = ("nats", "perplexity", "accuracy", "agreement", "ece", "fitted_temperature", "ece_fitted")
COMPARED = ("nats", "perplexity", "agreement")


def summary(settings: DemoSettings, students: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over the seeds for each way of training."""
    rows = []
    for method in settings.methods:
        runs = [run for run in students if run["method"] == method.name]
        row: dict[str, Any] = {"method": method.name, "title": method.title, "divergence": method.divergence}
        for key in SUMMARISED:
            row[key] = _mean_and_std([run["evaluation"][key] for run in runs])
        row["loss_share"] = _mean_and_std([run["seconds"]["loss"] / sum(run["seconds"].values()) for run in runs])
        # The lowest held-out cross-entropy on the way: what stopping early would have given.
        row["best_probe"] = _mean_and_std([min(run["probes"]["hard"]) for run in runs])
        row["last_probe"] = _mean_and_std([run["probes"]["hard"][-1] for run in runs])
        for name in TIMED:
            row[f"ms_{name}"] = _mean_and_std([1e3 * run["seconds"][name] / settings.steps for run in runs])
        rows.append(row)
    return rows


def comparison(settings: DemoSettings, students: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns what forward KL from the cache lost against forward KL from all logits, seed by seed.

    Both students of a seed start from the same weights and take the same batches: a difference is what the cache left
    out or rounded, and what training makes of it. None where no online student was trained beside the cached one.
    """
    by_way = {(run["method"], run["seed"]): run for run in students}
    seeds = [seed for seed in settings.seeds if {("forward_kl", seed), ("forward_kl-online", seed)} <= set(by_way)]
    if not seeds:
        return None
    pairs = [(by_way["forward_kl", seed], by_way["forward_kl-online", seed]) for seed in seeds]
    out: dict[str, Any] = {"seeds": seeds}
    for key in COMPARED:
        out[key] = _mean_and_std([cached["evaluation"][key] - online["evaluation"][key] for cached, online in pairs])
    out["kl"] = _mean_and_std([cached["probes"]["soft"][-1] - online["probes"]["soft"][-1] for cached, online in pairs])
    return out


def _mean_and_std(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
