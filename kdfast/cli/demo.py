"""`kdfast demo`: distil a small GPT on the standard library's own source, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli.cache_errors import EXIT_INTERRUPTED, EXIT_USAGE, fail

DEFAULT_OUT = Path("kdfast-report")


def demo(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path in under a minute; figures mean nothing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="First seed: initial weights and order of the batches.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="Number of seeds, counted up from the first.", min=1)] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of all distilled students.", show_default="1.0")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the distillation term, 0 to 1.", show_default="0.9")
    ] = None,
    divergence: Annotated[str | None, typer.Option(help="Divergence of the third student.", show_default="jsd")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each student.", show_default="800; 60 with --quick")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of text the students train on.", show_default="204800; 24576 with --quick"),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Distil from all of the teacher's logits, in memory; no cache.")
    ] = False,
    compare: Annotated[
        bool, typer.Option(help="Train one student by all logits as well, to measure the cache against it.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if not given.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder of report, results, cache and checkpoint.")] = DEFAULT_OUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an interrupted run, not its cache.")] = False,
) -> None:
    """Distil a small GPT on Python's own source code, and write a report.

    Students of one shape take the same steps on the same text: one learns from the labels, the others from a teacher as
    well, which runs once and leaves its soft targets on disk. One more learns from all of its logits, and says what the
    cache costs. Ctrl-C leaves a checkpoint.
    """
    import jinja2  # noqa: F401 - what the run needs only at its end is looked for before it starts
    import matplotlib  # noqa: F401
    import torch

    from kdfast.cli.interrupt import Interrupt
    from kdfast.cli.terminal import again, console
    from kdfast.demo.checkpoint import Interrupted
    from kdfast.demo.display import Display, cache_text, results_table
    from kdfast.demo.results import verdict
    from kdfast.demo.run import REPORT_NAME, RESULTS_NAME, run_demo
    from kdfast.demo.settings import DemoError, DemoSettings

    terminal = console()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if resume and restart:
            msg = "--resume and --restart contradict each other: give one of them"
            raise DemoError(msg)
        base = DemoSettings().shrunk() if quick else DemoSettings()
        settings = base.changed(
            seeds=tuple(range(seed, seed + seeds)),
            temperature=temperature,
            alpha=alpha,
            divergence=divergence,
            steps=steps,
            train_sequences=None if tokens is None else tokens // base.context,
            online=online,
            compare=compare and not online,
        )
        with Interrupt() as interrupt, Display(terminal) as display:
            results = run_demo(
                settings, out, display, resume=resume, restart=restart, interrupted=lambda: interrupt.requested
            )
    except Interrupted:
        given = {
            "--quick": quick,
            "--seed": seed,
            "--seeds": seeds,
            "--temperature": temperature,
            "--alpha": alpha,
            "--divergence": divergence,
            "--steps": steps,
            "--tokens": tokens,
            "--online": online,
            "--no-compare": not compare,
            "--threads": threads,
            "--out": None if out == DEFAULT_OUT else out,
        }
        terminal.print(f"\ninterrupted; go on with:\n  {again('demo', given)} --resume", soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (DemoError, FileNotFoundError) as error:
        fail(str(error), EXIT_USAGE)
    terminal.print(results_table(results))
    terminal.print(verdict(results), soft_wrap=True)
    if results["cache"]:
        terminal.print(cache_text(results), soft_wrap=True)
    comparison = results["loss_comparison"]
    terminal.print(
        f"Forward KL and cross-entropy with gradient, one batch: {comparison['kdfast_ms']:.1f} ms in kdfast, "
        f"{comparison['eager_ms']:.1f} ms in plain PyTorch lines.",
        soft_wrap=True,
    )
    terminal.print(
        f"{results['seconds']:.0f} s in all; report: {out / REPORT_NAME}, figures: {out / RESULTS_NAME}", soft_wrap=True
    )
