"""The hardware and software that a measurement holds for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from kdfast.ops._registry import backends

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Machine:
    """What is recorded beside every measurement."""

    cpu: str  # model name
    isa: str  # instruction set that kdfast uses
    threads: int  # of torch, and so of kdfast
    huge_pages: str  # Linux's transparent_hugepage setting: always, madvise or never; "n/a" elsewhere
    system: str
    python: str
    torch: str
    kdfast: str
    backend: str  # the implementation that kdfast chooses
    commit: str | None  # of the git checkout in the working directory, "+" where files are modified

    @staticmethod
    def here() -> Machine:
        """This machine, now."""
        from kdfast import _core

        return Machine(
            cpu=_cpu_model(),
            isa=_core.isa(),
            threads=torch.get_num_threads(),
            huge_pages=_huge_pages(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=torch.__version__,
            kdfast=importlib.metadata.version("kdfast"),
            backend=backends().chosen,
            commit=_commit(),
        )

    def __str__(self) -> str:
        commit = "" if self.commit is None else f", commit {self.commit}"
        return (
            f"{self.cpu}, {self.isa}, {self.threads} threads, huge pages: {self.huge_pages}; {self.system}, "
            f"Python {self.python}, torch {self.torch}, kdfast {self.kdfast} ({self.backend}{commit})"
        )

    def differences(self, other: Machine) -> list[str]:
        """What sets two machines' ratios apart, as ``field: this, then that``; versions of kdfast do not."""
        fields = ("cpu", "isa", "threads", "huge_pages", "torch", "backend")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in fields)
        return [f"{name}: {mine}, then {theirs}" for name, mine, theirs in pairs if mine != theirs]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _huge_pages() -> str:
    try:
        setting = _HUGE_PAGES.read_text()
    except OSError:
        return "n/a"
    return setting.partition("[")[2].partition("]")[0] or "n/a"


def _commit() -> str | None:
    def git(*words: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # asking must not touch the index
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=20, env=environment)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return None
