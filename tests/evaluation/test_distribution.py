"""FID, KID, precision, recall, density and coverage against closed forms, loops and another library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from ldm.evaluation.metrics.distribution import (
    all_metrics,
    fid,
    fid_estimate,
    kid_estimate,
    neighborhood_metrics,
    project_to_span,
    with_baseline,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_with_moments(mean: Tensor, cov: Tensor, n: int, seed: int) -> Tensor:
    """A sample [n,D] with exactly this mean and covariance."""
    x = randn(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ torch.linalg.cholesky(cov).T + mean


def covariance(dim: int, seed: int) -> Tensor:
    root = randn(dim, dim, seed=seed)
    return root @ root.T + torch.eye(dim)


# --- FID -----------------------------------------------------------------------------------------


def test_fid_of_gaussians_is_the_closed_form() -> None:
    """Isotropic ones: |m1 - m2|^2 + D (s1 - s2)^2. Correlated ones: scipy's matrix square root."""
    dim, eye = 5, torch.eye(5, dtype=torch.float64)
    shift = torch.full((dim,), 2.0, dtype=torch.float64)
    a, b = sample_with_moments(torch.zeros_like(shift), 4 * eye, 60, 0), sample_with_moments(shift, 9 * eye, 80, 1)
    assert fid(a, b) == pytest.approx(dim * 4 + dim * (2 - 3) ** 2, rel=1e-6)

    c1, c2 = covariance(dim, 2), covariance(dim, 3)
    a, b = sample_with_moments(torch.zeros_like(shift), c1, 60, 0), sample_with_moments(shift, c2, 80, 1)
    expected = dim * 4 + np.trace(c1 + c2 - 2 * sqrtm((c1 @ c2).numpy()).real)
    assert fid(a, b) == pytest.approx(expected, rel=1e-6)
    assert fid(a, a) == pytest.approx(0, abs=1e-6)


def test_fid_of_few_vectors_is_the_same_in_their_span() -> None:
    a, b = randn(12, 100), randn(15, 100, seed=1) * 1.5 + 0.3
    inside = project_to_span(a, b)
    assert inside[0].shape == (12, 27) and inside[1].shape == (15, 27)
    torch.testing.assert_close(torch.cdist(*inside), torch.cdist(a, b))
    # the full formula, its root taken of the symmetric sqrt(C1) C2 sqrt(C1)
    c1, c2 = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(c1)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    tr_root = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(c1) + np.trace(c2) - 2 * tr_root
    assert fid_estimate(a, b, 3)["value"] == pytest.approx(expected, rel=1e-4)


# --- KID -----------------------------------------------------------------------------------------


def kid_by_loops(generated: Tensor, real: Tensor) -> float:
    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(k(x, y) for x, y in pairs) / len(pairs)

    def others(xs: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, y) for i, x in enumerate(xs) for j, y in enumerate(xs) if i != j]

    return mean(others(generated)) + mean(others(real)) - 2 * mean([(x, y) for x in generated for y in real])


def test_kid_is_the_unbiased_estimator() -> None:
    generated, real = randn(9, 4), randn(14, 4, seed=1) + 0.5
    assert kid_estimate(generated, real, 10)["value"] == pytest.approx(kid_by_loops(generated, real))
    assert kid_estimate(generated, real[:9], 10)["value"] == pytest.approx(float(poly_mmd(real[:9], generated)))


def test_resampled_kid_is_centered_and_its_error_is_that_of_fresh_samples() -> None:
    """Resampling with the diagonal left in would be off by k(x, x) / n, many standard errors here."""
    real = randn(200, 4, seed=1)
    fresh = torch.tensor([kid_estimate(randn(50, 4, seed=i) + 0.5, real, 2)["value"] for i in range(2, 202)])
    estimates = [kid_estimate(randn(50, 4, seed=i) + 0.5, real, 400) for i in range(2, 32)]
    errors = torch.tensor([each["standard_error"] for each in estimates])
    assert float(errors.mean()) == pytest.approx(float(fresh.std()), rel=0.25)
    inside = [each["low"] <= float(fresh.mean()) <= each["high"] for each in estimates]
    assert sum(inside) >= 25  # of 30, at 95 %


# --- precision, recall, density, coverage --------------------------------------------------------


def neighborhood_by_loops(generated: np.ndarray[Any, Any], real: np.ndarray[Any, Any], k: int) -> dict[str, float]:
    def radius(points: np.ndarray[Any, Any], i: int) -> float:
        return sorted(np.linalg.norm(points[i] - other) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(x: Any, points: np.ndarray[Any, Any], i: int) -> bool:
        return bool(np.linalg.norm(x - points[i]) <= radius(points, i))

    n, m = len(generated), len(real)
    return {
        "precision": sum(any(inside(x, real, i) for i in range(m)) for x in generated) / n,
        "recall": sum(any(inside(y, generated, i) for i in range(n)) for y in real) / m,
        "density": sum(inside(x, real, i) for x in generated for i in range(m)) / (k * n),
        "coverage": sum(any(inside(x, real, i) for x in generated) for i in range(m)) / m,
    }


@pytest.mark.parametrize("k", [1, 3])
def test_neighborhoods_are_those_of_the_definitions(k: int) -> None:
    generated, real = randn(13, 3) * 0.7 + 0.4, randn(17, 3, seed=1)
    expected = neighborhood_by_loops(generated.numpy(), real.numpy(), k)
    found = {name: float(values.mean()) for name, values in neighborhood_metrics(generated, real, k).items()}
    assert found == pytest.approx(expected)
    assert 0 < found["coverage"] < 1 and 0 < found["recall"] < 1  # neither end, where mistakes hide


def test_mode_collapse_and_off_manifold_samples_are_distinguished() -> None:
    """A model of one mode has precision without recall; a model of something else has neither."""
    real = torch.cat([randn(60, 2), randn(60, 2, seed=1) + 20])
    narrow = {name: float(x.mean()) for name, x in neighborhood_metrics(randn(60, 2, seed=2), real).items()}
    beside = {name: float(x.mean()) for name, x in neighborhood_metrics(randn(60, 2, seed=3) + 10, real).items()}
    assert narrow["precision"] > 0.8 and narrow["recall"] < 0.6 and narrow["coverage"] < 0.6
    assert beside["precision"] == beside["coverage"] == beside["density"] == 0


# --- the baseline -----------------------------------------------------------------------------------


def test_a_perfect_model_reaches_the_baseline_and_a_poor_one_does_not() -> None:
    reference, same = randn(120, 6), randn(40, 6, seed=1)
    perfect = with_baseline(same, same, reference, 50, 5)
    assert perfect["drawn"] == perfect["floor"]
    assert perfect["n"] == 40 and perfect["reference_n"] == 120
    poor = with_baseline(same + 2, same, reference, 50, 5)
    for name in ("fid", "kid"):
        assert poor["drawn"][name]["low"] > poor["floor"][name]["high"]
    for name in ("precision", "density", "coverage"):
        assert poor["drawn"][name]["high"] < poor["floor"][name]["low"]


def test_estimates_have_n_and_an_interval() -> None:
    for name, estimate in all_metrics(randn(20, 4), randn(30, 4, seed=1), 50, 5).items():
        assert estimate["low"] <= estimate["value"] <= estimate["high"], name
        assert estimate["n"] == (30 if name in ("recall", "coverage") else 20)
