"""Measures `kdfast.soft_targets` beside what a person would write in PyTorch: `python -m bench.soft_targets`.

All competitors of a dtype are measured in turns, and a ratio is that of the medians over the rounds. The bandwidth is
that of reading the same logits once, for their maximum, with as many threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdfast import soft_targets
from kdfast.benchmark.machine import Machine
from kdfast.benchmark.measure import ROUND_SECONDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: What ratios are taken of, over what, and the ratio that is aimed for by dtype.
RATIOS = [
    ("topk + logsumexp", "kdfast T=1", {"fp32": 18.0, "bf16": 10.0}),
    ("topk + logsumexp", "kdfast T=1,2", {"fp32": 18.0, "bf16": 10.0}),
    ("topk + logsumexp at 1 and 2", "kdfast T=1,2", {}),
    ("topk", "kdfast T=1,2", {"fp32": 3.0, "bf16": 3.0}),
    ("softmax + multinomial", "kdfast sample", {}),
]


def competitors(x: torch.Tensor, k: int) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Names, and calls whose times add up."""

    def topk() -> Any:
        return torch.topk(x, k)

    def logsumexp() -> Any:
        return torch.logsumexp(x, -1)

    def logsumexp_at_2() -> Any:
        return torch.logsumexp(x / 2, -1)

    return {
        "kdfast T=1": (lambda: soft_targets(x, k=k),),
        "kdfast T=1,2": (lambda: soft_targets(x, k=k, temperatures=(1.0, 2.0)),),
        "kdfast T=1,3": (lambda: soft_targets(x, k=k, temperatures=(1.0, 3.0)),),
        "kdfast topp": (lambda: soft_targets(x, k=k, method="topp", p=0.9),),
        "kdfast sample": (lambda: soft_targets(x, k=k, method="sample", seed=0),),
        "kdfast pps": (lambda: soft_targets(x, k=k, method="pps", seed=0),),
        "topk": (topk,),
        "topk + logsumexp": (topk, logsumexp),
        "topk + logsumexp at 1 and 2": (topk, logsumexp, logsumexp_at_2),
        "softmax + multinomial": (lambda: torch.multinomial(torch.softmax(x.float(), -1), k, replacement=True),),
        "read": (lambda: x.amax(-1),),
    }


def round_of(call: Callable[[], Any]) -> float:
    """Median ms of a call, repeated for a while, so that one interruption does not make the round."""
    times: list[float] = []
    while sum(times) < ROUND_SECONDS * 1e3:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(x: torch.Tensor, k: int, rounds: int) -> dict[str, float]:
    """Median ms of every competitor; a call that several share is timed once a round."""
    named = competitors(x, k)
    calls = list(dict.fromkeys(call for group in named.values() for call in group))
    times: dict[Callable[[], Any], list[float]] = {call: [] for call in calls}
    for index in range(rounds + 1):
        first = index % len(calls)
        for call in calls[first:] + calls[:first]:
            times[call].append(round_of(call))
    # the first round warms up
    return {name: sum(statistics.median(times[call][1:]) for call in group) for name, group in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soft_targets", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = Machine.here()
    print(machine)
    print(f"{args.rows} x {args.vocab}, k = {args.k}, median of {args.rounds} rounds\n")
    logits = 2 * torch.randn(args.rows, args.vocab, generator=torch.Generator().manual_seed(0))
    results: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        x = logits.to(dtype)
        ms = measure(x, args.k, args.rounds)
        gigabytes = x.numel() * x.element_size() / 1e9
        ratios = {f"{slow} / {fast}": ms[slow] / ms[fast] for slow, fast, _ in RATIOS}
        print(f"| {name} | ms | GB/s |\n|---|---:|---:|")
        for competitor, value in ms.items():
            print(f"| {competitor} | {value:.1f} | {gigabytes / value * 1e3:.1f} |")
        print(f"\n| {name}: ratio | measured | aim |\n|---|---:|---:|")
        for slow, fast, aims in RATIOS:
            print(f"| {slow} / {fast} | {ms[slow] / ms[fast]:.1f} | {aims.get(name, '-')} |")
        print()
        results[name] = {"ms": ms, "ratios": ratios, "read_gb_s": gigabytes / ms["read"] * 1e3}
    if args.json:
        what = {"rows": args.rows, "vocab": args.vocab, "k": args.k, "rounds": args.rounds}
        args.json.write_text(json.dumps({"machine": dataclasses.asdict(machine), **what, "results": results}, indent=2))


if __name__ == "__main__":
    main()
