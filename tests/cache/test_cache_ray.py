"""The job on Ray: a cluster of this machine, with real actors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("typer", reason="the cache extra is not installed")
pytest.importorskip("ray", reason="the ray extra is not installed: `make nightly` runs these tests with it")

import ray
from cache_jobs import HERE, assert_holds, command_line, cut, lines, some, written
from cache_teachers import V

from kdfast import cache
from kdfast.cache.job import cluster

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray and what it imports


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # which the cluster's processes inherit
        patch.chdir(tmp_path_factory.mktemp("driver"))  # Ray lets them import from here, and the sources are not built
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def build(monkeypatch, capsys, tmp_path, address):
    monkeypatch.setattr(cluster, "_BLOCK_BYTES", 512)  # so that a few samples are blocks enough for two actors
    monkeypatch.setattr(cluster, "_SAMPLES_AT_ONCE", 4)
    return command_line(monkeypatch, capsys, tmp_path)


RECORDS = ["--field", "input_ids", "--id-field", "id", "--length", 32, "--batch-tokens", 32, "--k", 8, "--ray"]


def test_two_actors_fill_it_and_another_number_goes_on(build, tmp_path):
    samples = some(60)
    first = dict(list(samples.items())[:40])
    code, output, errors = build("c", written(tmp_path, first), *RECORDS, "--ray-actors", 2)
    assert code == 0, errors
    pieces = cut(first, 32)
    assert f"{len(pieces)} samples written, 0 were there already" in output
    assert_holds("c", pieces)
    assert sum(name.endswith(".shard") for name in os.listdir("c")) == 2
    assert not [name for name in os.listdir("c") if name.endswith(".open")]
    assert not cache.verify("c").faults

    every = cut(samples, 32)
    code, output, errors = build("c", written(tmp_path, samples), *RECORDS)
    assert code == 0, errors
    assert f"{len(every) - len(pieces)} samples written, {len(pieces)} were there already" in output
    assert_holds("c", every)
    code, output, errors = build("c", tmp_path / "d.jsonl", *[x for x in RECORDS if x != "--ray"])
    assert code == 0, errors
    assert f"0 samples written, {len(every)} were there already" in output


def test_draws_are_those_of_one_process(build, tmp_path):
    data = written(tmp_path, some(20))
    assert build("a", data, *RECORDS, "--method", "pps", "--ray-actors", 2)[0] == 0
    assert build("b", data, *[x for x in RECORDS if x != "--ray"], "--method", "pps")[0] == 0
    a, b = cache.Reader("a"), cache.Reader("b")
    assert set(a) == set(b)
    assert all(torch.equal(a[key].ids, b[key].ids) for key in a)


def test_a_teacher_that_breaks_ends_the_job(build, tmp_path):
    samples = {str(i): torch.randint(V, (32,)) for i in range(40)}
    data = written(tmp_path, samples)
    code, _, errors = build("c", data, *RECORDS, "--ray-actors", 2, teacher=("--factory", "cache_teachers:broken"))
    assert code == 1
    assert "RuntimeError: the teacher broke" in errors
    kept = set(cache.Reader("c"))
    assert 4 <= len(kept) < len(samples)
    assert not [name for name in os.listdir("c") if name.endswith(".open")]
    assert not cache.verify("c").faults


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_the_data_is_told_as_by_one_process(build, tmp_path, count):
    data = lines(tmp_path / "d.jsonl", [{"id": i, "input_ids": [1, 2, 3]} for i in range(30)])
    data.write_text(data.read_text() + "{\n")
    code, _, errors = build("c", data, *RECORDS, "--ray-actors", count)
    assert code == 2
    assert errors.startswith(f"error: {data}, line 31: no JSON")
    assert "Traceback" not in errors
    lines(data, [{"id": i, "input_ids": [1, 300 if i == 29 else 2]} for i in range(30)])
    code, _, errors = build("d", data, *RECORDS, "--ray-actors", count)
    assert code == 2
    assert errors == "error: sample '29' holds token id 300, the teacher takes 0 to 299\n"


def test_an_actor_that_is_gone_ends_the_job(build, tmp_path):
    data = written(tmp_path, some(30))
    code, _, errors = build("c", data, *RECORDS, "--ray-actors", 2, teacher=("--factory", "cache_teachers:gone"))
    assert code == 1
    assert "died" in errors
    assert "Traceback" not in errors


def test_ctrl_c_commits(build, tmp_path, address):
    samples = {str(i): torch.randint(V, (32,)) for i in range(100)}
    data = written(tmp_path, samples)
    arguments = ["c", str(data), *map(str, RECORDS), "--ray-actors", "2", "--commit-every", "0"]
    arguments += ["--ray-address", address, "--factory", "cache_teachers:slow"]
    command = "import sys; from kdfast.cli import main; sys.path.insert(0, sys.argv.pop()); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "cache", "build", *arguments, HERE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [HERE, *sys.path]))},
        start_new_session=True,
    )
    while process.poll() is None and not (os.path.exists("c/cache.header") and len(cache.Reader("c"))):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "go on with:\n  kdfast cache build c" in output
    assert "Traceback" not in errors
    there = len(cache.Reader("c"))
    assert 0 < there < len(samples)
    assert not [name for name in os.listdir("c") if name.endswith(".open")]
    assert not cache.verify("c").faults
    code, output, _ = build("c", data, *RECORDS, "--ray-actors", 2, teacher=("--factory", "cache_teachers:slow"))
    assert code == 0
    written_now, before = map(int, re.search(r"(\d+) samples written, (\d+) were", output).groups())
    assert (written_now, before) == (len(samples) - there, there)


def test_more_actors_than_the_cluster_has_cpus(build, tmp_path):
    code, _, errors = build("c", written(tmp_path, some(3)), *RECORDS, "--ray-actors", 3)
    assert code == 2
    assert "3 actors need a CPU each and one CPU for reading, the cluster has 3 CPUs" in errors
    assert not os.path.exists("c")


def test_no_cluster_is_told(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": [1, 2]}')
    command = "from kdfast.cli import main; main()"
    call = [sys.executable, "-c", command, "cache", "build", "c", "d.jsonl", "--factory", "a:b", "--ray"]
    done = subprocess.run(
        [*call, "--ray-address", "nowhere"], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster at nowhere" in done.stderr
    assert "Traceback" not in done.stderr
