"""Shared fixtures: seeds that are fresh in every run, backends by instruction set, poisoned outputs."""

from __future__ import annotations

import os
import zlib

import hypothesis
import pytest
import torch
from machine import BACKENDS, DEVICE, INTERPRETING, KERNEL, TRITON, choose

if INTERPRETING:
    import interpreter

    interpreter.mend()

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)

SEED = int(os.environ.get("KDFAST_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))

# No data base: a run leaves nothing behind, and the failing example is printed.
hypothesis.settings.register_profile("kdfast", deadline=None, database=None, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("kdfast")


def pytest_report_header():
    return f"seed: KDFAST_TEST_SEED={SEED}"


def pytest_configure(config):
    line = "drawn: slow; of the test's cases one is run, another with another seed, all with KDFAST_TEST_ALL=1"
    config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config, items):
    """Of tests that are ``drawn`` one case; with ``KDFAST_TEST_SHARE=n`` of every test one case in n, at least one."""
    if os.environ.get("KDFAST_TEST_ALL") == "1":
        return
    share = int(os.environ.get("KDFAST_TEST_SHARE") or 1)
    # Processes that share the tests must agree, and have no seed in common if none was given.
    drawn_by = os.environ.get("KDFAST_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or SEED
    places = {item.nodeid: zlib.crc32(f"{drawn_by} {item.nodeid}".encode()) for item in items}
    first = {}
    for name in sorted(places, key=places.__getitem__):
        first.setdefault(name.partition("[")[0], name)
    firsts = {*first.values()}
    kept = [
        item
        for item in items
        if item.nodeid in firsts or (places[item.nodeid] % share == 0 and not item.get_closest_marker("drawn"))
    ]
    config.hook.pytest_deselected(items=[*{*items}.difference(kept)])
    items[:] = kept


@pytest.fixture(autouse=True)
def seeded(request, monkeypatch):
    """Seeds torch from the run's seed and the test's name, so that one test alone repeats what it did in the run."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.name.encode()))
    print(f"rerun with KDFAST_TEST_SEED={SEED}")
    monkeypatch.setenv("KDFAST_BACKEND", KERNEL) if TRITON else monkeypatch.delenv("KDFAST_BACKEND", raising=False)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Name of a backend; the compiled one appears once per instruction set of this machine."""
    name, _, variant = request.param.partition("-")
    if variant:
        choose(variant, monkeypatch)
    return name


@pytest.fixture
def poisoned(monkeypatch):
    """Makes ``torch.empty`` return NaN, so that memory which a kernel leaves unwritten shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """The file system ``cache_remote.Flaky``, and in ``log`` what it has read."""
    import fsspec
    from cache_remote import Flaky

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.clear_instance_cache()
    monkeypatch.setattr(Flaky, "log", tmp_path / "log", raising=False)
    monkeypatch.setattr(Flaky, "spoil", None)
    return Flaky


@pytest.fixture
def source(tmp_path):
    """A cache of six shards, ``sample 0`` to ``sample 5``."""
    from cache_remote import fill

    return fill(tmp_path / "source")


@pytest.fixture
def memory():
    """A URL of the memory file system; empty before and after."""
    import fsspec

    url = "memory://caches/one"
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield url
    files.store.clear()
