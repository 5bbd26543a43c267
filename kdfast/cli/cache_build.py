"""``kdfast cache build``: a teacher over a data set, into a cache."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.progress import BarColumn, Progress, TextColumn

from kdfast.cache import CacheError
from kdfast.cache.grid import grid_from
from kdfast.cli.ending import EXIT_FAULTY, EXIT_INTERRUPTED, EXIT_USAGE, fail, needs, writable
from kdfast.cli.interrupt import Interrupt
from kdfast.cli.terminal import console, program
from kdfast.reporting.words import counted, were_there

if TYPE_CHECKING:
    from kdfast.cache.job import Filled, Job

_EXTRAS = {"transformers": "hf", "datasets": "hf", "tokenizers": "cache", "ray": "ray", "pyarrow": "ray"}


def build(
    out: Annotated[Path, typer.Argument(help="directory of the cache", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Argument(
            help=".txt files or a directory of them, .jsonl files, .npy arrays of token ids, or a data set of "
            "Dataset.save_to_disk",
            show_default=False,
        ),
    ],
    *,
    model: Annotated[Path | None, typer.Option(help="Teacher: directory of a Hugging Face causal LM.")] = None,
    factory: Annotated[
        str | None,
        typer.Option(
            help="Teacher: module:function, which returns a function of (input_ids, attention_mask) (B, S) to logits "
            "(B, S, V) or a kdfast.LMHead."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the teacher of a factory; kept in the cache.")] = None,
    teacher_license: Annotated[str | None, typer.Option(help="Of the teacher; kept in the cache.")] = None,
    data_license: Annotated[str | None, typer.Option(help="Of the data; kept in the cache.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of the tokenizers package, or directory of a Hugging Face tokenizer; otherwise the model's."
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File of a chat template for conversations; otherwise the tokenizer's own.")
    ] = None,
    completions_only: Annotated[
        bool,
        typer.Option("--completions-only", help="Of conversations keep the targets of what the assistant says alone."),
    ] = False,
    special_tokens: Annotated[bool, typer.Option(help="Add the tokenizer's special tokens to every document.")] = True,
    field: Annotated[
        str,
        typer.Option(help="Of a record: its text, the list of its token ids, or that of a conversation's messages."),
    ] = "text",
    id_field: Annotated[str | None, typer.Option(help="Of a record: its key; its number if not given.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a saved data set that has some.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a sample; longer texts are cut.", min=1)] = 2048,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch at most, padding included.", min=1)] = 16384,
    k: Annotated[str, typer.Option(help="Entries a token; LEAST:MOST for topp.")] = "64",
    method: Annotated[str, typer.Option(help="topk, topp, sample or pps.")] = "topk",
    p: Annotated[float | None, typer.Option(help="Mass that topp keeps.")] = None,
    temperatures: Annotated[str, typer.Option(help="Temperatures at which a loss will be exact, as in 1,2.")] = "1",
    seed: Annotated[int, typer.Option(help="Of sample and pps.", min=0)] = 0,
    tier: Annotated[str, typer.Option(help="fixed, fastest, or compact, two thirds of its bytes.")] = "fixed",
    grid: Annotated[
        str, typer.Option(help="Log-probabilities are rounded to 2^-grid nats; auto, or 2 to 10.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model: auto (as its files), bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one if not given.")] = None,
    whole_logits: Annotated[
        bool, typer.Option("--whole-logits", help="Take the model's own logits, not its hidden states and its head.")
    ] = False,
    commit_every: Annotated[float, typer.Option(help="Seconds after which what is written is committed.")] = 60.0,
    ray: Annotated[bool, typer.Option("--ray", help="Run on a Ray cluster.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(help="auto, local, or host:port; if not given as Ray finds one, or a local one."),
    ] = None,
    ray_actors: Annotated[
        int | None, typer.Option(help="Teachers at once; if not given one for every GPU, or one.", min=1)
    ] = None,
) -> None:
    """Run a teacher over a data set into a cache. Run again, it goes on where it was.

    Under torchrun, or with --ray, every process takes its share of the samples. Ctrl-C commits what is written.
    """
    from kdfast.cache.job import Capture, Job, JobError, Source

    rank, world = _ranks()
    writable(out, "OUT", folder=True)
    try:
        with needs("kdfast cache build", _EXTRAS):
            if not ray and (ray_address is not None or ray_actors is not None):
                msg = "--ray-address and --ray-actors are for --ray"
                raise JobError(msg)
            if ray and "WORLD_SIZE" in os.environ:
                msg = "--ray starts its own processes: run it without torchrun"
                raise JobError(msg)
            job = Job(
                out=out.absolute(),
                source=Source([path.absolute() for path in data], field, id_field, split),
                capture=Capture(_entries(k), cast(Literal["topk"], method), p, _temperatures(temperatures), seed),
                model=None if model is None else model.absolute(),
                factory=factory,
                revision=revision,
                teacher_license=teacher_license,
                data_license=data_license,
                tokenizer=None if tokenizer is None else tokenizer.absolute(),
                special_tokens=special_tokens,
                chat_template=None if chat_template is None else chat_template.absolute(),
                completions_only=completions_only,
                length=length,
                batch_tokens=batch_tokens,
                tier=tier,
                grid=grid_from(grid),
                dtype=dtype,
                device=device,
                whole_logits=whole_logits,
                commit_every=commit_every,
            )
            if ray:
                filled, display = _on_cluster(job, ray_address, ray_actors)
            else:
                filled, display = _here(job, rank, world)
    except KeyboardInterrupt:
        _interrupted()
    except JobError as error:
        fail(str(error), EXIT_USAGE)
    except (CacheError, OSError) as error:
        fail(str(error), EXIT_FAULTY)
    if not filled.finished:
        _interrupted()
    display.finish(filled, rank, world)


def _here(job: Job, rank: int, world: int) -> tuple[Filled, _Display]:
    encoder, teacher = job.encoder(), job.teacher()
    writer = job.writer(teacher, encoder)
    with Interrupt(signal.SIGINT, signal.SIGTERM) as interrupt, _Display(shown=rank == 0) as display:
        samples = job.samples(encoder, rank, world)
        filled = job.fill(writer, teacher, samples, report=display.update, stop=lambda: interrupt.requested)
    return filled, display


def _on_cluster(job: Job, address: str | None, actors: int | None) -> tuple[Filled, _Display]:
    from kdfast.cache.job import cluster

    cluster.connect(address)
    try:
        with Interrupt(signal.SIGINT, signal.SIGTERM) as interrupt, _Display(shown=True) as display:
            filled = cluster.fill_on_cluster(
                job, actors=actors, report=display.update, stop=lambda: interrupt.requested
            )
    except cluster.ClusterError as error:
        fail(str(error), EXIT_FAULTY)
    return filled, display


def _interrupted() -> None:
    typer.echo(f"\ninterrupted; what was written is committed, go on with:\n  {_command()}")
    raise typer.Exit(EXIT_INTERRUPTED)


def _command() -> str:
    return shlex.join([*program(), *sys.argv[1:]])


def _ranks() -> tuple[int, int]:
    """This process among those of torchrun, and their number; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _entries(k: str) -> Any:
    from kdfast.cache.job import JobError

    try:
        bounds = [int(x) for x in k.split(":")]
    except ValueError:
        bounds = []
    if len(bounds) not in (1, 2):
        msg = f"--k must be a number, or LEAST:MOST for topp, got {k!r}"
        raise JobError(msg)
    return bounds[0] if len(bounds) == 1 else tuple(bounds)


def _temperatures(text: str) -> tuple[float, ...]:
    from kdfast.cache.job import JobError

    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        msg = f"--temperatures must be numbers with commas between them, as in 1,2; got {text!r}"
        raise JobError(msg) from None


class _Display:
    """A bar on a terminal; the last line in words everywhere."""

    def __init__(self, *, shown: bool) -> None:
        self._progress = Progress(
            BarColumn(), TextColumn("{task.description}", markup=False), console=console(), disable=not shown
        )
        self._task = self._progress.add_task("", total=1.0)
        self._started = time.monotonic()

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._progress.stop()

    def update(self, filled: Filled) -> None:
        seconds = time.monotonic() - self._started
        speed = filled.tokens / seconds
        left = filled.left
        total = filled.tokens + left if left is not None and left > 0 else max(1, filled.tokens)
        parts = [f"{filled.tokens:,} tokens", f"{speed:,.0f} tokens/s"]
        if filled.committed:
            parts.append(f"{filled.committed_bytes / filled.committed:.1f} bytes/token")
        if left is not None and speed > 0:
            parts.append(f"{_clock(max(0.0, left) / speed)} left")
        self._progress.update(self._task, completed=filled.tokens / total, description=", ".join(parts))

    def finish(self, filled: Filled, rank: int, world: int) -> None:
        """What the process did, when the writer is closed."""
        seconds = time.monotonic() - self._started
        who = f"process {rank} of {world}: " if world > 1 else ""
        typer.echo(
            f"{who}{counted(filled.samples, 'sample')} written, {were_there(filled.there)}; "
            f"{counted(filled.tokens, 'token')} in {seconds:.1f} s ({filled.tokens / seconds:,.0f} tokens/s)"
            + (f", {filled.committed_bytes / filled.tokens:.1f} bytes/token" if filled.tokens else "")
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
