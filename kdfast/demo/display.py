"""What the terminal shows: a live line for each student, or sparse lines where the output is not a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kdfast.reporting.words import counted

LINES_PER_TASK = 5  # where the output is not a terminal
SMOOTHED_STEPS = 20


class Display:
    """Progress of one run; a context manager, because a live line must be put away whatever happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._total: int | None = 0
        self._printed = 0

    def __enter__(self) -> Display:
        """Starts the live lines on a terminal."""
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description:<28}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}", markup=False),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the lines as they stand."""
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Prints a line, brackets and all."""
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def task(self, title: str, total: int | None) -> None:
        """Begins a counted piece of work; None: nobody knows how much there is."""
        self._title, self._total, self._printed = title, total, 0
        if self._live is not None:
            self._task = self._live.add_task(title, total=total, detail="", count=self._count(0))

    def advance(self, done: int, detail: str = "") -> None:
        """Reports how much of the current piece is done; `detail` is shown beside it."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=done, detail=detail, count=self._count(done))
        elif self._live is None:
            # Of an unknown number a line each time it has doubled.
            share = done.bit_length() if self._total is None else done * LINES_PER_TASK // max(1, self._total)
            if share > self._printed:
                self._printed = share
                self.note(f"{self._title}: {self._count(done).strip()} {detail}".rstrip())

    def _count(self, done: int) -> str:
        return f"{done:>5}" if self._total is None else f"{done:>5}/{self._total}"


def terms_text(history: dict[str, list[float]]) -> str:
    """Returns both loss terms, in nats, averaged over the last steps; a missing one is a dash."""
    texts = []
    for name in ("soft", "hard"):
        values = history[name][-SMOOTHED_STEPS:]
        texts.append(f"{name} {sum(values) / len(values):.3f}" if values else f"{name}   -  ")
    return "  ".join(texts)


def results_table(results: dict[str, Any]) -> Table:
    """Returns the final table, one row for the teacher and one for each way of training."""
    several = len(results["settings"]["seeds"]) > 1
    title = "Held-out text" + (" (quick run: too short to mean anything)" if results["quick"] else "")
    seeds = counted(len(results["settings"]["seeds"]), "seed")
    caption = (
        f"perplexity, agreement with the teacher: mean ± standard deviation over {seeds}" if several else "one seed"
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in ("para-\nmeters", "perplexity", "agree-\nment, %", "ECE", "tokens\nper s", "loss, %\nof step"):
        table.add_column(name, justify="right", no_wrap=True)
    teacher = results["teacher"]
    score = teacher["evaluation"]
    table.add_row(
        "teacher",
        f"{teacher['parameters'] / 1e6:.2f} M",
        f"{score['perplexity']:.1f}",
        "",
        f"{score['ece']:.3f}",
        f"{teacher['speed']['tokens_per_second']:,.0f}",
        "",
    )
    for row in results["summary"]:
        table.add_row(
            row["title"].removeprefix("distilled, "),
            f"{results['student']['parameters'] / 1e6:.2f} M",
            spread(row["perplexity"], 1, several),
            spread(row["agreement"], 1, several, scale=100),
            f"{row['ece']['mean']:.3f}",
            f"{results['student']['speed']['tokens_per_second']:,.0f}",
            f"{100 * row['loss_share']['mean']:.0f}",
        )
    return table


def cache_text(results: dict[str, Any]) -> str:
    """Returns size and time of the cache and, where it was measured, what it lost against all logits."""
    cache, several = results["cache"], len(results["settings"]["seeds"]) > 1
    parts = [f"{cache['bytes'] / 1e6:.1f} MB, {cache['bytes_per_token']:.1f} bytes/token"]
    if cache["written"]:
        parts.append(f"written in {cache['written']['seconds']:.1f} s")
    else:
        parts.append("from an earlier run")
    parts.append(f"the teacher in the loop: {cache['in_loop_seconds']:.0f} s for each student")
    lost = results["comparison"]
    if lost:
        deviation = f" ± {lost['nats']['std']:.4f}" if several else ""
        parts.append(f"cached less online: {lost['nats']['mean']:+.4f}{deviation} nats per token")
    return f"teacher's targets on disk: {'; '.join(parts)}"


def spread(value: dict[str, float], digits: int, several: bool, scale: float = 1.0) -> str:
    """Formats a mean, with its standard deviation where there are several seeds."""
    mean = f"{value['mean'] * scale:.{digits}f}"
    return f"{mean} ± {value['std'] * scale:.{digits}f}" if several else mean
