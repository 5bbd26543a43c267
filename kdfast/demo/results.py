"""What a run reports of its students, beside what each of them has."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from kdfast.demo.settings import DemoSettings
from kdfast.demo.student import TIMED
from kdfast.reporting.uncertainty import mean
from kdfast.reporting.words import counted

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


def gains(settings: DemoSettings, students: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what each distilled student has over the one of labels only, seed by seed.

    ``nats`` is the difference of their held-out cross-entropies per token, below 0 where distillation helps, with its
    95 % interval over seeds: None of one seed.
    """
    by_way = {(run["method"], run["seed"]): run["evaluation"]["nats"] for run in students}
    labels, *distilled = settings.methods
    rows = []
    for method in distilled:
        differences = [by_way[method.name, seed] - by_way[labels.name, seed] for seed in settings.seeds]
        interval = mean(torch.tensor(differences, dtype=torch.float64), torch.arange(len(differences)))
        rows.append({"method": method.name, "title": method.title, "nats": interval})
    return rows


def verdict(results: Mapping[str, Any]) -> str:
    """Returns in words whether distillation helped, and by how much.

    Args:
        results: what `results.json` holds.
    """
    perplexity = {row["method"]: row["perplexity"]["mean"] for row in results["summary"]}
    first, *others = results["gains"]
    nats, seeds = first["nats"], len(results["settings"]["seeds"])
    known = nats["low"] is not None
    if known and nats["low"] <= 0 <= nats["high"]:
        said = "Whether distillation helped cannot be told"
    else:
        said = "Distillation helped" if nats["value"] < 0 else "Distillation did not help"
    over = f"over {counted(seeds, 'seed')}" if known else "with one seed, part of which may be chance"
    if results["quick"]:
        over += ", in a quick run that is too short to mean anything"

    def change(row: Mapping[str, Any]) -> str:
        labels, now = results["summary"][0]["perplexity"]["mean"], perplexity[row["method"]]
        return f"{labels:.1f} to {now:.1f} ({100 * (now / labels - 1):+.1f} %)"

    text = f"{said}: from labels only to {first['title']}, the perplexity of held-out text goes from {change(first)}, "
    text += f"{nats['value']:+.3f}"
    if known:
        text += f" [{nats['low']:+.3f}, {nats['high']:+.3f}]"
    text += f" nats per token, {over}."
    if others:
        text += f" With {'; with '.join(f'{_short(row)} {change(row)}' for row in others)}."
    return text


def cache_cost(results: Mapping[str, Any]) -> str:
    """Returns in words what learning from the disk cost, in quality, bytes and time; nothing without a cache.

    Args:
        results: what `results.json` holds.
    """
    cache, lost = results["cache"], results["comparison"]
    if not cache:
        return ""
    if lost:
        spread = f" ± {lost['nats']['std']:.4f}" if len(lost["seeds"]) > 1 else ""
        quality = f"{lost['nats']['mean']:+.4f}{spread} nats per token against all of the teacher's logits"
    else:
        quality = "what it lost against all of the teacher's logits was not measured"
    written = cache["written"]
    time = f"{written['seconds']:.1f} s to write, once" if written else "nothing to write, as it was there already"
    return (
        f"The cache cost: {quality}; {cache['bytes_per_token']:.1f} bytes a token on disk, in place of "
        f"{2 * results['teacher']['training']['config']['vocab_size']:,}; {time}, in place of "
        f"{cache['in_loop_seconds']:.0f} s of the teacher in the loop of every student."
    )


def _short(row: Mapping[str, Any]) -> str:
    return str(row["title"]).removeprefix("distilled, ")


def _mean_and_std(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
