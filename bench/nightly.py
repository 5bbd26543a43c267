"""``make nightly``: the proofs that CI has no time for, one after another, each with a log and a time limit of its own.

What fails or hangs costs that part alone. ``--json`` keeps what was found, part by part, so that ``--only`` replaces a
few; ``python -m bench.tables`` makes the table of docs/nightly.md of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.jobs import end
from bench.turns import table
from kdfast.benchmark.gpu_compile import TARGETS
from kdfast.benchmark.machine import Machine

PYTHON = ".venv/bin/python"
PYTEST = "OMP_WAIT_POLICY=passive .venv/bin/pytest -n 2"
#: What pytest ends with.
TESTS = r"\d+ (?:failed|passed).* in [\d.]+s"
CTEST = r"\d+% tests passed.*"
GPUS = f'KDFAST_TEST_ALL=1 KDFAST_TEST_TARGETS="{" ".join(TARGETS)}"'


@dataclass(frozen=True)
class Part:
    """A proof."""

    command: str  # of bash, in the checkout; its exit status is the verdict
    minutes: int  # that it may take
    said: str | None = None  # a regular expression: what tells of how it went in the log


PARTS = {
    "tests, every case": Part("KDFAST_TEST_ALL=1 make test", 60, TESTS),
    "AddressSanitizer, UndefinedBehaviorSanitizer": Part("make sanitize", 20, CTEST),
    "ThreadSanitizer": Part(
        "cmake --preset tsan && cmake --build --preset tsan && ctest --preset tsan --output-on-failure", 30, CTEST
    ),
    "kernels for every GPU": Part(f"{GPUS} {PYTEST} tests/kernels/test_triton_compile.py", 20, TESTS),
    "the same, and the interpreter, with the oldest Triton": Part(
        f'{GPUS} make triton-oldest OLDEST_MORE="or every_operator"', 40, TESTS
    ),
    "losses, methods and heads with the oldest torch": Part("make torch-oldest", 20, TESTS),
    "libFuzzer over the cache's parts": Part(
        "cmake --preset fuzz && cmake --build --preset fuzz && mkdir -p build/fuzzed && "
        "build/fuzz/kdfast_fuzz -max_total_time=600 build/fuzzed csrc/fuzz/corpus",
        25,
        r"Done \d+ runs in \d+ second",
    ),
    "caches changed behind right checksums, two readers": Part(
        f"{PYTHON} tests/cache/format_fuzz.py --seconds 1200", 25, r"\d+ caches, of which .*"
    ),
    "the cache after 200 cuts of power": Part(
        f"KDFAST_TEST_CRASH_STATES=200 {PYTEST} tests/cache/test_cache_reliability.py -k power_cut", 20, TESTS
    ),
    "the cache at ten million samples": Part(
        f"{PYTHON} -m bench.cache_growth --samples 10000000 --rounds 3 --json build/growth.json",
        60,
        r"\| 10,000,000 .*",
    ),
    "the cache for an hour under writers that are killed": Part(
        f"rm -rf build/soak && mkdir -p build/soak && {PYTHON} tests/cache/soak.py build/soak", 70, r"\d+ rounds in .*"
    ),
    "the cache's job on a Ray cluster": Part(
        "make .venv/.ray && .venv/bin/pytest tests/cache/test_cache_ray.py", 15, TESTS
    ),
    "heads under DeepSpeed's ZeRO": Part(
        f"make .venv/.deepspeed && {PYTEST} tests/integrations/test_deepspeed.py", 20, TESTS
    ),
    "all benchmarks": Part(
        ".venv/bin/kdfast bench --isa avx2 --rounds 3 --json build/bench.json --markdown build/bench.md", 60
    ),
    "the demonstration": Part(".venv/bin/kdfast demo --seeds 1 --out build/demo", 40),
    "examples": Part(
        "make .venv/.examples && for example in digits fashion_mnist sentences language_model; do "
        f"{PYTHON} -m examples.$example --out build/examples/$example || exit 1; done",
        60,
    ),
    "every method against labels alone": Part(
        "make .venv/.examples && mkdir -p build/suite && "
        f"{PYTHON} -m examples.suite --seeds 1 --results build/suite --page build/suite/methods-results.md",
        60,
    ),
}


@dataclass(frozen=True)
class Result:
    """What came of a part."""

    command: str
    verdict: str  # "passed", "exit status N" or "more than N minutes"
    seconds: float
    said: list[str]
    machine: dict[str, Any]


def run(name: str, part: Part, folder: Path, machine: Machine) -> Result:
    """Run one part, its output in a file of ``folder``."""
    log = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.log"
    begun = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "-c", part.command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(60 * part.minutes)
            verdict = f"exit status {status}" if status else "passed"
        except subprocess.TimeoutExpired:
            verdict = f"more than {part.minutes} minutes"
        finally:  # what it left running, too
            end(process)
    found = re.finditer(part.said, log.read_text(errors="replace")) if part.said else ()
    said = list(dict.fromkeys(match[0] for match in found))
    return Result(part.command, verdict, time.monotonic() - begun, said, dataclasses.asdict(machine))


def read(file: Path) -> dict[str, Result]:
    """What ``--json`` kept, by part."""
    return {name: Result(**result) for name, result in json.loads(file.read_text()).items()}


def listing(results: Mapping[str, Result]) -> str:
    """Markdown."""
    rows = []
    for name, result in results.items():
        told = "; ".join([result.verdict, *result.said])
        cells = [name, f"`{result.command}`", f"{result.seconds / 60:.1f}", str(result.machine["commit"]), told]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    machines = {"{cpu}, {isa}, {threads} threads, Python {python}, torch {torch}".format(**r.machine): None
                for r in results.values()}  # fmt: skip
    return f"On {' and '.join(machines)}:\n\n" + table(["part", "command", "minutes", "commit", "result"], rows)


def main() -> int:
    """Exit code 1 where a part did not pass."""
    parser = argparse.ArgumentParser(prog="python -m bench.nightly", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {'; '.join(PARTS)}")
    parser.add_argument("--logs", type=Path, default=Path("build/nightly"), help="folder, default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for what was found; parts that are not run stay in it")
    given = parser.parse_args()
    for folder in (given.logs, *([given.json.parent] if given.json else [])):  # before hours of work
        folder.mkdir(parents=True, exist_ok=True)
    machine = Machine.here()
    results = read(given.json) if given.json and given.json.exists() else {}
    passed = True
    for name in given.only or PARTS:
        print(f"{name}: ", end="", flush=True)
        result = results[name] = run(name, PARTS[name], given.logs, machine)
        passed = passed and result.verdict == "passed"
        print("; ".join([result.verdict, *result.said]), f"({result.seconds:.0f} s)", flush=True)
        if given.json:  # after each, for who interrupts
            kept = {part: dataclasses.asdict(results[part]) for part in PARTS if part in results}
            given.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
