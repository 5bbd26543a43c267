"""``kdfast cache info``: what it says, draws and prints as JSON is what is stored."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

pytest.importorskip("typer", reason="the cache extra is not installed")

import kdfast
from kdfast import cache
from kdfast.cli import main

V, S, N = 300, 20, 12


@pytest.fixture
def info(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["kdfast", "cache", "info", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return call


def stored(path, method="topk", n=N):
    targets = [kdfast.soft_targets(3 * torch.randn(S, V), k=8, method=method, seed=i) for i in range(n)]
    with cache.Writer(path, vocab_size=V, teacher="a teacher", temperatures=(1.0,)) as writer:
        for i, one in enumerate(targets):
            writer.write(i, one, torch.arange(S))
    return targets


def test_json(info):
    targets = stored("c")
    code, output, _ = info("c", "--json")
    assert code == 0
    held = json.loads(output)
    assert (held["samples"], held["tokens"], held["vocab_size"]) == (N, N * S, V)
    assert held["metadata"] == {"teacher": "a teacher"}
    (tier,) = held["tiers"].values()
    assert (tier["samples"], tier["tokens"]) == (N, N * S)
    assert 0.5 * held["bytes"] < tier["bytes"] < held["bytes"]
    found = held["statistics"]
    q = torch.cat([one.logprobs for one in targets]).double().exp()
    tail = 1 - q.sum(-1)
    entropy = -(torch.special.xlogy(q, q).sum(-1) + torch.special.xlogy(tail, tail))
    assert math.isclose(found["tail"], tail.mean(), abs_tol=1e-4)
    assert math.isclose(found["entropy"], entropy.mean(), abs_tol=0.02)  # rounded to the grid
    for histogram in (found["entropies"], found["tails"]):
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
        assert sum(histogram["counts"]) == N * S


def test_a_part_of_the_samples_is_spread_over_the_cache(info):
    stored("c")
    held = json.loads(info("c", "--json", "--samples", 5)[1])
    assert held["samples"] == N
    assert held["statistics"]["samples"] == held["tiers"]["fixed"]["samples"] == 4  # every third
    held = json.loads(info("c", "--json", "--samples", 0)[1])
    assert held["statistics"] is None
    assert held["tiers"] == {}


def test_terminal(info):
    stored("c")
    code, output, _ = info("c")
    assert code == 0
    assert re.search(r"tier fixed +│ \d+\.\d bytes a token, without indices, in 12 samples", output)
    for name in ("entropy, nats", "log10 of tail mass"):
        lines = output.split(f"{name}: from, tokens, share\n")[1].splitlines()[:12]
        numbers = [re.fullmatch(r" *(-?[\d.]+) █* *([\d,]+) +([\d.]+)%", line) for line in lines]
        assert sum(int(number[2]) for number in numbers) == N * S
        edges = [float(number[1]) for number in numbers]
        assert edges == sorted(edges)


@pytest.mark.parametrize("method", ["topk", "pps"])
def test_plot(info, method):
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    stored("c", method)
    for name, start in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml")):
        code, output, errors = info("c", "--plot", name)
        assert code == 0, errors
        assert "samples" in output
        with open(name, "rb") as file:
            assert file.read().startswith(start)


def test_what_the_panels_say(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    from matplotlib.figure import Figure

    from kdfast.cache.plot import write_plot

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    stored(tmp_path / "c")
    reader = cache.Reader(tmp_path / "c")
    found = cache.statistics(reader, N)
    write_plot(tmp_path / "p.png", "a title", cache.sizes(reader, N), found)
    entropy, tail, size = drawn[0].axes
    assert "nats" in entropy.get_title(loc="left")
    assert "nats" in entropy.get_xlabel()
    assert entropy.get_ylabel() == tail.get_ylabel() == "tokens"
    assert tail.get_xscale() == "log"
    assert "outside the 8 kept entries" in tail.get_xlabel()
    assert "bytes a token" in size.get_xlabel()
    for axes, histogram in ((entropy, found.entropies), (tail, found.tails)):
        assert [bar.get_height() for bar in axes.patches] == histogram.counts


def test_wrong_use_is_told(info):
    stored("c")
    with cache.Writer("empty", vocab_size=V, temperatures=(1.0,)):
        pass
    for arguments, code, message in [
        (["c", "--plot", "p.pdf"], 2, "takes a .png or .svg file"),
        (["c", "--plot", "nowhere/p.png"], 2, "--plot nowhere/p.png cannot be written: there is no folder nowhere"),
        (["empty", "--plot", "p.png"], 1, "no samples to draw"),
    ]:
        got, _, errors = info(*arguments)
        assert got == code
        assert message in errors
        assert "Traceback" not in errors


def test_what_is_no_cache_is_told(info, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("notes")
    (tmp_path / "file").write_text("text")
    stored("lost")
    (tmp_path / "lost" / "cache.header").unlink()
    for path, message in [
        ("folder", "no cache is there: the directory has no cache.header [missing; folder]"),
        ("nowhere", "no cache is there: there is no such directory [missing; nowhere]"),
        ("file", "Not a directory [system; file]"),
        ("lost", "the cache has lost its cache.header, which a repair makes anew from a shard [missing; lost]"),
    ]:
        code, output, errors = info(path)
        assert (code, output) == (1, "")
        assert message in errors
    cache.repair("lost")
    assert info("lost")[0] == 0


def test_names_with_brackets_are_shown(info):
    with cache.Writer("[red]", vocab_size=V, teacher="a [bold] teacher", temperatures=(1.0,)) as writer:
        writer.write("one", kdfast.soft_targets(torch.randn(1, V), k=8))
    code, output, _ = info("[red]")
    assert code == 0
    assert "[red]" in output
    assert "a [bold] teacher" in output
    assert "Of 1 token in 1 sample: " in output


def other(path, key="b", seed=0, **header):
    with cache.Writer(path, **{"vocab_size": V, "teacher": "a teacher", "temperatures": (1.0,)} | header) as writer:
        targets = kdfast.soft_targets(torch.randn(S, header.get("vocab_size", V)), k=8)
        writer.write(key, targets, torch.arange(S) + seed)


@pytest.mark.parametrize("there", [False, True], ids=["made", "there"])
def test_a_merge_looks_at_all_sources_before_it_copies(tmp_path, there):
    """The last of the sources cannot be taken: nothing of the first is."""
    other(tmp_path / "first")
    other(tmp_path / "vocabulary", vocab_size=V + 1)
    other(tmp_path / "teacher", teacher="another")
    other(tmp_path / "text", seed=1)
    (tmp_path / "folder").mkdir()
    into = tmp_path / "into"
    if there:
        other(into, key="a")
    before = {p.name: p.read_bytes() for p in into.glob("*")}
    for bad, code in [
        ("vocabulary", "mismatch"),
        ("teacher", "mismatch"),
        ("text", "duplicate"),
        ("folder", "missing"),
        ("nowhere", "missing"),
    ]:
        with pytest.raises(kdfast.CacheError) as caught:
            cache.merge([tmp_path / "first", tmp_path / bad], into)
        assert (caught.value.code, caught.value.path) == (code, str(tmp_path / bad))
        assert {p.name: p.read_bytes() for p in into.glob("*")} == before
        assert into.exists() is there
    assert cache.merge([tmp_path / "first", tmp_path / "first"], into) == (1, 1)
    assert set(cache.Reader(into)) == ({"a", "b"} if there else {"b"})
