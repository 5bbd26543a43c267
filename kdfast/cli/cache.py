"""``kdfast cache``: what a soft-target cache holds, whether it is right, and what to do where it is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kdfast.cache as store
from kdfast.cache.remote.files import is_url
from kdfast.cli.cache_build import build
from kdfast.cli.cache_parquet import export, import_
from kdfast.cli.cache_push import push
from kdfast.cli.ending import EXIT_FAULTY, EXIT_USAGE, fail, guarded, needs, writable
from kdfast.cli.terminal import console
from kdfast.reporting.words import counted, were_there

cache = typer.Typer(help="Fill a soft-target cache, look into it, and look after it.", no_args_is_help=True)
cache.command()(build)
cache.command()(export)
cache.command("import")(import_)
cache.command()(push)

_Path = Annotated[str, typer.Argument(help="directory of the cache, or a URL (s3://bucket/dir)", show_default=False)]
_Directory = Annotated[str, typer.Argument(help="directory of the cache", show_default=False)]
_LocalCache = Annotated[Path | None, typer.Option(help="of a URL, the folder for what is fetched")]
_SAMPLED_FOR_STATISTICS = 256


@cache.command()
def info(
    path: _Path,
    samples: Annotated[
        int | None,
        typer.Option(
            help=f"samples to read for the statistics: {_SAMPLED_FOR_STATISTICS}; of a URL, whose shards come whole, 0",
            min=0,
            show_default=False,
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the histograms into this .png or .svg file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON in place of tables")] = False,
    local_cache: _LocalCache = None,
) -> None:
    """Say what a cache holds: teacher, sizes, bytes per token, entropy and tail mass."""
    if plot is not None and plot.suffix not in (".png", ".svg"):
        fail(f"--plot takes a .png or .svg file, got {plot}", EXIT_USAGE)
    if plot is not None:
        writable(plot, "--plot")
    reader = guarded(store.Reader, path, local_cache=local_cache)
    shards = reader.shards()
    tokens, size = sum(s.tokens for s in shards), sum(s.bytes for s in shards)
    tiers = store.sizes(reader, _SAMPLED_FOR_STATISTICS if samples is None else samples)
    read = (0 if is_url(path) else _SAMPLED_FOR_STATISTICS) if samples is None else samples
    statistics = guarded(store.statistics, reader, read)
    if as_json:
        held = {
            "path": path,
            "metadata": reader.metadata,
            "vocab_size": reader.vocab_size,
            "temperatures": reader.temperatures,
            "shift": reader.shift,
            "samples": len(reader),
            "tokens": tokens,
            "bytes": size,
            "shards": [s._asdict() for s in shards],
            "indexed_shards": reader.indexed_shards,
            "tiers": {tier: one._asdict() for tier, one in tiers.items()},
            "statistics": None if statistics is None else _as_json(statistics),
        }
        typer.echo(json.dumps(held, ensure_ascii=False))
    else:
        _print_info(path, reader, tokens, size, tiers, statistics)
    if plot is not None:
        if not tiers:
            fail("--plot: no samples to draw", EXIT_FAULTY)
        with needs("kdfast cache info", {"matplotlib": "demo"}):
            from kdfast.cache.plot import write_plot
        teacher = reader.metadata.get("teacher")
        title = f"{Path(path).resolve().name}" + (f", teacher {teacher}" if teacher else "")
        looked = sum(one.samples for one in tiers.values())
        title += f": {counted(len(reader), 'sample')}, {counted(tokens, 'token')}, {size / 2**20:,.1f} MiB; "
        title += f"{counted(sum(one.tokens for one in tiers.values()), 'token')} of {counted(looked, 'sample')} shown"
        try:
            write_plot(plot, title, tiers, statistics)
        except OSError as error:
            fail(f"--plot {plot}: {error.strerror}", EXIT_FAULTY)


def _print_info(
    path: str,
    reader: store.Reader,
    tokens: int,
    size: int,
    tiers: Mapping[str, store.Size],
    statistics: store.Statistics | None,
) -> None:
    terminal, shards = console(), reader.shards()
    table = Table(title=path, show_header=False, title_justify="left")
    rows: list[tuple[str, str]] = [(name, str(value)) for name, value in reader.metadata.items()]
    rows += [
        ("vocabulary", f"{reader.vocab_size:,}"),
        ("temperatures", ", ".join(f"{t:g}" for t in reader.temperatures)),
        ("row i is about", "token i + 1" if reader.shift else "item i"),
        ("samples", f"{len(reader):,}"),
        ("tokens", f"{tokens:,}"),
        ("shards", f"{len(shards)} ({sum(not s.finished for s in shards)} unfinished)"),
        ("index", _index_of(path, reader, len(shards))),
        ("size", f"{size / 2**20:,.1f} MiB" + (f", {size / tokens:.1f} bytes a token" if tokens else "")),
    ]
    for tier, one in tiers.items():
        if one.tokens:
            said = f"{one.bytes / one.tokens:.1f} bytes a token, without indices, in {counted(one.samples, 'sample')}"
            rows.append((f"tier {tier}", said))
    for row in rows:
        table.add_row(*row)
    terminal.print(table)
    if statistics is not None:
        terminal.print(
            f"Of {counted(statistics.tokens, 'token')} in {counted(statistics.samples, 'sample')}: "
            f"{statistics.kept:.1f} entries a token, "
            f"entropy of what is kept {statistics.entropy:.3f} nats, tail mass {statistics.tail:.4f} (means at T = 1)"
        )
        for name, histogram in (("entropy, nats", statistics.entropies), ("log10 of tail mass", statistics.tails)):
            _print_histogram(terminal, name, histogram)


def _index_of(path: str, reader: store.Reader, shards: int) -> str:
    """How far the index of the directory goes, and what it takes; the bytes of shards do not hold it."""
    if is_url(path):
        return "not there: the indices of the shards are read"
    size = sum(file.stat().st_size for file in Path(path).glob("*.index"))
    return f"has the samples of {reader.indexed_shards} of {shards} shards, {size / 2**20:,.1f} MiB"


def _as_json(statistics: store.Statistics) -> dict[str, Any]:
    return statistics._asdict() | {name: getattr(statistics, name)._asdict() for name in ("entropies", "tails")}


@cache.command("list")
def list_(
    path: _Path,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a line")] = False,
    local_cache: _LocalCache = None,
) -> None:
    """Print the keys, with tokens, entries a token, method and tier of each, in the order of the disk."""
    reader = guarded(store.Reader, path, local_cache=local_cache)
    keys = guarded(reader.keys)
    faulty = False
    while (key := guarded(next, keys, None)) is not None:
        try:
            sample = reader.describe(key)
        except store.CacheError as error:  # of this key alone
            typer.echo(str(error), err=True)
            faulty = True
            continue
        if as_json:
            typer.echo(json.dumps({"key": key} | sample._asdict(), ensure_ascii=False))
        else:
            typer.echo("\t".join([key, *map(str, sample)]))
    if faulty:
        raise typer.Exit(EXIT_FAULTY)


@cache.command()
def verify(path: _Path, local_cache: _LocalCache = None) -> None:
    """Check every checksum and every value. Exit code 1 where something is wrong. Of a URL every shard is fetched."""
    found = guarded(store.verify, path, local_cache=local_cache)
    for fault in found.faults:
        typer.echo(str(fault), err=True)
    typer.echo(
        f"{counted(found.samples, 'sample')}, {counted(found.tokens, 'token')}, {found.bytes / 2**20:,.1f} MiB: "
        + (counted(len(found.faults), "fault") if found.faults else "all right")
    )
    if found.faults:
        raise typer.Exit(EXIT_FAULTY)


@cache.command()
def repair(path: _Directory) -> None:
    """Save what can be saved of damaged or unfinished files. Exit code 1 where something was lost."""
    done = guarded(store.repair, path)
    for line in done.done:
        typer.echo(line)
    for name in done.in_use:
        typer.echo(f"{name}: its writer is alive, left as it is")
    for fault in done.lost:
        typer.echo(f"lost: {fault}", err=True)
    if not (done.done or done.lost or done.in_use):
        typer.echo("nothing to repair")
    if done.lost:
        raise typer.Exit(EXIT_FAULTY)


@cache.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="directories of the caches to copy from", show_default=False)],
    into: Annotated[str, typer.Option(help="directory of the cache to copy to", show_default=False)],
    on_duplicate: Annotated[
        str, typer.Option(help="of a key that is there with the same token ids and other targets: error, or keep it")
    ] = "error",
) -> None:
    """Copy the samples of some caches into another, byte for byte."""
    writable(into, "--into", folder=True)
    merged = guarded(store.merge, sources, into, on_duplicate=on_duplicate)
    typer.echo(f"{counted(merged.samples, 'sample')} copied, {were_there(merged.there_already)}")


def _print_histogram(terminal: Console, name: str, histogram: store.Histogram) -> None:
    """One line for four bins: their lower edge, a bar, their tokens and share."""
    counts = [sum(histogram.counts[i : i + 4]) for i in range(0, len(histogram.counts), 4)]
    most, total = max(counts), sum(counts)
    terminal.print(f"\n{name}: from, tokens, share")
    for edge, n in zip(histogram.edges[::4], counts, strict=False):
        terminal.print(f"{edge:8.2f} {'█' * round(40 * n / most):<40} {n:>12,} {n / total:6.1%}")
