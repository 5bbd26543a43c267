"""``kdfast plan``: what each path would cost in memory and traffic, by arithmetic."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kdfast.plan import plan as costs_of

_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    vocab: Annotated[int, typer.Option(help="columns of the logits", min=1)],
    hidden: Annotated[int, typer.Option(help="size of the hidden states", min=1)],
    tokens: Annotated[int, typer.Option(help="tokens of one step", min=1)],
    kept: Annotated[int, typer.Option(help="entries per token of sparse targets", min=1)] = 64,
    dtype: Annotated[str, typer.Option(help="dtype of logits and weights: " + ", ".join(_ITEMSIZE))] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda: how large a chunk is")] = "cuda",
) -> None:
    """Say what a step of each path costs beside the hidden states and the models' weights. Nothing is run."""
    if dtype not in _ITEMSIZE:
        raise typer.BadParameter(f"expected one of {', '.join(_ITEMSIZE)}, got {dtype!r}", param_hint="--dtype")  # noqa: EM102
    try:
        costs = costs_of(tokens=tokens, vocab=vocab, hidden=hidden, kept=kept, itemsize=_ITEMSIZE[dtype], device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table(title=f"{tokens} tokens x {vocab} columns, H = {hidden}, {dtype} on {device}", caption_justify="left")
    table.caption = "Memory beside hidden states and weights; traffic of the loss; products of 2 N V H operations."
    for name in ("path", "memory GiB", "of eager", "traffic GiB", "products", ""):
        table.add_column(name, justify="right" if name and name != "path" else "left")
    for cost in costs:
        table.add_row(
            cost.path,
            f"{cost.memory / 2**30:.2f}",
            f"{cost.memory / costs[0].memory:.2f}",
            f"{cost.traffic / 2**30:.1f}",
            str(cost.products),
            cost.remark,
        )
    Console().print(table)
