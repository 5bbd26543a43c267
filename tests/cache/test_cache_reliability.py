"""What a cache is after a kill, a power cut, a full disk or a flipped bit: what was committed is there, or an error."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash_runner
import crash_states
import pytest
import torch

from kdfast import CacheError, cache

HERE = Path(__file__).parent
STATES = int(os.environ.get("KDFAST_TEST_CRASH_STATES", "6"))  # random ones at each moment
TIERS = ["fixed", "compact"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and /proc are Linux's")


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler to build system_calls.c with")
    library = tmp_path_factory.mktemp("preload") / "system_calls.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "system_calls.c"), "-ldl"], check=True
    )
    return library


def crash_runner_under(preload, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, str(HERE / "crash_runner.py"), *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(preload), "OMP_NUM_THREADS": "1", **environment},
        cwd=arguments[1].parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@linux
@pytest.mark.parametrize(
    ("tier", "mode"), [*(("fixed", mode) for mode in crash_runner.MODES[1:]), ("compact", "kill halfway")]
)
def test_interrupted_at_every_call(preload, tmp_path, tier, mode):
    path = tmp_path / "c"
    out = crash_runner_under(preload, "interrupt", path, tier, mode, SYSTEM_CALLS_UNDER=str(path))
    assert int(out) > 40  # calls


@linux
@pytest.mark.parametrize("tier", TIERS)
def test_power_cut_at_every_moment(preload, tmp_path, request, tier):
    path, trace = tmp_path / "c", tmp_path / "trace"
    crash_runner_under(preload, "trace", path, tier, SYSTEM_CALLS_UNDER=str(path), SYSTEM_CALLS_TRACE=str(trace))
    reader = cache.Reader(path)
    expected = {key: reader[key] for key in crash_runner.TARGETS}
    disk, states = crash_states.Disk(), 0
    rng = random.Random(torch.initial_seed())
    left = tmp_path / "left"
    for number, op in enumerate(crash_states.parse(trace.read_bytes())):
        disk.apply(op)
        if op.kind == "mark":
            continue
        durable = list(disk.marks[-1]) if disk.marks else []
        for how in ["nothing", "all", *["some"] * STATES]:
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            disk.leave(left, rng, how)
            try:
                crash_runner.check(left, durable, expected)
                if rng.random() < 0.1:
                    crash_runner.resume(left, expected)
            except BaseException as error:
                msg = f"after operation {number}, {op.kind} {op.words}, with {how} of what was pending"
                raise AssertionError(msg) from error
            states += 1
    assert states > 300
    assert disk.marks[-1] == "".join(crash_runner.TARGETS)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_every_byte_of_every_file(tmp_path, tier, indexed):
    """One bit of each byte flipped in turn: an error, to a reader and to verify.

    What an index makes dispensable, itself and the headers of a shard, may be damaged without a reader's notice.
    """
    path = tmp_path / "c"
    with cache.Writer(path, vocab_size=50, temperatures=(1.0, 2.0), tier=tier) as writer:
        generator = torch.Generator().manual_seed(1)
        for key in "ab":
            ids = torch.rand((3, 50), generator=generator).argsort(-1)[:, :5].int()
            logprobs = -torch.rand((3, 5), generator=generator).cumsum(-1) - 2
            lse = {1.0: torch.zeros(3), 2.0: torch.rand(3, generator=generator)}
            targets = cache.writer.SparseTargets(ids, logprobs, vocab_size=50, lse=lse)
            writer.write(key, targets, torch.arange(3))
    if not indexed:
        next(path.glob("*.index")).unlink()
    content = read_all(path)
    headers = (path / "cache.header").stat().st_size + 32
    in_models, undetected, flips = 0, [], 0
    for file in sorted(path.iterdir()):
        if file.name == "manifest.json":  # not read
            continue
        is_index = file.suffix == ".index"
        raw = file.read_bytes()
        for at in random.sample(range(len(raw)), 500) if is_index else range(len(raw)):
            changed = bytearray(raw)
            changed[at] ^= 1 << random.randrange(8)
            file.write_bytes(changed)
            flips += 1
            try:
                assert read_all(path) == content
                dispensable = is_index or (indexed and file.suffix == ".shard" and at < headers)
                in_models += not dispensable  # where there is another copy
                if not is_faulty(path) or (tier == "fixed" and not dispensable):
                    undetected.append((file.name, at))
            except CacheError:
                assert is_faulty(path), (file.name, at)
                assert not is_index, (file.name, at)
        file.write_bytes(raw)
    assert flips > 800
    assert (in_models > 200) == (tier == "compact")
    assert undetected == []


def read_all(path):
    reader = cache.Reader(path)
    return [(t.ids.tolist(), t.logprobs.tolist(), t.lse[2.0].tolist()) for t in reader.read(list(reader))]


def is_faulty(path):
    try:
        return bool(cache.verify(path).faults)
    except CacheError:
        return True


@linux
def test_a_file_size_limit_is_an_error(tmp_path):
    code = """
import resource, sys, torch
from kdfast import CacheError, cache, soft_targets
targets = soft_targets(torch.randn(300, 1000), k=64)
writer = cache.Writer(sys.argv[1], vocab_size=1000)
writer.write("a", targets)
writer.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    for i in range(100):
        writer.write(i, targets)
    writer.commit()
except CacheError as error:
    assert error.code == "system" and error.path.endswith(".open"), error
else:
    sys.exit("no error")
try:
    writer.close()
except CacheError:
    pass
else:
    sys.exit("the error was lost")
assert "a" in cache.Reader(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, timeout=120, cwd=tmp_path)


@linux
def test_eight_writers_one_of_them_killed(tmp_path):
    path = tmp_path / "c"
    code = """
import sys, time, torch
from kdfast import cache, soft_targets
rank = int(sys.argv[2])
torch.manual_seed(rank)
with cache.Writer(sys.argv[1], vocab_size=500, threads=1) as writer:
    for i in range(20):
        writer.write(f"{rank}-{i}", soft_targets(torch.randn(30, 500), k=16), torch.arange(30))
        writer.write("shared", soft_targets(torch.ones(30, 500), k=16), torch.arange(30))
        if i % 5 == 4:
            print(writer.commit(), flush=True)
        if rank == 3 and i == 12:
            time.sleep(600)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(path), str(rank)],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                    cwd=tmp_path,  # and so the installed package, not the tree
                )
            )
            for rank in range(8)
        ]
        for rank, writer in enumerate(writers):
            assert rank == 3 or writer.wait(timeout=300) == 0
        for _ in range(2):
            line = writers[3].stdout.readline()  # its second commit; it writes three more samples and waits
        time.sleep(0.2)
        writers[3].kill()
        assert writers[3].wait(timeout=60) == -signal.SIGKILL
    assert int(line) in (10, 11)
    expected = {f"{rank}-{i}" for rank in range(8) for i in range(10 if rank == 3 else 20)} | {"shared"}
    assert set(cache.Reader(path)) == expected
    repaired = cache.repair(path)
    assert repaired.lost == []
    assert len(repaired.done) >= 1
    assert set(cache.Reader(path)) == expected
    assert not list(path.glob("*.open"))
    assert cache.repair(path).done == []


class TestRepair:
    @pytest.fixture(params=TIERS)
    def filled(self, tmp_path, request):
        path = tmp_path / "c"
        crash_runner.run(path, lambda keys: None, request.param)
        reader = cache.Reader(path)
        return path, {key: reader[key] for key in reader}

    def test_nothing_to_do(self, filled):
        path, _ = filled
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        done = cache.repair(path)
        assert (done.kept, done.lost, done.done, done.in_use) == (0, [], [], [])
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before

    @pytest.mark.parametrize("where", ["block", "frame header", "index", "tail", "shard header"])
    def test_damaged_shards(self, filled, where):
        path, content = filled
        shard = sorted(path.glob("*.shard"))[0]
        raw = bytearray(shard.read_bytes())
        headers = len((path / "cache.header").read_bytes()) + 32
        at = {
            "block": raw.index(b"KDFR") + 400,
            "frame header": raw.index(b"KDFR") + 20,
            "index": raw.index(b"KDFINDEX") + 40,
            "tail": len(raw) - 20,
            "shard header": headers - 20,
        }[where]
        raw[at] ^= 1
        shard.write_bytes(raw)
        damaged = {"block", "frame header"} & {where}
        assert cache.verify(path).faults
        done = cache.repair(path)
        assert not cache.verify(path).faults
        reader = cache.Reader(path)
        gone = set(content) - set(reader)
        assert len(gone) == (1 if damaged else 0 if where != "shard header" else len(gone))
        assert bool(done.lost) == bool(gone)
        for key in reader:
            assert torch.equal(reader[key].logprobs, content[key].logprobs)
        crash_runner.resume(path, content)

    def test_a_lost_header_is_made_anew(self, filled):
        path, content = filled
        (path / "cache.header").unlink()
        cache.repair(path)
        crash_runner.check(path, list(content), content, complete=True)

    def test_a_lost_journal(self, filled):
        path, content = filled
        next(path.glob("*.journal")).unlink()
        assert len(cache.Reader(path)) == 0  # nothing was promised
        done = cache.repair(path)
        assert done.kept == len(content)
        crash_runner.check(path, list(content), content, complete=True)

    def test_a_lost_shard(self, filled):
        path, content = filled
        shard = sorted(path.glob("*.shard"))[0]
        shard.unlink()
        with pytest.raises(CacheError):
            cache.Reader(path)
        done = cache.repair(path)
        assert [fault.code for fault in done.lost] == ["missing"]
        crash_runner.resume(path, content)

    def test_a_writer_that_is_alive_is_left_alone(self, tmp_path):
        path = tmp_path / "c"
        with cache.Writer(path, vocab_size=crash_runner.V, temperatures=(1.0,)) as writer:
            writer.write("a", crash_runner.TARGETS["a"])
            writer.commit()
            assert len(cache.repair(path).in_use) == 1
            writer.write("b", crash_runner.TARGETS["b"])
        assert set(cache.Reader(path)) == {"a", "b"}


class TestMerge:
    def test_merged(self, tmp_path):
        targets, tokens = crash_runner.TARGETS, crash_runner.TOKENS
        for name, keys in (("one", "abc"), ("two", "cdef")):
            with cache.Writer(tmp_path / name, vocab_size=crash_runner.V, temperatures=(1.0,)) as writer:
                for key in keys:
                    writer.write(key, targets[key], tokens[key])
        merged = cache.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
        assert (merged.samples, merged.there_already) == (6, 1)
        expected = {key: cache.Reader(tmp_path / ("one" if key in "abc" else "two"))[key] for key in "abcdef"}
        crash_runner.check(tmp_path / "all", list("abcdef"), expected, complete=True)
        assert cache.merge([tmp_path / "one"], tmp_path / "all") == (0, 3)

    def test_others_are_refused(self, tmp_path):
        targets, tokens = crash_runner.TARGETS, crash_runner.TOKENS
        for name, options in (("one", {}), ("two", {"teacher": "b"}), ("three", {})):
            with cache.Writer(tmp_path / name, vocab_size=crash_runner.V, temperatures=(1.0,), **options) as writer:
                writer.write("a", targets["a"], tokens["a"] + (name == "three"))
        with pytest.raises(CacheError, match="headers"):
            cache.merge([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
        with pytest.raises(CacheError, match="other token ids"):
            cache.merge([tmp_path / "one", tmp_path / "three"], tmp_path / "more")
        with pytest.raises(ValueError, match="at least one"):
            cache.merge([], tmp_path / "none")
