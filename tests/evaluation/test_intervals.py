"""Intervals against scipy's and against theory."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from ldm.evaluation.metrics.intervals import mean_figure, share_figure, spread_figure


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 30), (1, 7), (15, 30), (213, 214), (30, 30)])
def test_shares_have_wilsons_interval(hits: int, n: int) -> None:
    theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    figure = share_figure(hits, n)
    assert figure["value"] == hits / n
    assert figure["low"] == pytest.approx(theirs.low, abs=1e-6)
    assert figure["high"] == pytest.approx(theirs.high, abs=1e-6)


def test_no_share_of_nothing() -> None:
    for hits, n in ((0, 0), (3, 2)):
        with pytest.raises(ValueError, match="share_figure: expected"):
            share_figure(hits, n)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    figure = mean_figure(values, 4000)
    error = float(values.var().div(400).sqrt())
    assert figure["standard_error"] == pytest.approx(error)
    assert figure["low"] == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.1 * error)
    assert figure["high"] == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.1 * error)


def test_a_resampled_statistic_keeps_its_own_center() -> None:
    figure = spread_figure(10.0, torch.tensor([11.0, 13.0, 15.0]), 3)  # the resamples' bias does not move it
    assert (figure["low"] + figure["high"]) / 2 == pytest.approx(10.0)
    assert figure["high"] - 10.0 == pytest.approx(1.96 * 2.0, rel=1e-3)
