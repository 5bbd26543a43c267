"""Compiles the Triton kernels for GPUs that need not be there, and reads what came out.

Every launch that the launchers make for a set of calls is compiled instead, with the arguments, tiles and warps that it
would run with. Registers, spills and shared memory come from ``ptxas -v`` (NVIDIA) or the assembly's notes (AMD).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

if TYPE_CHECKING:
    from kdfast.spec.packed import PackedTargets

#: By the names of the tiles' table: Triton's target, 32-bit registers of a processor, its shared memory in bytes, and
#: the most warps on it.
TARGETS: dict[str, tuple[tuple[str, int | str, int], int, int, int]] = {
    "sm_80": (("cuda", 80, 32), 65536, 163 * 1024, 64),
    "sm_90": (("cuda", 90, 32), 65536, 227 * 1024, 64),
    "sm_100": (("cuda", 100, 32), 65536, 227 * 1024, 64),
    "gfx942": (("hip", "gfx942", 64), 4 * 512 * 64, 64 * 1024, 32),
}

VOCAB = 128256


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call, for one target."""

    target: str
    call: str
    kernel: str
    tile: int  # columns; 0 where the kernel has none
    warps: int
    registers: int  # of a thread
    spills: int  # bytes of a thread
    shared: int  # bytes of a program
    moved: int  # bytes of a column, read and written; 0 where the kernel sees few of them or none
    text: str  # PTX or AMD assembly

    @property
    def occupancy(self) -> float:
        """Share of a processor's warps that fit, by registers and shared memory."""
        (_, _, width), registers, shared, most = TARGETS[self.target]
        by_registers = registers // max(1, -(-self.registers // 8) * 8 * width * self.warps)
        by_shared = shared // self.shared if self.shared else by_registers
        return min(by_registers, by_shared, most // self.warps) * self.warps / most


def _dense_calls() -> dict[str, dict[str, Any]]:
    """Arguments of ``distill_loss``, by name, whose launches are the production ones."""
    from kdfast.spec.divergence import PARAMETERS, Divergence

    calls: dict[str, dict[str, Any]] = {name: {"divergence": name} for name in PARAMETERS}
    calls["alpha_div"]["divergence"] = Divergence("alpha_div", a=0.5)
    calls["mixture"] = {"divergence": {"forward_kl": 0.5, "reverse_kl": 0.3, "tvd": 0.2}}
    calls["jsd, T = 1.5"] = {"divergence": "jsd", "temperature": 1.5}
    calls["forward_kl, fp32"] = {"divergence": "forward_kl", "dtype": torch.float32}
    calls["forward_kl, per token"] = {"divergence": "forward_kl", "reduction": "none"}
    calls["jsd, learned temperature"] = {"divergence": "jsd", "learned": True}
    calls["forward_kl, smoothing, z-loss"] = {"divergence": "forward_kl", "label_smoothing": 0.1, "z_loss": 1e-4}
    calls["cross-entropy"] = {"teachers": 0}
    calls["ensemble of 3"] = {"divergence": "jsd", "teachers": 3}
    calls["ensemble of 3 logits"] = {"divergence": "forward_kl", "teachers": 3, "ensemble": "logit"}
    calls["forward_kl, few rows"] = {"divergence": "forward_kl", "processors": 132}
    observed = {"divergence": "forward_kl", "return_metrics": True}
    calls["forward_kl, metrics"] = observed
    calls["reverse_kl, metrics, fp32"] = observed | {"divergence": "reverse_kl", "dtype": torch.float32}
    calls["jsd, metrics, few rows"] = observed | {"divergence": "jsd", "processors": 132}
    calls["ensemble of 3, metrics"] = observed | {"teachers": 3}
    calls["jsd, capped heads"] = {"divergence": "jsd", "softcap": 30.0}
    sparse = {"divergence": "forward_kl", "kept": 64}
    mixture = {"divergence": {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.2}}
    calls["sparse, k = 64"] = sparse
    calls["sparse, k = 64, fp32, smoothing"] = sparse | {"dtype": torch.float32, "label_smoothing": 0.1}
    calls["sparse, k = 64, metrics"] = sparse | {"return_metrics": True}
    calls["sparse, k = 64, per token"] = sparse | {"reduction": "none"}
    calls["sparse, k = 64, capped head"] = sparse | {"softcap": 30.0}
    calls["sparse, k = 64, few rows"] = sparse | {"processors": 132}
    calls["sparse, k = 64, zero"] = sparse | {"tail": "zero"}
    calls["sparse jsd, k = 64, renorm"] = sparse | {"divergence": "jsd", "tail": "renorm"}
    calls["packed, k = 64"] = sparse | {"packed": True}
    calls["packed, k = 64, per token"] = sparse | {"packed": True, "reduction": "none"}
    calls["packed, k = 64, few rows"] = sparse | {"packed": True, "processors": 132}
    calls["packed mixture, k = 1024"] = mixture | {"packed": True, "kept": 1024}
    calls["packed mixture, k = 1024, few rows"] = mixture | {"packed": True, "kept": 1024, "processors": 132}
    calls["sparse mixture, k = 1024"] = mixture | {"kept": 1024}
    calls["sparse mixture, k = 4096"] = mixture | {"kept": 4096}
    calls["sparse mixture, k = 4096, few rows"] = mixture | {"kept": 4096, "processors": 132}
    return calls


def _select_calls() -> dict[str, dict[str, Any]]:
    """Arguments of ``soft_targets``, by name."""
    drawn = {"temperatures": (2.0,), "seed": 1}
    return {
        "top-k, T = 1 and 2": {"temperatures": (1.0, 2.0)},
        "top-k of 1024, fp32, four T": {"k": 1024, "temperatures": (1.0, 2.0, 3.0, 5.0), "dtype": torch.float32},
        "top-p": {"method": "topp", "p": 0.95, "k": 256},
        "sample": {"method": "sample", **drawn},
        "pps": {"method": "pps", **drawn},
    }


def _select(*, dtype: torch.dtype = torch.bfloat16, rows: int = 4, vocab: int = VOCAB, **options: Any) -> None:
    from kdfast.soft_targets import soft_targets

    with mock.patch.dict(os.environ, {"KDFAST_BACKEND": "triton"}):
        soft_targets(torch.zeros(rows, vocab, dtype=dtype), **options)


def _packed(rows: int, kept: int, lse: Mapping[float, torch.Tensor], vocab: int = VOCAB) -> PackedTargets:
    """Targets whose bytes, which nobody reads, are zeros."""
    from kdfast.spec.packed import PackedTargets

    size = -(-(kept * (vocab - 1).bit_length() + 7) // 8 + kept // 2) // 4 * 4
    offset = torch.arange(rows, dtype=torch.int32) * (size // 4)
    data = torch.zeros(rows * size, dtype=torch.uint8)
    return PackedTargets(data, offset, torch.zeros(rows), kept=kept, vocab_size=vocab, grid=4, lse=lse)


def _unpack(kept: int) -> None:
    from kdfast.kernels.triton import unpack_launch

    x = _packed(4, kept, {})
    ids, logprobs = torch.empty(x.shape, dtype=torch.int32), torch.empty(x.shape)
    unpack_launch.run(x.data, x.offset, x.top, x._all_k_eff(), VOCAB, x.grid, ids, logprobs)


def _production_calls() -> dict[str, Callable[[], None]]:
    """Calls at the sizes that kernels are made for."""
    calls: dict[str, Callable[[], None]] = {}
    calls |= {name: functools.partial(_distill, **arguments) for name, arguments in _dense_calls().items()}
    calls |= {name: functools.partial(_select, **arguments) for name, arguments in _select_calls().items()}
    calls |= {f"unpack, k = {kept}": functools.partial(_unpack, kept) for kept in (64, 4096)}
    return calls


def _edge_calls() -> dict[str, Callable[[], None]]:
    """Calls at sizes that Triton treats apart: numbers that are 1, which it makes constants, and odd rows."""
    calls: dict[str, Callable[[], None]] = {}
    kl: dict[str, Any] = {"divergence": "forward_kl"}
    shapes: dict[str, dict[str, Any]] = {"one row": {"rows": 1}, "odd V": {"vocab": VOCAB + 1}, "V = 2": {"vocab": 2}}
    for name, shape in shapes.items():
        calls[f"forward_kl, {name}"] = functools.partial(_distill, **kl, **shape)
        calls[f"ensemble of 2, {name}"] = functools.partial(_distill, **kl, teachers=2, **shape)
        calls[f"metrics, {name}"] = functools.partial(_distill, **kl, teachers=2, return_metrics=True, **shape)
        for packed in (False, True):
            what = f"{'packed' if packed else 'sparse'}, k = 1, {name}"
            calls[what] = functools.partial(_distill, **kl, kept=1, packed=packed, **shape)
            calls[f"{what}, few rows"] = functools.partial(
                _distill, **kl, kept=1, packed=packed, processors=132, **shape
            )
        for method in ("topk", "topp", "sample", "pps"):
            drawn: dict[str, Any] = (
                {"seed": 1} if method in ("sample", "pps") else {"p": 0.95} if method == "topp" else {}
            )
            calls[f"{method}, k = 1, {name}"] = functools.partial(_select, method=method, k=1, **drawn, **shape)
    calls["forward_kl, rows in two strides"] = functools.partial(_distill, **kl, rows=(3, 1), stretched=True)
    calls["unpack, k = 1"] = functools.partial(_unpack, 1)
    return calls


def production() -> list[str]:
    """Names of the calls whose registers and spills are reported."""
    return list(_production_calls())


def edges() -> list[str]:
    """Names of the calls that must compile, whatever they cost: k = 1, one row, odd V."""
    return list(_edge_calls())


def _distill(
    *,
    rows: int | tuple[int, ...] = 4,
    vocab: int = VOCAB,
    stretched: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    teachers: int = 1,
    kept: int = 0,
    packed: bool = False,
    learned: bool = False,
    processors: int = 1,
    softcap: float | None = None,
    **options: Any,
) -> None:
    from kdfast.kernels.triton import tiles
    from kdfast.loss import distill_loss
    from kdfast.spec.head import LMHead
    from kdfast.spec.sparse import SparseTargets

    shape = rows if isinstance(rows, tuple) else (rows,)
    # with `stretched`, rows that only two strides say: the first and the last of four tokens
    wide = (shape[0], 4) if stretched else shape

    def logits() -> Any:
        if softcap is None:
            x = torch.zeros(*wide, vocab, dtype=dtype)
            return (x[:, ::3] if stretched else x).requires_grad_()
        hidden, weight = torch.zeros(*shape, 8, dtype=dtype, requires_grad=True), torch.zeros(vocab, 8, dtype=dtype)
        return LMHead(hidden, weight, softcap=softcap)

    student: Any = logits()
    shape = shape if softcap is not None else student.shape[:-1]
    teacher: Any = [logits() for _ in range(teachers)]
    options = {"temperature": 2.0} | options
    if learned:
        options["temperature"] = torch.tensor(2.0, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    teacher = None if teachers == 0 else teacher[0] if teachers == 1 else teacher
    if kept:
        lse = {options["temperature"]: torch.zeros(shape)}
        teacher = _packed(shape[0], kept, lse, vocab)
        if not packed:
            ids = torch.arange(kept, dtype=torch.int32).expand(*shape, kept)
            teacher = SparseTargets(ids, torch.zeros(*shape, kept), vocab_size=vocab, lse=lse)
    with mock.patch.object(tiles, "processors", return_value=processors):
        terms = distill_loss(student, teacher, labels, backend="triton", return_terms=True, **options)
        terms.loss.sum().backward()


class _Driver:
    """Stands for a GPU's driver, of which compilation asks the target and nothing else."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling(target: str, report: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from kdfast.kernels.triton import dense_launch, tiles
    from kdfast.ops import _registry

    fresh: set[int] = set()

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if id(kernel) not in fresh:
            kernel.device_caches.clear()  # of another target
            fresh.add(id(kernel))
        report(kernel, kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options), args, options)

    with (
        mock.patch.object(driver, "_active", _Driver(GPUTarget(*TARGETS[target][0]))),
        mock.patch.object(dense_launch, "launch", compile_only),
        mock.patch.object(tiles, "architecture", return_value=target),
        mock.patch.object(_registry, "_interprets", return_value=True),  # let tensors of the CPU through
    ):
        yield


def compile_calls(target: str, names: list[str] | None = None) -> list[Compiled]:
    """Every kernel that the calls launch on a target, each once for each call.

    Args:
        target: a key of :data:`TARGETS`.
        names: of calls, from :func:`production` and :func:`edges`; those of production where None.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, with which nothing is compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        msg = "TRITON_INTERPRET=1 runs kernels on the CPU: unset it to compile them"
        raise RuntimeError(msg)
    from kdfast.kernels.triton import dense_launch, select_launch

    moved = {"dense_kernel": dense_launch.bytes_per_column, "scan_kernel": select_launch.bytes_per_column}
    out: list[Compiled] = []
    calls = _production_calls() | _edge_calls()
    for name in production() if names is None else names:
        seen: set[str] = set()

        def report(
            kernel: Any,
            compiled: Any,
            args: tuple[Any, ...],
            options: dict[str, Any],
            call: str = name,
            seen: set[str] = seen,
        ) -> None:
            text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            if text in seen:
                return
            seen.add(text)
            registers, spills = (_of_ptx if "ptx" in compiled.asm else _of_amdgcn)(text, target)
            out.append(
                Compiled(
                    target,
                    call,
                    kernel.__name__,
                    options.get("BLOCK", 0),
                    options.get("num_warps", 4),
                    registers,
                    spills,
                    compiled.metadata.shared,
                    moved[kernel.__name__](args, options) if kernel.__name__ in moved else 0,
                    text,
                )
            )

        with _compiling(target, report):
            calls[name]()
    return out


def variants(target: str, rows: Iterable[int]) -> dict[int, int]:
    """How many kernels of a call of the dense loss are compiled anew for each number of rows, on 132 processors.

    Args:
        target: a key of :data:`TARGETS`.
        rows: counts of rows, in the order in which calls have them.
    """
    seen: set[str] = set()
    new: dict[int, int] = {}

    def report(kernel: Any, compiled: Any, _: tuple[Any, ...], __: dict[str, Any]) -> None:
        seen.add(f"{kernel.__name__} {compiled.hash}")

    with _compiling(target, report):
        for n in rows:
            before = len(seen)
            _distill(divergence="forward_kl", rows=n, processors=132)
            new[n] = len(seen) - before
    return new


def _of_ptx(text: str, target: str) -> tuple[int, int]:
    """Registers and bytes spilled of a thread, as ptxas says."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"\.target (\S+)", text)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        result = subprocess.run(
            [
                get_ptxas(int(target[3:])).path,
                "-v",
                f"--gpu-name={arch[1]}",
                str(source),
                "-o",
                str(Path(folder, "kernel.cubin")),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        msg = f"ptxas: {result.stderr or result.stdout}"
        raise RuntimeError(msg)
    registers = re.search(r"Used (\d+) registers", result.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert registers is not None, result.stderr
    assert spills is not None, result.stderr
    return int(registers[1]), int(spills[1]) + int(spills[2])


def _of_amdgcn(text: str, _: str) -> tuple[int, int]:
    registers, spilled = re.search(r"\.vgpr_count:\s*(\d+)", text), re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    assert registers is not None
    assert spilled is not None
    return int(registers[1]), 4 * int(spilled[1])


_INTRODUCTION = """# The GPU kernels, compiled

Written by `python -m kdfast.benchmark.gpu_compile`, which needs Triton and no GPU: every launch of the calls below, at
the tile and warps that it would run with (`kernels/triton/tiles.json`), over {vocab} columns. Registers and spills are
those of `ptxas -v` or of the assembly's notes; occupancy is the share of a processor's warps that registers, shared
memory and warps leave room for; bytes are what a launch reads and writes for a column, caches left aside, as the tests
count them in the interpreter. {versions}

"""


def markdown(rows: list[Compiled]) -> str:
    """A document for docs/."""
    columns = ("call", "target", "kernel", "tile", "warps", "registers", "spilled", "shared", "bytes", "occupancy")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|" + "---:|" * 7]
    for r in rows:
        numbers = (r.tile or "-", r.warps, r.registers, r.spills, r.shared, r.moved or "-", f"{r.occupancy:.2f}")
        lines.append(f"| {' | '.join(map(str, (r.call, r.target, r.kernel, *numbers)))} |")
    versions = f"Triton {importlib.metadata.version('triton')}."
    return _INTRODUCTION.format(vocab=VOCAB, versions=versions) + "\n".join(lines) + "\n"


def main() -> None:
    """``python -m kdfast.benchmark.gpu_compile``: the table, on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable; all if not given")
    parser.add_argument("--call", action="append", help="repeatable; all if not given")
    given = parser.parse_args()
    rows = [row for target in given.target or TARGETS for row in compile_calls(target, given.call)]
    sys.stdout.write(markdown(rows))


if __name__ == "__main__":
    main()
