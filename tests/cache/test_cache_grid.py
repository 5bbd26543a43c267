"""The grid: how far what is stored is from what was given, at every temperature."""

from __future__ import annotations

import pytest
import torch

from kdfast import cache, soft_targets
from kdfast.cache.error import JobError
from kdfast.cache.grid import grid_for, grid_from

V = 3000


def divergence(given, stored, temperature):
    """KL(given || stored) of each token, kept entries one by one and the tail as one, fp64, by columns."""
    q, p = (torch.zeros(len(t.ids), V + 1, dtype=torch.float64) for t in (given, stored))
    for out, t in ((q, given), (p, stored)):
        lse = 0 if temperature == 1 else t.lse[temperature].double()[:, None]
        out.scatter_(1, t.ids.long(), (t.logprobs.double() / temperature - lse).exp())
        out[:, V] = (1 - out.sum(1)).clamp(min=1e-9)
    return (torch.where(q > 0, q * (q / p).log(), 0)).sum(1)


@pytest.mark.parametrize("tier", ["fixed", "compact"])
@pytest.mark.parametrize("spread", [0.3, 2, 4])
@pytest.mark.parametrize("lowest", [0.05, 0.1, 0.3, 0.7, 1.0, 2.0])
def test_auto_keeps_the_mean_divergence_below_a_tenth_of_a_thousandth(lowest, spread, tier, tmp_path):
    temperatures = tuple(sorted({lowest, 1.0, 4.0}))
    given = soft_targets(torch.randn(600, V, dtype=torch.float64) * spread, k=64, temperatures=temperatures)
    with cache.Writer(tmp_path, vocab_size=V, tier=tier) as writer:
        writer.write("a", given)
    stored = cache.Reader(tmp_path)["a"]
    for t in temperatures:
        assert float(divergence(given, stored, t).mean()) < 1e-4


def test_the_grid_of_some_temperatures():
    grids = {4.0: 4, 1.0: 4, 0.99: 5, 0.5: 5, 0.3: 6, 0.25: 6, 0.1: 8, 0.05: 9, 2**-6: 10, 0.001: 10}
    assert {t: grid_for("auto", (t, 8.0)) for t in grids} == grids
    assert [grid_for(g, (0.1,)) for g in (2, 10)] == [2, 10]
    assert (grid_for("auto", ()), grid_for("auto", (1e-320,))) == (4, 10)
    assert (grid_from("auto"), grid_from("7")) == ("auto", 7)


@pytest.mark.parametrize("grid", [1, 11, "fine", None, 4.0, True])
def test_a_grid_that_cannot_be_meant(grid, tmp_path):
    with pytest.raises(ValueError, match='grid must be "auto", or 2 to 10'):
        cache.Writer(tmp_path / "c", vocab_size=V, grid=grid)
    assert not (tmp_path / "c").exists()
    for text in ("1", "11", "-3", "fine", "4.0"):
        with pytest.raises(JobError, match="--grid must be auto, or 2 to 10"):
            grid_from(text)


@pytest.mark.parametrize("temperatures", [(0.0,), (-1.0, 2.0), (), (float("nan"),), (float("inf"),)])
def test_temperatures_that_are_none(temperatures, tmp_path):
    with pytest.raises(ValueError, match="temperatures must be"):
        cache.Writer(tmp_path / "c", vocab_size=V, temperatures=temperatures)
    assert not (tmp_path / "c").exists()
