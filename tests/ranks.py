"""Checks that run on several gloo processes, and what they are compared with."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import os
import pickle
import sys
import types

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import INTERPRETING

TOLERANCE = {torch.float32: (2e-5, 4e-7), torch.bfloat16: (1e-2, 1e-6), torch.float16: (2e-3, 1e-6)}


def compare(name, got, want, dtype):
    rtol, atol = TOLERANCE[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=rtol, atol=max(atol, 1e-6 if b.dim() == 0 else 0), msg=lambda m: f"{name}: {m}"
        )


def named_by(checks):
    """The files of the modules that checks are in, by the names that pytest has given them."""
    functions = [check.func if isinstance(check, functools.partial) else check for check in checks]
    return {f.__module__: sys.modules[f.__module__].__file__ for f in functions}


def load(name, file):
    """Imports a test's file in a process that pytest has not started, with the package that its name says it is in."""
    for package in (name.rsplit(".", k)[0] for k in range(name.count("."), 0, -1)):
        sys.modules.setdefault(package, types.ModuleType(package))
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def worker(rank, world, store, files, checks, interpreting):
    for name, file in files.items():
        if name not in sys.modules:
            load(name, file)
    checks = pickle.loads(checks)
    if interpreting:
        import interpreter

        interpreter.mend()
    # As torchrun has it, for libraries that look at it; the group is there already when they do.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=datetime.timedelta(minutes=5)
    )
    try:
        for check in checks:
            check(rank, world)
        dist.barrier()  # gloo's threads abort a process whose peer has gone already
    finally:
        dist.destroy_process_group()
    # What passed ends here: where a device mesh still holds the group, gloo's threads outlive it, and now and then one
    # of them meets the interpreter's end and aborts.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(checks, world, tmp_path):
    """Every check, ``(rank, world)``, on every one of ``world`` processes."""
    checks = list(checks)
    args = (world, str(tmp_path / "store"), named_by(checks), pickle.dumps(checks), INTERPRETING)
    mp.spawn(worker, args=args, nprocs=world)


def cuts_of(columns, world, *, uneven):
    """Where shards begin, and the end: equally wide, or of one column and all but the last of them narrow."""
    cuts = [columns * k // world for k in range(world + 1)]
    if uneven:
        cuts[1:world] = [21 + k for k in range(world - 1)]
    return cuts
