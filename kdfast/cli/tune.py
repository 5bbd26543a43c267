"""`kdfast tune`: search a temperature, an alpha or any loss weight."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli.cache_errors import EXIT_INTERRUPTED, EXIT_USAGE, fail
from kdfast.integrations.factory import FactoryError, find

DEFAULT_OUT = Path("kdfast-tune")
QUICK = {"trials": 4, "seeds": 2, "confirm": 2, "finalists": 2}
COUNTS = {"trials": 20, "seeds": 3, "confirm": 5, "finalists": 3}


def _counts(name: str) -> str:
    return f"{COUNTS[name]}; {QUICK[name]} with --quick"


def tune(
    *,
    factory: Annotated[
        str | None,
        typer.Option(
            help="module:function(settings, seed, report), which trains a student and returns its metric on validation "
            "data; `report(step, metric)` may be called on the way. The demonstration's student if not given.",
        ),
    ] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="name=low:high, with :log or :int; name=a,b,c; or name=value, which is not searched. May be repeated.",
            show_default="of the demonstration temperature=1:8:log, alpha=0:1",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Settings to be beaten, name=value,name=value; the demonstration's own for it.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What the function returns, with its unit.")] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="More of the metric is better.")] = False,
    trials: Annotated[int | None, typer.Option(help="Settings tried.", min=1, show_default=_counts("trials"))] = None,
    seed: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    seeds: Annotated[
        int | None, typer.Option(help="Paired seeds of each trial.", min=1, show_default=_counts("seeds"))
    ] = None,
    confirm: Annotated[
        int | None, typer.Option(help="Fresh seeds of the finalists.", min=1, show_default=_counts("confirm"))
    ] = None,
    finalists: Annotated[
        int | None, typer.Option(help="Trials run with fresh seeds.", min=1, show_default=_counts("finalists"))
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same path in a minute on the demonstration; figures mean nothing.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice if not given.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder of tune.html, tune.json and the study.")] = DEFAULT_OUT,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the folder's search, or add trials.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON in place of the tables.")] = False,
) -> None:
    """Search settings with paired seeds, and recommend some with their uncertainty.

    Every trial runs with the same seeds; those that do badly are dropped early. The best ones and the baseline run
    again with fresh seeds, which decide. Ctrl-C stops; --resume goes on.
    """
    import jinja2  # noqa: F401 - what the page needs only at the end is looked for before the models run
    import matplotlib  # noqa: F401
    import torch

    from kdfast import tuning
    from kdfast.cli.interrupt import Interrupt
    from kdfast.cli.terminal import again, console
    from kdfast.demo.display import Display
    from kdfast.demo.settings import DemoError
    from kdfast.tuning.page import finalists_table, trials_table

    terminal = console(stderr=as_json)
    if threads is not None:
        torch.set_num_threads(threads)
    given = {"trials": trials, "seeds": seeds, "confirm": confirm, "finalists": finalists}
    counts = {name: given[name] or (QUICK if quick else COUNTS)[name] for name in COUNTS}
    try:
        with Interrupt() as interrupt, Display(terminal) as display:
            asked = _Asked(factory, space, baseline, metric, quick=quick, display=display)
            figures = tuning.tune(
                asked.objective,
                asked.space,
                out=out,
                display=display,
                name=factory or "the demonstration",
                metric=asked.metric,
                maximize=maximize,
                baseline=asked.baseline,
                trial_count=counts["trials"],
                seed=seed,
                seeds=counts["seeds"],
                confirm_seeds=counts["confirm"],
                finalists=counts["finalists"],
                quick=quick,
                resume=resume,
                interrupted=lambda: interrupt.requested,
                prepare=asked.prepare,
            )
    except tuning.Interrupted:
        words = again(
            "tune",
            {
                "--factory": factory,
                "--space": space,
                "--baseline": baseline,
                "--metric": metric,
                "--maximize": maximize,
                **{f"--{name}": value for name, value in given.items()},
                "--seed": seed or None,
                "--quick": quick,
                "--threads": threads,
                "--out": None if out == DEFAULT_OUT else out,
            },
        )
        terminal.print(f"\ninterrupted; go on with:\n  {words} --resume", soft_wrap=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except ModuleNotFoundError as error:  # kdfast's own are imported by now
        if factory is None:
            raise
        fail(f"--factory {factory}: it needs the package {error.name!r}, which is not installed", EXIT_USAGE)
    except (tuning.TuneError, FactoryError, DemoError, FileNotFoundError) as error:
        fail(str(error), EXIT_USAGE)
    if as_json:
        typer.echo((out / tuning.RESULTS_NAME).read_text(encoding="utf-8"))
        return
    terminal.print(trials_table(figures))
    terminal.print(finalists_table(figures))
    terminal.print(figures["sentence"], soft_wrap=True)
    for edge in figures["at_the_edge"]:
        terminal.print(f"The search's best {edge}: a wider one may hold better.", soft_wrap=True)
    terminal.print(
        f"{figures['seconds']:.0f} s; report: {out / tuning.PAGE_NAME}, figures: {out / tuning.RESULTS_NAME}",
        soft_wrap=True,
    )


class _Asked:
    """What is searched: the user's function or the demonstration, checked before anything is run."""

    def __init__(
        self,
        factory: str | None,
        space: list[str] | None,
        baseline: str | None,
        metric: str | None,
        *,
        quick: bool,
        display: Any,
    ) -> None:
        from kdfast import tuning

        self.baseline = None if baseline is None else tuning.parse_settings(baseline)
        if factory is not None:
            if not space:
                msg = "--factory needs --space: what may be chosen, as --space temperature=1:8:log"
                raise tuning.TuneError(msg)
            self.space = tuning.parse_space(space)
            self.objective: Any = _function(factory)
            self.prepare: Any = lambda: None
            self.metric = metric or "metric"
            return
        from kdfast.tuning import demo

        self.space = tuning.parse_space(space or demo.SPACE)
        if self.baseline is None:
            self.baseline = {name: demo.DEFAULTS.get(name) for name in self.space.searched}
        length = demo.LENGTH.shrunk() if quick else demo.LENGTH
        for settings in [*self.space.probes(), self.space.fixed | self.baseline]:
            demo.trained_by(settings, length)
        self.metric = demo.METRIC
        self.objective = demo.DemoObjective(length, display)
        self.prepare = self.objective.prepare


def _function(factory: str) -> Any:
    function = find(factory)
    try:
        inspect.signature(function).bind({}, 0, None)
    except TypeError as error:
        msg = f"--factory {factory}: it must take (settings, seed, report): {error}"
        raise FactoryError(msg) from error
    return function
