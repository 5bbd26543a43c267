"""``kdfast doctor``: what this machine offers, and which backend a given call would get."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kdfast import __version__
from kdfast.ops._registry import backends
from kdfast.spec.problem import build_problem

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_OPTIONAL = ("triton", "transformers", "tokenizers", "safetensors", "matplotlib", "jinja2", "pytest_benchmark")


def doctor(
    dtype: Annotated[str, typer.Option(help="dtype of the logits: " + ", ".join(_DTYPES))] = "fp32",
    device: Annotated[str, typer.Option(help="device of the logits")] = "cpu",
    divergence: Annotated[str, typer.Option(help="name of the divergence")] = "forward_kl",
    teachers: Annotated[int, typer.Option(help="number of teachers", min=1)] = 1,
    learn_temperature: Annotated[bool, typer.Option(help="whether the temperature requires grad")] = False,
) -> None:
    """Say what is available here, and what a call with these options would run on."""
    console = Console()
    versions = Table(title="versions", show_header=False)
    versions.add_row("kdfast", __version__)
    versions.add_row("python", platform.python_version())
    versions.add_row("torch", torch.__version__)
    for name in _OPTIONAL:
        versions.add_row(name, _version(name))
    versions.add_row("machine", f"{platform.machine()}, {torch.get_num_threads()} threads")
    versions.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use")
    console.print(versions)

    if dtype not in _DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(_DTYPES)}, got {dtype!r}", param_hint="--dtype")  # noqa: EM102
    try:
        logits = torch.zeros(1, 2, dtype=_DTYPES[dtype], device=device)
        temperature = torch.ones((), requires_grad=True) if learn_temperature else 1.0
        problem = build_problem(logits, [logits] * teachers, divergence=divergence, temperature=temperature)
        answer = backends(problem)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's word on a device that is not here, or ours
        raise typer.BadParameter(str(error)) from error
    table = Table(title=f"distill_loss: {divergence}, {dtype} on {device}, {teachers} teacher(s)")
    for column in ("", "backend", "available", "what, or why not"):
        table.add_column(column)
    for row in answer.rows:
        table.add_row("->" if row.chosen else "", row.name, "yes" if row.available else "no", row.reason)
    console.print(table)
    if not any(row.chosen for row in answer.rows):
        console.print(answer.refusal())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
