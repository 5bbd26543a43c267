"""Entry point: install, test, measure, write."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.timing import Clock

ROOT = Path(__file__).resolve().parents[2]

#: Operators of the suite, a row each; bench/gpu/__init__.py says what such a module has.
OPERATORS = (
    "bench.gpu.dense",
    "bench.gpu.head",
    "bench.gpu.linear_cross_entropy",
    "bench.gpu.sparse",
    "bench.gpu.packed",
    "bench.gpu.soft_targets",
)

#: Tests whose inputs follow the default device.
TESTS = (
    "tests/ops/test_dense.py",
    "tests/ops/test_sparse.py",
    "tests/ops/test_packed.py",
    "tests/ops/test_modes.py",
    "tests/ops/test_edges.py",
    "tests/ops/test_head.py",
    "tests/test_soft_targets.py",
    "tests/kernels/test_gpu.py",
)

VERSIONS = ("torch", "triton", "liger-kernel", "speculators", "fla-core", "trl", "cut-cross-entropy")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Test and measure the GPU kernels.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.md and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop measuring after so many (default: 9)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over the competitors of a case (default: 7)")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument(
        "--autotune", action="store_true", help="search tiles and warps, and write the table that ships"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, through the interpreter, at tiny shapes")
    return parser.parse_args()


def _install(folder: Path) -> None:
    """The checkout, built with what the machine has."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(ROOT)], check=True, stdin=subprocess.DEVNULL)


def _test(given: argparse.Namespace, environment: dict[str, str]) -> str:
    """The last line of pytest; the log lies in the output folder."""
    log = given.out / "tests.log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    workers = [] if given.rehearse or not _has("xdist") else ["-n", str(min(12, os.cpu_count() or 1))]
    chosen = ["-k", "test_one_column and forward"] if given.rehearse else []
    tests = [str(ROOT / t) for t in TESTS if (ROOT / t).exists()]
    with log.open("w") as stream:
        subprocess.run(
            [*command, *workers, *chosen, *tests],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
            cwd=given.out,
        )
    lines = [line for line in log.read_text().splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    return lines[-1].strip("= ") if lines else f"no result, see {log.name}"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _machine(device: Any) -> dict[str, str]:
    import torch

    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} (rehearsal)"
    return {
        "device": name,
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
    } | versions


def _measure(given: argparse.Namespace, deadline: float, tests: str) -> dict[str, Any]:
    import torch

    from bench.gpu.timing import Clock

    device = torch.device("cpu" if given.rehearse else "cuda")
    clock = Clock(device)
    results: dict[str, Any] = {
        "machine": _machine(device),
        "tests": tests,
        "copy_bytes_per_second": clock.copy_bandwidth(),
        "cases": [],
        "not_run": [],
    }
    for operator, case in _cases(rehearse=given.rehearse):
        if time.monotonic() > deadline:
            results["not_run"].append(case.name)
            continue
        entry = _measure_case(importlib.import_module(operator), case, clock, given.rounds, deadline)
        results["cases"].append({"operator": operator, **entry})
        seen = (f"{name}: {t['milliseconds'] or t['note']}" for name, t in entry["timings"].items())
        print(case.name, *seen, sep="\n    ", flush=True)
        _write(given.out, results)
    return results


def _cases(*, rehearse: bool) -> Iterator[tuple[str, Any]]:
    """Operators with their cases, in turns: the first of all, the second of all, ..."""
    queues = [[(name, case) for case in importlib.import_module(name).cases(rehearse=rehearse)] for name in OPERATORS]
    for together in itertools.zip_longest(*queues):
        yield from (one for one in together if one is not None)


def _measure_case(module: ModuleType, case: Any, clock: Clock, rounds: int, deadline: float) -> dict[str, Any]:
    """What is recorded of a case, whatever goes wrong in it."""
    import torch

    from bench.gpu.timing import failed, measure, said

    torch.compiler.reset()  # or the shapes that came before would count against the limit of compilations
    try:
        inputs = module.Inputs(case, clock.device)
        timings = measure(clock, module.competitors(case, inputs), rounds, inputs.release, deadline)
        del inputs
    except Exception as error:  # such as no memory for the inputs
        timings = {"kdfast": failed(error)}
    errors, note = {}, ""
    try:
        errors = module.gradient_errors(case, clock.device)
    except Exception as error:
        note = said(error)
    return {
        "name": case.name,
        "case": dataclasses.asdict(case),
        "floor_bytes": case.floor_bytes,
        "timings": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "errors": errors,
        "errors_note": note,
    }


def _write(out: Path, results: dict[str, Any]) -> None:
    from bench.gpu.tables import markdown

    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results))


def _autotune(given: argparse.Namespace) -> None:
    """Writes the table that ships; a rehearsal writes it beside its log."""
    import torch

    from bench.gpu.autotune import autotune
    from bench.gpu.timing import Clock

    table = ROOT / "kernels" / "triton" / "tiles.json"
    if given.rehearse:
        table = Path(shutil.copy(table, given.out))
    clock = Clock(torch.device("cpu" if given.rehearse else "cuda"))
    said = autotune(clock, table, rehearse=given.rehearse)
    (given.out / "autotune.txt").write_text("\n".join(said) + "\n")


def _complete(results: dict[str, Any]) -> bool:
    """Whether kdfast failed nowhere; a call that it says it does not serve is no failure."""
    return not any(case["timings"]["kdfast"]["failed"] or case["errors_note"] for case in results["cases"])


def main() -> int:
    """Exit code 0 where the tests passed and every case has a time for kdfast, or the reason why it declines."""
    given = _arguments()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes - 30
    environment = dict(os.environ)
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = environment["TRITON_INTERPRET"] = "1"
        os.environ["KDFAST_BACKEND"] = "triton"  # as it would be by default where the tensors are on a GPU
    else:
        environment["KDFAST_TEST_DEVICE"] = "cuda"
    with tempfile.TemporaryDirectory() as folder:
        _install(Path(folder))
        sys.path.insert(0, folder)
        environment["PYTHONPATH"] = os.pathsep.join([folder, environment.get("PYTHONPATH", "")])
        if given.rehearse:
            sys.path.append(str(ROOT / "tests"))
            importlib.import_module("interpreter").mend()
        if given.autotune:
            _autotune(given)
            return 0
        tests = "not run" if given.no_tests else _test(given, environment)
        print(tests, flush=True)
        results = _measure(given, deadline, tests)
    print((given.out / "results.md").read_text())
    return 0 if _complete(results) and not re.search(r"failed|error|no result", tests) else 1


if __name__ == "__main__":
    sys.exit(main())
