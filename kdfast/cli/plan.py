"""``kdfast plan``: what each path would cost in memory and traffic, by arithmetic."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from kdfast.cli.terminal import console
from kdfast.plan import plan as costs_of
from kdfast.reporting.words import counted

_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    vocab: Annotated[int, typer.Option(help="columns of the logits", min=1)],
    hidden: Annotated[int, typer.Option(help="size of the hidden states", min=1)],
    tokens: Annotated[int, typer.Option(help="tokens of one step", min=1)],
    kept: Annotated[int, typer.Option(help="entries per token of sparse targets", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="dtype of logits and weights: " + ", ".join(_ITEMSIZE))] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda: how large a chunk is")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, in bytes, in place of the table")] = False,
) -> None:
    """Say what a step of each path costs beside the hidden states and the models' weights. Nothing is run."""
    if dtype not in _ITEMSIZE:
        raise typer.BadParameter(f"expected one of {', '.join(_ITEMSIZE)}, got {dtype!r}", param_hint="--dtype")  # noqa: EM102
    try:
        costs = costs_of(tokens=tokens, vocab=vocab, hidden=hidden, kept=kept, itemsize=_ITEMSIZE[dtype], device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        sizes = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "kept": kept, "dtype": dtype, "device": device}
        typer.echo(json.dumps({"sizes": sizes, "paths": [dataclasses.asdict(cost) for cost in costs]}, indent=1))
        return
    title = f"{counted(tokens, 'token')} x {counted(vocab, 'column')}, H = {hidden:,}, {dtype} on {device}"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = (
        "Memory and traffic in GiB: memory at the peak, beside hidden states and weights; traffic of the loss. "
        "Products: of 2 N V H operations."
    )
    table.add_column("path", no_wrap=True)
    for name in ("memory", "of eager", "traffic", "products"):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(
            f"{cost.path}\n  {cost.remark}",
            f"{cost.memory / 2**30:,.2f}",
            f"{cost.memory / costs[0].memory:.2f}",
            f"{cost.traffic / 2**30:,.1f}",
            str(cost.products),
        )
    console().print(table)
