"""Measures the loss of sparse targets beside the cross-entropy alone: `python -m bench.sparse`.

The student is sure of the kept columns in every second token, where the tail's mass takes a pass of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.turns import ms_in_turns, ratio
from kdfast import distill_loss, soft_targets
from kdfast.benchmark.machine import Machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Options of the sparse losses by name.
LOSSES: dict[str, dict[str, Any]] = {
    "forward_kl, T = 1": {},
    "forward_kl, T = 2": {"temperature": 2.0},
    "jsd, T = 1": {"divergence": "jsd"},
    "renorm, T = 1": {"tail": "renorm"},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sparse", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    machine = Machine.here()
    print(machine)
    torch.manual_seed(0)
    targets = soft_targets(2 * torch.randn(args.rows, args.vocab), k=args.k, temperatures=(1.0, 2.0))
    labels = torch.randint(args.vocab, (args.rows,))
    logits = 2 * torch.randn(args.rows, args.vocab)
    logits[::2].scatter_add_(-1, targets.ids[::2].long(), torch.full((len(logits[::2]), args.k), 9.0))
    results: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        z = logits.to(dtype).requires_grad_()
        calls = {"cross-entropy": lambda z=z: torch.autograd.grad(distill_loss(z, labels=labels), z)}
        for loss, options in LOSSES.items():
            calls[loss] = lambda z=z, o=options: torch.autograd.grad(distill_loss(z, targets, labels, **o), z)
        times = ms_in_turns(calls, args.rounds)
        print(f"\n{name}, {args.rows} x {args.vocab}, k = {args.k}\n\n| | ms | over cross-entropy |\n|---|---:|---:|")
        ratios = {who: ratio(times, who, "cross-entropy") for who in calls}
        for who, value in ratios.items():
            print(f"| {who} | {statistics.median(times[who]):.1f} | {value:.2f} |")
        results[name] = {"ms": {w: statistics.median(t) for w, t in times.items()}, "over_cross_entropy": ratios}
    if args.json:
        what = {"rows": args.rows, "vocab": args.vocab, "k": args.k, "rounds": args.rounds}
        args.json.write_text(json.dumps({"machine": dataclasses.asdict(machine), **what, "results": results}, indent=2))


if __name__ == "__main__":
    main()
