"""Estimates with 95 % confidence intervals, as the JSON holds them: {"value", "low", "high", "n", …}."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Z = 1.959964  # 97.5 % of a standard normal lie below
RESAMPLES = 1000


def resample_indices(n: int, count: int, seed: int = 0) -> Tensor:
    """Indices of bootstrap samples (Efron 1979), int64 [count, n]: n of n, with replacement."""
    return torch.randint(n, (count, n), generator=torch.Generator().manual_seed(seed))


def mean_estimate(values: Tensor, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The mean of values [n], its standard error, and the percentile bootstrap interval."""
    values = values.double().cpu()
    n = len(values)
    means = values[resample_indices(n, resamples)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    error = float(values.std()) / math.sqrt(n) if n > 1 else None  # JSON has no NaN
    return {"value": float(values.mean()), "low": low, "high": high, "standard_error": error, "n": n}


def bootstrap_estimate(value: float, resampled: Tensor, n: int) -> dict[str, Any]:
    """A value +- 1.96 bootstrap standard errors, from the same statistic of resamples.

    Percentiles of the resamples would be centered elsewhere than the value: for a statistic that is not a mean, such
    as FID, resampling has a bias of its own.
    """
    error = float(resampled.double().std())
    return {"value": value, "low": value - Z * error, "high": value + Z * error, "standard_error": error, "n": n}


def proportion_estimate(hits: int, n: int) -> dict[str, Any]:
    """hits / n with Wilson's interval (Wilson 1927), which also holds near 0 and 1 and for few trials.

    Raises:
        ValueError: unless 0 <= hits <= n and n > 0.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"proportion_estimate: expected 0 <= hits <= n and n > 0, got {hits} of {n}")
    share = hits / n
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return {"value": share, "low": max(0.0, center - half), "high": min(1.0, center + half), "n": n}
