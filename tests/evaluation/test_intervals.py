"""Confidence intervals against scipy and theory."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from ldm.evaluation.metrics.intervals import bootstrap_estimate, mean_estimate, proportion_estimate


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 30), (1, 7), (15, 30), (213, 214), (30, 30)])
def test_proportions_have_wilsons_interval(hits: int, n: int) -> None:
    theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    estimate = proportion_estimate(hits, n)
    assert estimate["value"] == hits / n
    assert estimate["low"] == pytest.approx(theirs.low, abs=1e-6)
    assert estimate["high"] == pytest.approx(theirs.high, abs=1e-6)


def test_impossible_proportions_are_refused() -> None:
    for hits, n in ((0, 0), (3, 2)):
        with pytest.raises(ValueError, match="proportion_estimate: expected"):
            proportion_estimate(hits, n)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    estimate = mean_estimate(values, 4000)
    error = float(values.var().div(400).sqrt())
    assert estimate["standard_error"] == pytest.approx(error)
    assert estimate["low"] == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.1 * error)
    assert estimate["high"] == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.1 * error)


def test_a_bootstrap_interval_is_centered_on_the_value() -> None:
    estimate = bootstrap_estimate(10.0, torch.tensor([11.0, 13.0, 15.0]), 3)  # whatever the bias of the resamples
    assert (estimate["low"] + estimate["high"]) / 2 == pytest.approx(10.0)
    assert estimate["high"] - 10.0 == pytest.approx(1.96 * 2.0, rel=1e-3)
