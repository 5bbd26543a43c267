"""Entry point: in the order of what a first GPU most likely trips over, and what is worth most, until the deadline."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu import jobs
from bench.gpu.jobs import Outcome, Runner
from bench.gpu.report import report

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
    *("dense", "sparse", "packed", "modes", "edges", "head", "shifts", "signs", "silence", "softcap", "calls"),
    *("probabilities", "metrics", "soft_targets", "gpu"),
)

#: Operators whose first case is profiled.
PROFILED = ("bench.gpu.dense", "bench.gpu.sparse", "bench.gpu.soft_targets")
#: Kernels that the profiler is told of, by a regular expression.
KERNELS = "regex:dense_kernel|scan_kernel"

#: Seconds that an item of each phase may take; what holds for whole phases follows from the deadline.
LIMITS = {"machine": 90.0, "compile": 90.0, "smoke": 120.0, "case": 75.0, "profile": 90.0, "tile": 30.0}
#: Shares of the time that is left, which tests and the search of tiles have at most.
TESTS_SHARE, TUNE_SHARE = 0.35, 0.8
#: Seconds that are kept for what is written last.
RESERVE = 5.0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Test and measure the GPU kernels.")
    parser.add_argument("--out", type=Path, required=True, help="folder for REPORT.md, results.json and logs")
    parser.add_argument("--deadline", type=float, default=9.0, help="minutes after which all is over (default: 9)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over the competitors of a case (default: 7)")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--installed", action="store_true", help="test the kdfast that is installed, not the checkout")
    parser.add_argument(
        "--autotune", action="store_true", help="search tiles and warps: OUT/tiles.json, and what changed"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, through the interpreter, at tiny shapes")
    parser.add_argument(
        "--sabotage", type=int, default=0, metavar="N", help="a rehearsal in which every Nth process aborts or hangs"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases and calls whose names hold this")
    parser.add_argument("--limit", type=float, help="seconds an item may take, in the place of those of its phase")
    given = parser.parse_args(words)
    if given.sabotage and not given.rehearse:
        parser.error("--sabotage goes with --rehearse")
    return given


def _install(folder: Path, log: Path, seconds: float) -> str:
    """The checkout, built with what the machine has; why not, where that fails."""
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    return _run([*command, "--target", str(folder), str(ROOT)], dict(os.environ), ROOT, log, seconds)


def _run(command: list[str], environment: dict[str, str], cwd: Path, log: Path, seconds: float) -> str:
    """A command within a hard limit; how it failed, or nothing."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            jobs.end(process)
            return f"ended after {seconds:.0f} s, see {log.name}"
    return f"exit status {status}, see {log.name}" if status else ""


def cases(*, rehearse: bool) -> Iterator[tuple[str, Any]]:
    """Operators with their cases, in turns: the first of all, the second of all, ..."""
    queues = [[(name, case) for case in importlib.import_module(name).cases(rehearse=rehearse)] for name in OPERATORS]
    for together in itertools.zip_longest(*queues):
        yield from (one for one in together if one is not None)


def _lists() -> None:
    """Names of all cases and calls, for a process of its own: this one must not fall with what it imports."""
    from kdfast.benchmark.gpu_compile import edges, production

    names = {kind: [f"{o}|{c.name}" for o, c in cases(rehearse=kind == "tiny")] for kind in ("tiny", "cases")}
    sys.stdout.write(json.dumps({**names, "calls": [*production(), *edges()]}))


class Suite:
    """One run: what it has found so far, and where that lies."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.out = given, given.out
        self.deadline = time.monotonic() + 60 * given.deadline - RESERVE
        self.begun = time.monotonic()
        self.results: dict[str, Any] = {
            "machine": {"device": "unknown", "torch": "unknown", "triton": "unknown", "commit": "unknown"},
            "tests": "not run",
            "rehearsal": given.rehearse,
            "copy_bytes_per_second": None,
            "cases": [],
            "not_run": [],
            "phases": {},
            "failures": [],
        }

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def write(self) -> None:
        """All that is known, so that an end at any time loses nothing."""
        results = dict(self.results, seconds=round(time.monotonic() - self.begun, 1))
        for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("REPORT.md", report(results))):
            partial = self.out / f".{name}"
            partial.write_text(text)
            partial.replace(self.out / name)

    def phase(self, name: str, kind: str, items: list[str], runner: Runner, **options: Any) -> Iterator[Outcome]:
        """Outcomes as they come, each written at once."""
        counts = self.results["phases"].setdefault(name, {"items": len(items), "states": {}, "note": ""})
        limit = self.given.limit or LIMITS[kind]
        if not items:
            self.failed(name, "nothing to do: the list is empty", "")
        for outcome in runner.run(kind, items, limit=limit, **options):
            counts["states"][outcome.state] = counts["states"].get(outcome.state, 0) + 1
            if outcome.state not in (jobs.DONE, jobs.NOT_RUN):
                self.failed(f"{name}: {outcome.item}", f"{outcome.state}: {outcome.note}", outcome.log)
            print(f"{name}: {outcome.item}: {outcome.state}", flush=True)
            yield outcome
            self.write()

    def failed(self, what: str, why: str, log: str) -> None:
        """Remember a failure."""
        self.results["failures"].append({"what": what, "why": why, "log": log})

    def run(self, environment: dict[str, str]) -> None:
        """All phases."""
        given, interpreted = self.given, dict(environment)
        if given.rehearse:
            interpreted |= {"TRITON_INTERPRET": "1", "KDFAST_BACKEND": "triton", "OMP_WAIT_POLICY": "passive"}
        logs = self.out / "logs"
        logs.mkdir(exist_ok=True)
        runner = Runner(logs, interpreted, self.deadline, given.rehearse)
        lists = self.lists(environment)
        for outcome in self.phase("machine", "machine", ["machine"], runner):
            self.results |= {k: v for k, v in outcome.result.items() if k != "architecture"}
            architecture = outcome.result.get("architecture", "sm_90")
        runner.sabotage = given.sabotage
        if given.autotune:
            self.autotune(runner, architecture)
        else:
            compiler = Runner(logs, environment, self.deadline, given.rehearse, given.sabotage, runner.numbers)
            self.compile(compiler, architecture, lists)
            self.smoke(runner, lists)
            key = len(OPERATORS)
            self.measure("key timings", runner, lists["cases"][:key])
            if not given.no_tests:
                self.test(interpreted)
            self.profile(runner, lists)
            self.measure("the rest", runner, lists["cases"][key:])
        self.write()

    def lists(self, environment: dict[str, str]) -> dict[str, list[str]]:
        """Names of cases and calls; where they cannot be had nothing else can."""
        code = "import sys; sys.path.append(sys.argv[1]); from bench.gpu.__main__ import _lists; _lists()"
        command = [sys.executable, "-c", code, str(ROOT)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            self.failed("lists of cases", done.stderr, "")
            return {"tiny": [], "cases": [], "calls": []}
        lists: dict[str, list[str]] = json.loads(done.stdout)
        lists = {kind: [name for name in names if self.given.only in name] for kind, names in lists.items()}
        if self.given.rehearse:
            lists["cases"], lists["calls"] = lists["tiny"], lists["calls"][:3]
        return lists

    def compile(self, runner: Runner, architecture: str, lists: dict[str, list[str]]) -> None:
        """Registers and spills of every launch, and why one does not compile: known before anything runs."""
        calls, workers = [f"{architecture}|{call}" for call in lists["calls"]], min(12, os.cpu_count() or 1)
        each = 1 if self.given.rehearse else -(-len(calls) // workers) or 1
        self.results["compilation"] = rows = []
        for outcome in self.phase("compilation", "compile", calls, runner, workers=workers, per_process=each):
            rows += outcome.result.get("kernels", [])
            for row in outcome.result.get("kernels", []):
                if row["spills"]:
                    self.failed(f"compilation: {row['call']}, {row['kernel']}", f"spills {row['spills']} bytes", "")

    def smoke(self, runner: Runner, lists: dict[str, list[str]]) -> None:
        """Tiny cases against fp64, under a checker of memory where there is one."""
        sanitizer = _tool("compute-sanitizer")
        prefix = [sanitizer, "--error-exitcode", "99", "--require-cuda-init=no"] if sanitizer else []
        if self.given.rehearse:
            prefix = []
        name = "smoke set under compute-sanitizer" if prefix else "smoke set"
        self.results["smoke"] = {}
        workers = 2 if self.given.rehearse else 4
        for outcome in self.phase(name, "smoke", lists["tiny"], runner, prefix=prefix, workers=workers):
            self.results["smoke"][outcome.item] = {"state": outcome.state, **outcome.result}
            self.judge(f"smoke: {outcome.item}", outcome)
            log = self.out / "logs" / outcome.log
            if prefix and outcome.log and "ERROR SUMMARY: 0 errors" not in log.read_text(errors="replace"):
                self.failed(f"smoke: {outcome.item}", "compute-sanitizer found errors, or did not end", outcome.log)
        if not prefix:
            self.results["phases"][name]["note"] = "compute-sanitizer is not installed here: memory was not checked"

    def judge(self, what: str, outcome: Outcome) -> bool:
        """Whether a result is right; a failure is remembered."""
        errors = outcome.result.get("errors", {})
        if outcome.state != jobs.DONE or _declines(outcome.result):
            return outcome.state == jobs.DONE
        if outcome.result.get("errors_note"):
            self.failed(what, outcome.result["errors_note"], outcome.log)
        elif not errors:
            self.failed(what, "was not compared with fp64", outcome.log)
        elif not right(errors):
            ours = errors["kdfast"]
            why = f"wrong by {ours['value']} of the largest element at {ours['index']}: {ours['got']}, right is "
            self.failed(what, f"{why}{ours['want']}; tolerance {errors['tolerance']:.1e}", outcome.log)
        else:
            return True
        return False

    def measure(self, name: str, runner: Runner, items: list[str]) -> None:
        """Times of cases, a process each."""
        arguments = ["--rounds", str(self.given.rounds)]
        if not items and name == "the rest":
            return
        for outcome in self.phase(name, "case", items, runner, arguments=arguments):
            operator, title = outcome.item.split("|", 1)
            if outcome.state == jobs.NOT_RUN:
                self.results["not_run"].append(title)
                continue
            entry = {"operator": operator, "name": title, "floor_bytes": None, "timings": {}, "errors": {}}
            entry |= {"errors_note": "", "state": outcome.state, **outcome.result}
            entry["timings"].setdefault(
                "kdfast",
                {"milliseconds": None, "spread": None, "peak_bytes": None, "note": outcome.state, "failed": True},
            )
            entry["right"] = self.judge(f"case: {title}", outcome)
            if outcome.state == jobs.DONE and entry["timings"]["kdfast"]["failed"]:
                self.failed(
                    f"case: {title}", outcome.result.get("note") or entry["timings"]["kdfast"]["note"], outcome.log
                )
            self.results["cases"].append(entry)

    def test(self, environment: dict[str, str]) -> None:
        """Pytest within a hard limit; each test's line stands in the log before the next begins."""
        log = self.out / "logs" / "tests.log"
        files = [p for name in TESTS for p in sorted((ROOT / "tests").glob(f"**/test_{name}.py"))]
        if not files:
            self.failed("tests", "no files of tests", "")
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *map(str, files)]
        if self.given.rehearse:
            command += ["-k", "test_label_on_a_masked_column"]
        elif importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(12, os.cpu_count() or 1))]
        if not self.given.rehearse:
            environment = environment | {"KDFAST_TEST_DEVICE": "cuda"}
        why = _run(command, environment, self.out, log, self.left() * TESTS_SHARE)
        said = log.read_text(errors="replace")
        counts = {
            w: len(re.findall(rf"\b{w}\b.*\[ *\d+%\]|\[ *\d+%\] {w}\b", said)) for w in ("PASSED", "FAILED", "ERROR")
        }
        self.results["tests"] = ", ".join(f"{n} {w.lower()}" for w, n in counts.items()) + (f"; {why}" if why else "")
        if why or not counts["PASSED"]:
            self.failed("tests", why or "none passed", "tests.log")
        self.write()

    def profile(self, runner: Runner, lists: dict[str, list[str]]) -> None:
        """What a profiler says of three kernels."""
        tool = _tool("ncu")
        items = [next((c for c in lists["cases"] if c.startswith(f"{o}|")), "") for o in PROFILED]
        note = "ncu is not installed here" if tool is None else ""
        if note or self.given.rehearse:
            self.results["phases"]["profiles"] = {"items": 0, "states": {}, "note": note or "none in a rehearsal"}
            return
        prefix = [tool, "--clock-control", "none", "--set", "full", "--kernel-name", KERNELS, "--launch-skip", "1"]
        prefix += ["--launch-count", "1"]
        for _ in self.phase("profiles", "profile", [i for i in items if i], runner, prefix=[str(p) for p in prefix]):
            pass

    def autotune(self, runner: Runner, architecture: str) -> None:
        """The search of tiles, within its share of the time; the table lies in the output folder."""
        from bench.gpu.autotune import candidates, table

        runner.deadline = time.monotonic() + self.left() * TUNE_SHARE
        shipped = ROOT / "kernels" / "triton" / "tiles.json"
        architecture = "interpreter" if self.given.rehearse else architecture
        found: dict[str, float] = {}
        items = candidates(rehearse=self.given.rehearse)
        each = 2 if self.given.rehearse else len(items)
        for outcome in self.phase("tiles", "tile", items, runner, per_process=each):
            if outcome.state == jobs.DONE:
                found[outcome.item] = outcome.result["milliseconds"]
        text, said = table(shipped, architecture, found)
        (self.out / "tiles.json").write_text(text)
        self.results["tiles"] = {"milliseconds": found, "changes": said}
        if not found:
            self.failed("tiles", "no tile was timed", "")


def right(errors: dict[str, Any]) -> bool:
    """Whether kdfast was compared with fp64 and lies within the tolerance."""
    ours = errors.get("kdfast")
    return bool(ours) and ours["value"] is not None and ours["value"] <= errors["tolerance"]


def _declines(result: dict[str, Any]) -> bool:
    """Whether kdfast says that it does not serve the case, which is no failure."""
    ours = result.get("timings", {}).get("kdfast")
    return ours is not None and ours["milliseconds"] is None and not ours["failed"]


def _tool(name: str) -> str | None:
    found = shutil.which(name) or Path("/usr/local/cuda/bin", name)
    return str(found) if Path(found).exists() else None


def complete(results: dict[str, Any]) -> bool:
    """Whether something was measured, and nothing failed."""
    tuned = bool(results.get("tiles", {}).get("milliseconds"))
    return not results["failures"] and (tuned or bool(results["cases"]))


def main(words: list[str] | None = None) -> int:
    """Exit code 0 where nothing failed, and something was measured."""
    given = _arguments(words)
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(given)
    environment = dict(os.environ, PYTHONSAFEPATH="1")
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        why = ""
        if not given.installed:
            why = _install(Path(folder), given.out / "install.log", suite.left() / 2)
            environment["PYTHONPATH"] = os.pathsep.join([folder, environment.get("PYTHONPATH", "")])
        if why:
            suite.failed("install", f"{why}\n{(given.out / 'install.log').read_text(errors='replace')[-3000:]}", "")
        else:
            try:
                suite.run(environment)
            finally:
                suite.write()
    suite.write()
    print(f"{given.out / 'REPORT.md'}: {len(suite.results['failures'])} failures")
    return 0 if complete(suite.results) else 1


if __name__ == "__main__":
    sys.exit(main())
