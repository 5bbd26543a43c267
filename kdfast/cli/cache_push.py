"""``kdfast cache push``: a cache to where others can read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import kdfast.cache as store
from kdfast.cli.cache_errors import EXIT_FAULTY, EXIT_USAGE, fail, needs
from kdfast.reporting.words import counted, were_there


def push(
    cache: Annotated[Path, typer.Argument(help="directory of the cache", show_default=False)],
    url: Annotated[
        str, typer.Argument(help="directory to send it to, as fsspec takes it: s3://bucket/dir", show_default=False)
    ],
) -> None:
    """Send the finished shards of a cache elsewhere; what is there already is not sent again."""
    try:
        with needs("kdfast cache push", {"fsspec": "remote"}):
            done = store.push(cache, url)
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # fsspec says which package a kind of URL needs
        fail(str(error), EXIT_USAGE)
    except (ValueError, OSError) as error:
        fail(str(error), EXIT_FAULTY)
    typer.echo(
        f"{counted(done.sent, 'shard')} sent, {done.sent_bytes / 2**20:,.1f} MiB; {were_there(done.there_already)}; "
        f"{counted(done.samples, 'sample')}"
    )
