"""Estimates with 95 % confidence intervals, as the JSON holds them: {"value", "low", "high", "n", …}."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Z = 1.959964  # 97.5 % of a standard normal lie below
RESAMPLES = 1000
FLIPS = 10_000  # of signs, in the paired test
EXACT = 12  # pairs up to which all flips are tried


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


def paired_estimate(a: Tensor, b: Tensor, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The mean difference b - a of paired values [n], with its bootstrap interval and the p-value of a sign-flip test.

    Without a difference each pair's sign is a coin flip (Fisher 1935, section 21). Up to n = 12 all 2^n flips are
    tried, else `FLIPS` random ones, whose p is never 0: the observed signs are among them.
    """
    a, b = a.double().cpu(), b.double().cpu()
    difference = b - a
    n, observed = len(difference), difference.mean().abs()
    if n <= EXACT:
        signs = 1.0 - 2 * ((torch.arange(2**n)[:, None] >> torch.arange(n)) & 1)
        means, seen = (signs.double() @ difference / n).abs(), 0
    else:
        rng = torch.Generator().manual_seed(0)
        parts = [torch.randint(2, (500, n), generator=rng, dtype=torch.int8) for _ in range(FLIPS // 500)]
        means, seen = torch.cat([((1 - 2 * part.double()) @ difference / n).abs() for part in parts]), 1
    as_far = int((means >= observed * (1 - 1e-9)).sum())
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        **mean_estimate(difference, resamples),
        "p": (as_far + seen) / (len(means) + seen),
        "a_larger": int((difference < 0).sum()),
        "b_larger": int((difference > 0).sum()),
    }


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
