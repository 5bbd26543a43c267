"""``kdfast cache export`` and ``kdfast cache import``: soft targets as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from kdfast.cache import CacheError, Reader
from kdfast.cache.duplicates import OnDuplicate
from kdfast.cache.grid import grid_from
from kdfast.cache.writer import Tier
from kdfast.cli.ending import EXIT_FAULTY, EXIT_USAGE, fail, guarded, needs, writable
from kdfast.reporting.words import counted, were_there


def export(
    cache: Annotated[
        str, typer.Argument(help="directory of the cache, or a URL (s3://bucket/dir)", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(help="Parquet file to write", show_default=False)],
    local_cache: Annotated[Path | None, typer.Option(help="of a URL, the folder for what is fetched")] = None,
) -> None:
    """Write a cache as a Parquet file, one row a sample. Of a URL every shard is fetched."""
    writable(file, "FILE")
    reader = guarded(Reader, cache, local_cache=local_cache)
    try:
        with needs("kdfast cache export", {"pyarrow": "cache"}):
            from kdfast.cache.parquet import export_parquet

            done = export_parquet(reader, file)
    except (CacheError, OSError) as error:
        fail(str(error), EXIT_FAULTY)
    typer.echo(
        f"{counted(done.samples, 'sample')}, {counted(done.tokens, 'token')}, {file.stat().st_size / 2**20:,.1f} MiB"
    )


def import_(
    file: Annotated[Path, typer.Argument(help="Parquet file to read", show_default=False)],
    out: Annotated[Path, typer.Argument(help="directory of the cache", show_default=False)],
    *,
    vocab_size: Annotated[int | None, typer.Option(help="V, where the file does not say it.", min=1)] = None,
    key_column: Annotated[str, typer.Option(help="Keys; the number of the row where there is none.")] = "key",
    ids_column: Annotated[str, typer.Option(help="By token, the ids of its entries.")] = "ids",
    logprobs_column: Annotated[str, typer.Option(help="By token, their log-probabilities.")] = "logprobs",
    token_ids_column: Annotated[
        str, typer.Option(help="Token ids of the sample, with which readers check their own.")
    ] = "token_ids",
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Divide the probabilities of each token by their sum.")
    ] = False,
    shift: Annotated[
        int | None, typer.Option(help="1: row i is about token i + 1; 0: about token i.", min=0, max=1)
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Kept in the cache.")] = None,
    revision: Annotated[str | None, typer.Option(help="Kept in the cache.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Its fingerprint; kept in the cache.")] = None,
    teacher_license: Annotated[str | None, typer.Option(help="Kept in the cache.")] = None,
    data_license: Annotated[str | None, typer.Option(help="Kept in the cache.")] = None,
    tier: Annotated[str, typer.Option(help="fixed, fastest, or compact, two thirds of its bytes.")] = "fixed",
    grid: Annotated[
        str, typer.Option(help="Log-probabilities are rounded to 2^-grid nats; auto, or 2 to 10.")
    ] = "auto",
    on_duplicate: Annotated[
        str, typer.Option(help="Of a key that is there with the same token ids and other targets: error, or keep it.")
    ] = "error",
) -> None:
    """Write a Parquet file of ids and log-probabilities, such as vLLM's, into a cache."""
    from kdfast.cache.job import JobError

    writable(out, "OUT", folder=True)
    named = {
        "teacher": teacher,
        "revision": revision,
        "tokenizer": tokenizer,
        "teacher_license": teacher_license,
        "data_license": data_license,
    }
    try:
        with needs("kdfast cache import", {"pyarrow": "cache"}):
            from kdfast.cache.parquet import Columns, import_parquet

            done = import_parquet(
                file,
                out,
                vocab_size=vocab_size,
                columns=Columns(key_column, ids_column, logprobs_column, token_ids_column),
                renormalise=renormalise,
                shift=shift,
                metadata={name: value for name, value in named.items() if value is not None},
                tier=cast(Tier, tier),
                grid=grid_from(grid),
                on_duplicate=cast(OnDuplicate, on_duplicate),
            )
    except JobError as error:
        fail(str(error), EXIT_USAGE)
    except (CacheError, OSError) as error:
        fail(str(error), EXIT_FAULTY)
    typer.echo(f"{counted(done.samples, 'sample')} written, {were_there(done.there)}; {counted(done.tokens, 'token')}")
