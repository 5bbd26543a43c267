"""The parts of kdfast.report: intervals, CKA, images."""

from __future__ import annotations

import base64
import io
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from kdfast.reporting.examples import png
from kdfast.reporting.similarity import MiniBatchCKA, u_centred
from kdfast.reporting.uncertainty import mcnemar, mean, share, share_difference, student_t


def test_uncertainty_against_scipy():
    for freedom in (1, 2, 7, 60, 1500, 5000):
        assert student_t(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-3)
    for first, second in ((0, 0), (3, 0), (10, 4), (70, 91)):
        expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(expected)
    alone = mean(torch.tensor([1.0, 3.0]), torch.tensor([4, 4]))
    assert (alone["value"], alone["se"], alone["low"]) == (2.0, None, None)
    assert mean(torch.empty(0), torch.empty(0, dtype=torch.int64))["value"] is None
    nothing = share(torch.zeros(9, dtype=torch.bool), torch.arange(9))
    assert nothing["low"] == 0.0
    assert 0.2 < nothing["high"] < 0.4


def test_intervals_cover():
    """Of 300 samples with a known mean, 95 % of the intervals hold it: fewer than 88 % has a chance of about 1e-6."""
    covered = {"share": 0, "difference": 0, "clusters": 0}
    for _ in range(300):
        u = torch.rand(60)
        a, b = u < 0.7, (u + 0.3 * torch.rand(60)) < 0.6
        found = share(a, torch.arange(60))
        covered["share"] += found["low"] <= 0.7 <= found["high"]
        found = share_difference(a, b, torch.arange(60))
        covered["difference"] += found["low"] <= 0.7 - 0.45 <= found["high"]
        values = torch.randn(12)[:, None] + torch.randn(12, 8)  # what one sequence shares
        found = mean(values.flatten(), torch.arange(12).repeat_interleave(8))
        covered["clusters"] += found["low"] <= 0 <= found["high"]
    assert min(covered.values()) >= 0.88 * 300, covered


def cka(x, y):
    found = MiniBatchCKA(["y"], {"x": ["x"]})
    found.add([y], {"x": [x]})
    found.flush()
    return found.values("x")[0][0]


def test_hsic_is_the_mean_over_four_different_rows():
    """The U-statistic of Song et al. by its definition: over all (i, j, q, r) that differ."""
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(7), 4)]
    found = (u_centred(x) * u_centred(y)).sum().item() / (7 * 4)
    assert found == pytest.approx(np.mean(terms), rel=1e-9)


def test_cka_is_near_its_closed_form_on_many_rows():
    x = torch.randn(480, 4, dtype=torch.float64)
    y = x @ torch.randn(4, 6, dtype=torch.float64) + 0.3 * torch.randn(480, 6, dtype=torch.float64)
    a, b = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    closed = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert cka(x, y) == pytest.approx(closed, abs=0.03)


def test_cka_invariances():
    x, y = torch.randn(64, 9, dtype=torch.float64), torch.randn(64, 9, dtype=torch.float64)
    y = y + x
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    assert cka(x, x) == pytest.approx(1.0)
    assert cka(x, y) == pytest.approx(cka(y, x))
    assert cka(3.0 * x @ rotation + 5.0, y) == pytest.approx(cka(x, y), rel=1e-9)
    stretch = torch.diag(torch.tensor([40.0, *([1.0] * 8)], dtype=torch.float64))
    assert abs(cka(x @ stretch, y) - cka(x, y)) > 0.05  # a general linear map is no invariance
    assert abs(cka(torch.randn(500, 9), torch.randn(500, 9))) < 0.05
    assert cka(torch.ones(10, 3), torch.randn(10, 3)) is None


def test_cka_in_blocks_is_the_mean_of_their_estimates():
    x, y = torch.randn(96, 5, dtype=torch.float64), torch.randn(96, 7, dtype=torch.float64)
    y[:, :5] += x
    found = MiniBatchCKA(["y"], {"x": ["x"]})
    for rows in torch.arange(96).split(8):  # gathered into three blocks of 32
        found.add([y[rows]], {"x": [x[rows]]})
    found.flush()
    assert (found.rows, found.blocks) == (96, 3)
    sums = np.zeros(3)
    for rows in torch.arange(96).split(32):
        k, l = u_centred(x[rows]), u_centred(y[rows])
        sums += [(k * l).sum(), (k * k).sum(), (l * l).sum()]
    assert found.values("x")[0][0] == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]))


@pytest.mark.parametrize("shape", [(5, 7), (1, 5, 7), (3, 5, 7), (2, 5, 7)])
def test_png_is_read_back(shape):
    image = pytest.importorskip("PIL.Image", reason="pillow comes with matplotlib, in the demo extra")
    x = torch.rand(shape)
    data = base64.b64decode(png(x).partition(",")[2])
    pixels = np.asarray(image.open(io.BytesIO(data))).astype(float)
    x = x if x.dim() == 3 else x[None]
    x = x if len(x) == 3 else x.mean(0, keepdim=True)
    expected = ((x - x.min()) / (x.max() - x.min()) * 255).permute(1, 2, 0).squeeze(-1).numpy()
    assert np.abs(pixels - expected).max() <= 0.51
