"""A process of the GPU suite: ``worker.py KIND --out FILE ITEM ...``; see :mod:`bench.gpu.jobs`.

Each item is begun, and ended as done or failed, by a line in the file; what is known before is written before.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # behind the kdfast that is installed

#: Cases whose competitors include torch.compile, which compiles for as long as all else takes.
COMPILED = ("forward_kl-8192x128256-bf16-upstream 1", "head forward_kl-8192x128256-H4096-bf16")

Say = Callable[[dict[str, Any]], None]


def _find(item: str, *, rehearse: bool) -> tuple[Any, Any]:
    """The module and the case of "operator|name"."""
    operator, name = item.split("|", 1)
    module = importlib.import_module(operator)
    return module, next(case for case in module.cases(rehearse=rehearse) if case.name == name)


def _device() -> Any:
    import torch

    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def machine(_: str, given: argparse.Namespace, say: Say) -> None:
    """What the machine is, and the bandwidth of its own copy."""
    from bench.gpu.machine import versions
    from bench.gpu.timing import Clock
    from kdfast.kernels.triton import tiles

    device = _device()
    say({"machine": versions(device)})
    say({"architecture": "sm_90" if device.type == "cpu" else tiles.architecture(device)})
    say({"copy_bytes_per_second": Clock(device).copy_bandwidth()})


def compilation(item: str, _: argparse.Namespace, say: Say) -> None:
    """Registers and spills of "target|call"."""
    from kdfast.benchmark.gpu_compile import compile_calls

    target, call = item.split("|", 1)
    rows = [{k: v for k, v in dataclasses.asdict(r).items() if k != "text"} for r in compile_calls(target, [call])]
    say({"kernels": rows})


def check(item: str, given: argparse.Namespace, say: Say) -> None:
    """Gradients of a tiny case against fp64."""
    _check(*_find(item, rehearse=True), say)


def _check(module: Any, case: Any, say: Say) -> None:
    errors = module.gradient_errors(case, _device())
    say({"errors": {**errors, "tolerance": module.tolerance(case)} if errors else {}})


def case(item: str, given: argparse.Namespace, say: Say) -> None:
    """Errors, launches and times of a case; kdfast's before those of its peers, which may take the process along."""
    import torch

    from bench.gpu.timing import Clock, captured, failed, launches, measure

    module, found = _find(item, rehearse=given.rehearse)
    say({"name": found.name, "case": dataclasses.asdict(found), "floor_bytes": found.floor_bytes})
    try:
        _check(module, found, say)
    except Exception:
        say({"errors_note": traceback.format_exc()})
    clock = Clock(_device())
    try:
        inputs = module.Inputs(found, clock.device)
        steps = module.competitors(found, inputs)
    except Exception as error:  # such as no memory for the inputs
        say({"timings": {"kdfast": dataclasses.asdict(failed(error))}, "note": traceback.format_exc()})
        return
    if found.name not in COMPILED:
        kept = ((name, step) for name, step in steps.items() if not isinstance(step, str) and "torch.compile" in name)
        steps |= {name: "compiled in two cases only" for name, _ in kept}
    ours, deadline = steps["kdfast"], time.monotonic() + given.seconds
    timings = measure(clock, {"kdfast": ours}, given.rounds, inputs.release, deadline)
    say({"timings": {name: dataclasses.asdict(t) for name, t in timings.items()}})
    if not isinstance(ours, str) and not timings["kdfast"].failed:
        say({"launches": launches(clock, ours)})
        inputs.release()
        say({"captured": captured(clock, ours)})
    torch.compiler.reset()
    timings = measure(clock, steps, given.rounds, inputs.release, deadline)
    say({"timings": {name: dataclasses.asdict(t) for name, t in timings.items()}})


def profile(item: str, given: argparse.Namespace, say: Say) -> None:
    """Two steps of kdfast, of which a profiler takes what it is told to."""
    module, found = _find(item, rehearse=given.rehearse)
    step = module.competitors(found, module.Inputs(found, _device()))["kdfast"]
    for _ in range(2):
        step()
    say({"steps": 2})


def tile(item: str, given: argparse.Namespace, say: Say) -> None:
    """Milliseconds of "work|columns|warps"."""
    from bench.gpu.autotune import time_tile

    work, columns, warps = item.split("|")
    say({"milliseconds": time_tile(_device(), work, int(columns), int(warps), rehearse=given.rehearse)})


KINDS: dict[str, Callable[[str, argparse.Namespace, Say], None]] = {
    "machine": machine,
    "compile": compilation,
    "smoke": check,
    "case": case,
    "profile": profile,
    "tile": tile,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worker.py", description="One process of the GPU suite.")
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("items", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--rounds", type=int, default=7, help="over the competitors of a case")
    parser.add_argument("--seconds", type=float, default=30.0, help="after which no further round begins")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    return parser.parse_args()


def main() -> None:
    """Do the items; a failure of one is written down and leaves the next alone."""
    given = _arguments()
    with given.out.open("a") as stream:

        def write(**entry: Any) -> None:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

        def say(item: str, result: dict[str, Any]) -> None:
            write(item=item, result=result)

        for item in given.items:
            write(item=item)
            begun = time.monotonic()
            state, note = "done", ""
            try:
                _sabotage()
                if os.environ.get("TRITON_INTERPRET") == "1":
                    sys.path.append(str(ROOT / "tests"))
                    importlib.import_module("interpreter").mend()
                KINDS[given.kind](item, given, functools.partial(say, item))
            except Exception:
                state, note = "failed", traceback.format_exc()
            write(item=item, state=state, note=note, seconds=time.monotonic() - begun)


def _sabotage() -> None:
    """What a rehearsal of faults asks for."""
    fault = os.environ.get("KDFAST_GPU_SUITE_FAULT")
    if fault == "abort":
        os.abort()
    if fault == "hang":
        time.sleep(1e6)


if __name__ == "__main__":
    main()
