"""``kdfast doctor``: what this machine offers, and which backend a given call would get."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from kdfast import __version__
from kdfast.cli.terminal import console
from kdfast.ops._registry import backends
from kdfast.reporting.words import counted
from kdfast.spec.problem import build_problem

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_OPTIONAL = ("triton", "transformers", "tokenizers", "safetensors", "matplotlib", "jinja2", "pytest_benchmark")


def doctor(
    dtype: Annotated[str, typer.Option(help="dtype of the logits: " + ", ".join(_DTYPES))] = "fp32",
    device: Annotated[str, typer.Option(help="device of the logits")] = "cpu",
    divergence: Annotated[str, typer.Option(help="name of the divergence")] = "forward_kl",
    teachers: Annotated[int, typer.Option(help="number of teachers", min=1)] = 1,
    learn_temperature: Annotated[bool, typer.Option(help="whether the temperature requires grad")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON in place of tables")] = False,
) -> None:
    """Say what is available here, and what a call with these options would run on."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(_DTYPES)}, got {dtype!r}", param_hint="--dtype")  # noqa: EM102
    versions: dict[str, str | None] = {
        "kdfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in _OPTIONAL},
    }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    terminal = console()
    if not as_json:  # also where the call is one that cannot be
        table = Table(title="versions", show_header=False)
        for name, version in versions.items():
            table.add_row(name, version or "not installed")
        table.add_row("machine", f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}")
        table.add_row("GPU", gpu or "none that torch can use")
        terminal.print(table)
    try:
        logits = torch.zeros(1, 2, dtype=_DTYPES[dtype], device=device)
        temperature = torch.ones((), requires_grad=True) if learn_temperature else 1.0
        problem = build_problem(logits, [logits] * teachers, divergence=divergence, temperature=temperature)
        answer = backends(problem)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's word on a device that is not here, or ours
        raise typer.BadParameter(str(error)) from error
    refusal = None if any(row.chosen for row in answer.rows) else answer.refusal()
    if as_json:
        found: dict[str, Any] = {
            "versions": versions,
            "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu},
            "call": {"divergence": divergence, "dtype": dtype, "device": device, "teachers": teachers},
            "backends": [
                {"name": row.name, "available": row.available, "chosen": row.chosen, "reason": row.reason}
                for row in answer.rows
            ],
            "refusal": refusal,
        }
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(title=f"distill_loss: {divergence}, {dtype} on {device}, {counted(teachers, 'teacher')}")
    for column in ("", "backend", "available", "what, or why not"):
        table.add_column(column)
    for row in answer.rows:
        table.add_row("->" if row.chosen else "", row.name, "yes" if row.available else "no", row.reason)
    terminal.print(table)
    if refusal is not None:
        terminal.print(refusal)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
