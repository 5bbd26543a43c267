"""Run by test_cache_reliability.py under ``system_calls.c``: writes a small cache while calls are recorded, killed or
made to fail, and looks at what is left. Exits with 0, or says what was wrong.

    crash_runner.py trace DIR TIER            record one run
    crash_runner.py interrupt DIR TIER MODE   the same run once for every call, interrupted there; prints how many
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import torch

from kdfast import CacheError, SparseTargets, cache

MODES = ["nothing", "kill before", "kill after", "kill halfway", "no space", "input/output error", "short write"]
COMMITS = [["a", "b"], ["c"], [], ["d", "e", "f"]]
V, K = 1000, 8


def targets_of(key):
    """The targets of a key, always the same."""
    generator = torch.Generator().manual_seed(ord(key))
    tokens = 20 + 7 * (ord(key) - ord("a"))
    ids = torch.rand((tokens, V), generator=generator).argsort(-1)[:, :K].int()
    logprobs = -torch.rand((tokens, K), generator=generator).cumsum(-1) - 2
    return SparseTargets(ids, logprobs, vocab_size=V)


def tokens_of(key):
    return torch.arange(len(targets_of(key).ids)) + ord(key)


def run(path, committed, tier="fixed"):
    """The job: ``committed`` is called with the keys that are durable from then on."""
    done = []
    with cache.Writer(path, vocab_size=V, temperatures=(1.0,), tier=tier, shard_bytes=3000, threads=1) as writer:
        for keys in COMMITS:
            for key in keys:
                writer.write(key, TARGETS[key], TOKENS[key])
            writer.commit()
            done += keys
            committed(done)


TARGETS = {key: targets_of(key) for keys in COMMITS for key in keys}
TOKENS = {key: tokens_of(key) for key in TARGETS}


def check(path, durable, expected, *, complete=False):
    """What is durable is there and right, and so is all else that is there."""
    try:
        reader = cache.Reader(path)
    except CacheError as error:
        if durable or error.code != "missing":
            raise
        return
    for key in durable:
        assert key in reader, f"{key} was committed and is gone"
    found = list(reader)
    for key, got in zip(found, reader.read(found, [TOKENS[key] for key in found]), strict=True):
        assert torch.equal(got.ids, expected[key].ids), key
        assert torch.equal(got.logprobs, expected[key].logprobs), key
    assert not complete or set(found) == set(TARGETS), found


def resume(path, expected):
    """Another writer writes what is missing, and then everything is there, once."""
    with cache.Writer(path, vocab_size=V, temperatures=(1.0,)) as writer:
        for key in writer.missing(TARGETS):
            writer.write(key, TARGETS[key], TOKENS[key])
    check(path, list(TARGETS), expected, complete=True)
    assert not cache.verify(path).faults


def interrupted(path, tier, n, mode, calls):
    """Runs the job in a child that is interrupted at call n; the keys it was told are durable, and how it ended."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        status = 0
        try:
            calls.arm(n, MODES.index(mode))
            run(path, lambda keys: os.write(send, f"{''.join(keys)}\n".encode()), tier)
        except BaseException as error:
            status = 3 if isinstance(error, CacheError) and error.code == "system" else 4
            os.write(2, f"{error!r}\n".encode() if status == 4 else b"")
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as told:
        lines = told.read().split("\n")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return list(lines[-2]) if len(lines) > 1 else [], code


def main():
    calls = ctypes.CDLL(None)
    what, path, tier = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if what == "trace":
        run(path, lambda keys: calls.mark("".join(keys).encode()), tier)
        return
    mode = sys.argv[4]
    calls.arm(-1, 0)
    run(path, lambda keys: None, tier)
    total = calls.calls()
    reader = cache.Reader(path)
    expected = {key: reader[key] for key in TARGETS}
    assert total > 40, total
    for n in range(total):
        shutil.rmtree(path)
        durable, code = interrupted(path, tier, n, mode, calls)
        where = f"{mode} at call {n}: exit code {code}, durable {durable}"
        try:
            if mode.startswith("kill"):
                assert code == -9, "the process was not killed"
            elif mode == "short write":
                assert code == 0, "a short write is no error"
                assert durable == list(TARGETS)
            else:
                assert code == 3, "an error of the system was not told"
            check(path, durable, expected)
            resume(path, expected)
        except BaseException as error:
            raise AssertionError(where) from error
    print(total)


if __name__ == "__main__":
    main()
