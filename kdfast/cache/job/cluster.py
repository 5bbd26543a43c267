"""A job on a Ray cluster: Ray Data reads and tokenises, actors with a teacher and a writer each take the samples.

Each actor goes through all that it is given in one call of the same ``fill`` as a process of torchrun, and closes its
writer itself: functions that Ray Data maps over batches are not told when the last batch was.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from kdfast.cache.error import CacheError, JobError
from kdfast.cache.job.fill import Filled
from kdfast.cache.job.samples import Sample
from kdfast.cache.job.spec import Job

#: Samples of a table, and bytes of a block that goes to an actor: some batches, not the 128 MiB that Ray would gather.
_SAMPLES_AT_ONCE = 32
_BLOCK_BYTES = 1 << 20
#: Blocks that wait in an actor.
_WAITING = 4
_TICK = 0.2  # seconds


class ClusterError(RuntimeError):
    """An actor is gone, or code that is not of the job raised; the text is Ray's, with the traceback of its process."""


def connect(address: str | None) -> None:
    """Connects to a cluster, where this process is not connected already.

    Args:
        address: "auto", "local" for one of this machine alone, host:port, or None: as Ray finds one, or a local one.

    Raises:
        JobError: there is none at this address.
    """
    if ray.is_initialized():
        return
    try:
        # what other processes print stands in Ray's logs; what goes wrong there comes back as an error
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        msg = f"no Ray cluster at {address or 'the default address'}: {error}"
        raise JobError(msg) from error


def fill_on_cluster(
    job: Job,
    *,
    actors: int | None = None,
    report: Callable[[Filled], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Filled:
    """Runs a job on the cluster that this process is connected to; every node must see its paths under their names.

    An actor has a CPU, and a GPU where the cluster has some and ``job.device`` does not say "cpu"; one CPU more at
    least reads.

    Args:
        job: what is to be done.
        actors: their number; None: one for every GPU, one where there is none.
        report: called several times a second with the sum of all.
        stop: asked as often; True ends the job with what is written.

    Raises:
        JobError, CacheError, OSError, ModuleNotFoundError: of whatever process met it first; the others have closed
            their writers.
        ClusterError: see there.
    """
    resources = ray.cluster_resources()
    gpus = 0 if (job.device or "").startswith("cpu") else int(resources.get("GPU", 0))
    count = max(1, gpus) if actors is None else actors
    cpus = int(resources.get("CPU", 0))
    if count >= cpus or (gpus and count > gpus):
        have = f"{cpus} CPUs" + (f" and {gpus} GPUs" if gpus else "")
        msg = f"{count} actors need a CPU each{', a GPU each' if gpus else ''} and one CPU for reading, the cluster has"
        msg += f" {have}: pass another --ray-actors"
        raise JobError(msg)
    splits = _tables(job, parts=cpus - count).streaming_split(count, equal=False)
    actor = ray.remote(_Filler).options(
        num_cpus=1, num_gpus=1 if gpus else 0, max_concurrency=2, max_restarts=0, scheduling_strategy="SPREAD"
    )
    fillers = [actor.remote(job) for _ in splits]
    try:
        return _watched(
            fillers, [filler.run.remote(one) for filler, one in zip(fillers, splits, strict=True)], report, stop
        )
    finally:
        for filler in fillers:
            ray.kill(filler)


def _watched(fillers: list[Any], runs: list[Any], report: Callable[[Filled], None], stop: Callable[[], bool]) -> Filled:
    """The sum of the runs, when all have ended; the first that fails stops the others."""
    waiting, asked, failure = list(runs), False, None
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_TICK)
        for run in done:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                failure = failure or error
        if not asked and (failure is not None or stop()):
            asked = True
            for filler in fillers:
                filler.stop.remote()
        if failure is None:
            try:
                parts = ray.get([filler.progress.remote() for filler in fillers], timeout=_TICK)
            except ray.exceptions.GetTimeoutError:  # not all have started
                continue
            except ray.exceptions.RayError as error:  # gone, which its run has not told yet
                failure = error
            else:
                report(Filled.together(parts))
    if failure is not None:
        raise _cause(failure) from failure
    return Filled.together(ray.get(runs))


def _cause(error: ray.exceptions.RayError) -> Exception:
    """What was raised in the other process, where it is an error of the job's own."""
    cause = getattr(error, "cause", None)
    ours = (JobError, CacheError, OSError, ModuleNotFoundError)
    return cause if isinstance(cause, ours) else ClusterError(str(error))


def _tables(job: Job, parts: int) -> ray.data.Dataset:
    """The samples as tables of key, token_ids and read; the last of a part that failed has its error."""

    def read(batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        (part,) = batch["id"].tolist()
        group: list[Sample] = []
        try:
            for sample in job.samples(job.encoder(), part, parts):
                group.append(sample)
                if len(group) == _SAMPLES_AT_ONCE:
                    yield _table(group)
                    group = []
            yield _table(group)
        except (JobError, CacheError, OSError) as error:  # which Ray Data would retry, and add its own words to
            yield _table(group, pickle.dumps(error))

    tables = ray.data.range(parts, override_num_blocks=parts).map_batches(read, batch_size=1)
    tables.context.target_max_block_size = _BLOCK_BYTES
    tables.context.enable_progress_bars = False
    return tables


def _table(samples: list[Sample], error: bytes | None = None) -> pa.Table:
    if error is not None:
        samples = [*samples, Sample("", np.empty(0, np.int64), 0.0)]
    return pa.table(
        {
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "token_ids": pa.array([sample.token_ids for sample in samples], pa.large_list(pa.int64())),
            "read": pa.array([sample.read for sample in samples], pa.float64()),
            "kept": pa.array([sample.kept for sample in samples], pa.list_(pa.bool_())),
            "error": pa.array(
                [None] * len(samples) if error is None else [None] * (len(samples) - 1) + [error], pa.binary()
            ),
        }
    )


class _Filler:
    """A teacher and a writer in a process of their own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._filled = Filled()
        self._stopped = threading.Event()

    def run(self, tables: ray.data.DataIterator) -> Filled:
        encoder, teacher = self._job.encoder(), self._job.teacher()
        filled = self._job.fill(
            self._job.writer(teacher, encoder),
            teacher,
            self._samples(tables),
            report=self._report,
            stop=self._stopped.is_set,
        )
        filled.finished = filled.finished and not self._stopped.is_set()
        return filled

    def stop(self) -> None:
        self._stopped.set()

    def progress(self) -> Filled:
        return self._filled

    def _report(self, filled: Filled) -> None:
        self._filled = dataclasses.replace(filled)

    def _samples(self, tables: ray.data.DataIterator) -> Iterator[Sample]:
        """Until the last one or until stopped: where another actor has failed, the next table may never come."""
        held: queue.Queue[pa.Table | Exception | None] = queue.Queue(_WAITING)

        def take() -> None:
            try:
                for table in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
                    held.put(table)
                held.put(None)
            except Exception as error:
                held.put(error)

        threading.Thread(target=take, daemon=True).start()
        while not self._stopped.is_set():
            try:
                table = held.get(timeout=_TICK)
            except queue.Empty:
                continue
            if table is None:
                return
            if isinstance(table, Exception):
                raise table
            yield from _samples_of(table)


def _samples_of(table: pa.Table) -> Iterator[Sample]:
    columns = (table[name].to_pylist() for name in ("key", "read", "kept", "error"))
    for key, read, kept, error, ids in zip(*columns, table["token_ids"], strict=True):
        if error is not None:
            raise pickle.loads(error)
        yield Sample(key, np.array(ids.values, dtype=np.int64), read, None if kept is None else np.array(kept, bool))
