"""Measures `LMHead` beside stored logits and beside its own matrix products: `python -m bench.head`.

``products`` are the four of a step (student's and teacher's logits, gradients of hidden states and weight) in the same
chunks and nothing else: the floor. ``eager`` stores both logits and takes the formula of docs/benchmarks.md. TRL's
chunked divergence is measured where trl is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.turns import ms_in_turns, ratio
from kdfast import LMHead, distill_loss
from kdfast.benchmark.machine import Machine
from kdfast.benchmark.process import peak_extra_bytes
from kdfast.ops import head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE, ALPHA = 2.0, 0.5


def competitors(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    h, th = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
    w, tw = ((torch.randn(vocab, hidden) / hidden**0.5).to(dtype) for _ in range(2))
    labels = torch.randint(vocab, (tokens,))
    leaves = (h.requires_grad_(), w.requires_grad_())

    def kdfast() -> tuple[Tensor, ...]:
        loss = distill_loss(LMHead(h, w), LMHead(th, tw), labels, temperature=TEMPERATURE, alpha=ALPHA)
        return torch.autograd.grad(loss, leaves)

    def eager() -> tuple[Tensor, ...]:
        s, t = h @ w.T, th @ tw.T
        log_p, log_q = (F.log_softmax(x.float() / TEMPERATURE, -1) for x in (s, t))
        soft = TEMPERATURE**2 * F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        return torch.autograd.grad(ALPHA * soft + (1 - ALPHA) * F.cross_entropy(s.float(), labels), leaves)

    rows = head.chunk_rows(tokens, 2 * vocab * dtype.itemsize, head.CHUNK_BYTES["cpu"])

    @torch.no_grad()
    def products() -> tuple[Tensor, ...]:
        d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(w)
        s, t = (torch.empty(rows, vocab, dtype=dtype) for _ in range(2))
        for a in range(0, tokens, rows):
            x, y = h[a : a + rows], th[a : a + rows]
            n = x.shape[0]
            torch.mm(x, w.T, out=s[:n])
            torch.mm(y, tw.T, out=t[:n])
            torch.mm(s[:n], w, out=d_hidden[a : a + n])
            d_weight.addmm_(s[:n].T, x)
        return d_hidden, d_weight

    calls = {"kdfast": kdfast, "products": products, "eager": eager}
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError:
        print("trl is not installed: left out")
        return calls

    def trl() -> tuple[Tensor, ...]:
        loss = ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 0.0, TEMPERATURE, 1.0, None, 1.0, None)
        return torch.autograd.grad(loss.mean() if isinstance(loss, Tensor) else loss[0].mean(), leaves)

    return {**calls, "trl (no cross-entropy)": trl}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both where not given")
    args = parser.parse_args()
    machine = Machine.here()
    print(machine)
    results: dict[str, Any] = {}
    for name in args.dtype or DTYPES:
        calls = competitors(args.tokens, args.vocab, args.hidden, DTYPES[name])
        times = ms_in_turns(calls, args.rounds)
        peaks = {who: peak_extra_bytes(call) for who, call in calls.items()}
        print(f"\n{name}, {args.tokens} x {args.vocab}, H = {args.hidden}, median of {args.rounds} rounds\n")
        print("| | ms | time / kdfast | peak MiB |\n|---|---:|---:|---:|")
        for who in calls:
            peak = peaks[who]
            shown = "n/a" if peak is None else f"{peak / 2**20:.0f}"
            print(f"| {who} | {statistics.median(times[who]):.0f} | {ratio(times, who, 'kdfast'):.2f} | {shown} |")
        ratios = {who: ratio(times, who, "kdfast") for who in calls}
        ms = {who: statistics.median(values) for who, values in times.items()}
        results[name] = {"ms": ms, "time_over_kdfast": ratios, "peak_bytes": peaks}
    if args.json:
        what = {"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden, "rounds": args.rounds}
        args.json.write_text(json.dumps({"machine": dataclasses.asdict(machine), **what, "results": results}, indent=2))


if __name__ == "__main__":
    main()
