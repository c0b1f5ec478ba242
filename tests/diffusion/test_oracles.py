"""The oracles themselves, against numerical integration and textbook densities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import (
    Mixture,
    assert_drawn_from,
    expectation_grid,
    gaussian,
    generator,
    hermite,
    line,
    plane,
    randn,
    space,
)
from scipy.integrate import quad
from scipy.stats import multivariate_normal

ALL = {"gaussian": gaussian([0.7], [0.5]), "line": line(), "plane": plane(), "space": space()}


@pytest.mark.parametrize("name", ALL)
def test_density_is_that_of_scipy(name: str) -> None:
    data = ALL[name]
    x = randn(5, data.dim, seed=1)
    alpha, sigma = 0.8, 0.6
    covs = alpha**2 * data.covs + sigma**2 * torch.eye(data.dim, dtype=torch.float64)
    density = np.zeros(5)
    for w, m, c in zip(data.weights.tolist(), alpha * data.means, covs, strict=True):
        density += w * multivariate_normal(m.numpy(), c.numpy()).pdf(x.numpy())
    np.testing.assert_allclose(data.log_prob(x, alpha, sigma).numpy(), np.log(density), rtol=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("level", [(0.99, 0.1), (0.6, 0.8), (0.05, 0.99)])
def test_denoiser_obeys_tweedie(name: str, level: tuple[float, float]) -> None:
    """E[x0 | x] = (x + sigma**2 score) / alpha, the score by differentiating the density."""
    data, (alpha, sigma) = ALL[name], level
    x = alpha * data.sample(7, generator()) + sigma * randn(7, data.dim, seed=2)
    torch.testing.assert_close(data.denoise(x, alpha, sigma), (x + sigma**2 * data.score(x, alpha, sigma)) / alpha)


def test_denoiser_and_variance_by_integration() -> None:
    """Bayes' rule, integrated over x0 by scipy."""
    data, alpha, sigma = line(), 0.7, 0.5
    columns = data.weights.tolist(), data.means.flatten().tolist(), data.covs.flatten().tolist()
    components = list(zip(*columns, strict=True))

    for x in (-1.0, 0.1, 0.9):

        def joint(x0: float, power: int, x: float = x) -> float:
            prior = sum(w * np.exp(-((x0 - m) ** 2) / (2 * c)) / np.sqrt(c) for w, m, c in components)
            return float(x0**power * prior * np.exp(-((x - alpha * x0) ** 2) / (2 * sigma**2)))

        m0, m1, m2 = (quad(joint, -4, 4, args=(p,), limit=200, epsabs=1e-12)[0] for p in range(3))
        point = torch.tensor([[x]], dtype=torch.float64)
        assert data.denoise(point, alpha, sigma).item() == pytest.approx(m1 / m0, abs=1e-8)
        assert data.total_variance(point, alpha, sigma).item() == pytest.approx(m2 / m0 - (m1 / m0) ** 2, abs=1e-8)


@pytest.mark.parametrize("data", [line(), plane(), space()], ids=["line", "plane", "space"])
def test_samples_have_the_moments(data: Mixture) -> None:
    assert_drawn_from(data.sample(6_000, generator(3)), data)


def test_the_sampling_error_is_computed_well() -> None:
    """Right samples fail about as often as the level says, and samples of other data always."""
    data, rng = plane(), generator(4)
    failures = 0
    for _ in range(60):
        try:
            assert_drawn_from(data.sample(2_000, rng), data, level=0.1)
        except AssertionError:
            failures += 1
    assert failures <= 15  # 6 expected; more than 15 has probability 1e-4
    shifted = replace(data, means=data.means + 0.1)
    heavier = replace(data, weights=torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64))
    wider = replace(data, covs=data.covs * 1.5)
    for other in (shifted, heavier, wider):
        with pytest.raises(AssertionError, match="standard errors off"):
            assert_drawn_from(other.sample(2_000, rng), data)


def test_hermite_integrates_polynomials() -> None:
    z, w = hermite(6)
    for power, moment in enumerate([1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 15.0]):
        assert float((w * z**power).sum()) == pytest.approx(moment, abs=1e-12)


def test_expectation_grid_has_the_moments() -> None:
    data = line()
    x0, eps, w = expectation_grid(data, 8)
    assert float((w[:, None] * x0).sum()) == pytest.approx(float(data.mean), abs=1e-12)
    assert float((w[:, None] * x0**2 * eps**2).sum()) == pytest.approx(float(data.cov + data.mean**2), abs=1e-12)
