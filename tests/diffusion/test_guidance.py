"""Guided scores are the combination they claim to be, and what guided sampling draws is what the guided ODE says."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    PREDICTIONS,
    SCHEDULES,
    Mixture,
    assert_drawn_from,
    double,
    expectation_grid,
    gaussian,
    generator,
    order_of,
    plane,
    randn,
    space,
)
from scipy.integrate import solve_ivp
from test_losses import PAIR, descend
from torch import Tensor

from ldm.diffusion import guidance
from ldm.diffusion import samplers as score
from ldm.diffusion.parameterization import Prediction, to_eps, to_v, to_x0
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
EVERYTHING = plane()
#: The condition is to be of the first two of the three components.
WEIGHTS = double([0.5, 0.3])
CONDITION = Mixture(WEIGHTS / WEIGHTS.sum(), EVERYTHING.means[:2], EVERYTHING.covs[:2])


def guided(positive: Mixture, negative: Mixture, schedule: NoiseSchedule, kind: Prediction, scale: float) -> Denoiser:
    one, other = positive.network(schedule, kind), negative.network(schedule, kind)
    return Denoiser(lambda x, t: guidance.guide(one(x, t), other(x, t), scale), schedule, kind)


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("name", ["linear", "variance_exploding", "zero_snr"])
def test_guided_score_is_the_combination_of_the_exact_scores(kind: Prediction, scale: float, name: str) -> None:
    """(1 - w) unconditional + w conditional, at every t, whatever the networks predict."""
    schedule, t = SCHEDULES[name], torch.arange(1000)
    x_t = randn(len(t), 2, seed=1)
    alpha, sigma = schedule.at(t, x_t)
    found = guided(CONDITION, EVERYTHING, schedule, kind, scale).score(x_t, t)
    expected = (1 - scale) * EVERYTHING.score(x_t, alpha, sigma) + scale * CONDITION.score(x_t, alpha, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_scale_one_is_the_condition_and_zero_is_without(kind: Prediction) -> None:
    one, other = randn(3, 4, seed=1), randn(3, 4, seed=2)
    torch.testing.assert_close(guidance.guide(one, other, 1.0), one, rtol=0, atol=1e-15)
    assert torch.equal(guidance.guide(one, other, 0.0), other)
    x, schedule = randn(5, 2), SCHEDULE if kind == "eps" else SCHEDULES["zero_snr"]
    for scale, data in ((1.0, CONDITION), (0.0, EVERYTHING)):
        pair, steps = guided(CONDITION, EVERYTHING, schedule, kind, scale), schedule.timesteps(20)
        alone = score.ode_sample(data.denoiser(schedule, kind), x, steps)
        torch.testing.assert_close(score.ode_sample(pair, x, steps), alone, rtol=0, atol=1e-10)


@given(
    scale=st.floats(-5, 20), kind=st.sampled_from(PREDICTIONS), t=st.sampled_from([0, 1, 500, 999]),
    shape=st.lists(st.integers(1, 3), max_size=3),
)  # fmt: skip
def test_guiding_commutes_with_conversion(scale: float, kind: Prediction, t: int, shape: list[int]) -> None:
    x_t, one, other = (randn(2, *shape, seed=i) for i in range(3))
    alpha, sigma = SCHEDULE.at(torch.tensor([t, t]), x_t)
    for convert in (to_eps, to_x0, to_v):
        before = convert(kind, guidance.guide(one, other, scale), x_t, alpha, sigma)
        after = guidance.guide(convert(kind, one, x_t, alpha, sigma), convert(kind, other, x_t, alpha, sigma), scale)
        torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_an_exact_classifier_guides_like_the_pair(kind: Prediction, scale: float) -> None:
    """Bayes: the unconditional answer and log p(c | x_t) together are classifier-free guidance."""
    t = torch.tensor([0, 10, 400, 800, 999])
    x_t = randn(5, 2, seed=1)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return EVERYTHING.responsibilities(x, SCHEDULE.alpha[t], SCHEDULE.sigma[t])[:, :2].sum(1).log()

    output = EVERYTHING.network(SCHEDULE, kind)(x_t, t)
    for sampling in (torch.no_grad, torch.inference_mode):
        with sampling():
            found = guidance.classifier_guidance(kind, output, x_t, t, SCHEDULE, log_prob, scale)
        assert not found.requires_grad
        expected = guided(CONDITION, EVERYTHING, SCHEDULE, kind, scale).network(x_t, t)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_classifier_loss_is_least_at_the_true_posterior() -> None:
    """Two classes of one width on a line: log p(1 | x_t) - log p(0 | x_t) is a line, and descent finds it."""
    x0, eps, w = expectation_grid(PAIR, 30)
    labels = (torch.arange(len(x0)) >= len(x0) // 2).long()  # the grid goes through one component, then the other
    t = torch.full((len(x0),), 300)

    def logits(theta: Tensor, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), theta[0] + theta[1] * x + theta[2] * x**3], dim=1)

    def loss(theta: Tensor) -> Tensor:
        return guidance.classifier_loss(lambda x, _: logits(theta, x), SCHEDULE, x0, t, eps, labels) @ w

    theta = descend(loss, [0.0, 0.5, 0.1])
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)[:, None]
    exact = PAIR.responsibilities(x, float(SCHEDULE.alpha[300]), float(SCHEDULE.sigma[300]))
    torch.testing.assert_close(logits(theta, x).softmax(1), exact, rtol=0, atol=1e-4)
    ones = torch.ones(30, dtype=torch.int64)
    log_prob = guidance.class_log_prob(lambda x, _: logits(theta, x), ones)
    torch.testing.assert_close(log_prob(x, ones).exp(), exact[:, 1], rtol=0, atol=1e-4)


# --- rescale, interval, autoguidance -----------------------------------------------------------


@given(amount=st.floats(0, 1), shape=st.lists(st.integers(2, 4), min_size=1, max_size=3))
def test_rescale_restores_the_deviation_of_each_sample(amount: float, shape: list[int]) -> None:
    positive, guided = randn(3, *shape, seed=1), randn(3, *shape, seed=2)
    guided = guided * double([1.0, 5.0, 30.0]).reshape(3, *[1] * len(shape))
    found = guidance.rescale(guided, positive, amount)
    for i in range(3):
        ratio = float(positive[i].std() / guided[i].std())
        torch.testing.assert_close(found[i], guided[i] * (amount * ratio + 1 - amount))
    torch.testing.assert_close(guidance.rescale(guided, positive, 1.0).flatten(1).std(1), positive.flatten(1).std(1))
    assert torch.equal(guidance.rescale(guided, positive, 0.0), guided)


def test_interval_guides_inside_and_nowhere_else() -> None:
    scales = [guidance.interval_scale(4.0, t, 10, (0.2, 0.7)) for t in range(10)]
    assert scales == [1, 1, 4, 4, 4, 4, 4, 1, 1, 1]
    assert [guidance.interval_scale(4.0, t, 10) for t in (0, 9)] == [4, 4]


def test_autoguidance_corrects_an_error_that_the_weak_copy_exaggerates() -> None:
    """Karras et al. 2024: if the weak model errs twice as far in the same direction, scale 2 lands on the truth."""
    t = torch.tensor([30, 500, 999])
    x_t = randn(3, 2, seed=1)
    truth, error = EVERYTHING.network(SCHEDULE, "v")(x_t, t), randn(3, 2, seed=2)
    torch.testing.assert_close(guidance.guide(truth + error, truth + 2 * error, 2.0), truth)


# --- what is drawn -----------------------------------------------------------------------------

#: p(x) and p(x | c), of one dimension, and the guidance scale: docs/theory.md quotes what follows from them.
PLAIN, NARROW, SCALE = gaussian([0.0], [1.0]), gaussian([0.8], [0.5]), 3.0


def guided_flow(positive: Mixture, negative: Mixture, scale: float, start: float = math.pi / 2) -> np.ndarray:
    """Where the guided ODE of two Gaussians takes 0 and each unit vector, from the angle `start` down to no noise.

    It is linear, so N(0, I) goes to a normal of mean m and covariance M M', [m; m + columns of M] being what is
    returned, [d + 1, d]. The textbook's formulas in numpy, integrated by scipy.
    """
    d = positive.dim
    pairs = [(g.means[0].numpy(), g.covs[0].numpy(), w) for g, w in ((positive, scale), (negative, 1 - scale))]

    def field(phi: float, state: np.ndarray) -> np.ndarray:
        x, a, s = state.reshape(d + 1, d), math.cos(phi), math.sin(phi)
        x0 = sum(w * (m + np.linalg.solve(a**2 * c + s**2 * np.eye(d), (x - a * m).T).T @ (a * c)) for m, c, w in pairs)
        return ((a * x - x0) / s).flatten()

    points = np.concatenate([np.zeros((1, d)), np.eye(d)])
    return (
        solve_ivp(field, (start, 1e-5), points.flatten(), rtol=1e-10, atol=1e-12, method="DOP853")
        .y[:, -1]
        .reshape(d + 1, d)
    )


@functools.cache
def cached_flow(dim: int, scale: float, start: float) -> np.ndarray:
    return guided_flow(*GAUSSIANS[dim], scale, start)


def solved(scale: float) -> tuple[float, float]:
    """Mean and deviation of what the guided ODE of `NARROW` and `PLAIN` draws from N(0, 1)."""
    (mean,), (moved,) = guided_flow(NARROW, PLAIN, scale)
    return float(mean), float(moved - mean)


def tilted(scale: float) -> tuple[float, float]:
    """Mean and deviation of the normalized p(x) p(c | x)**scale, that is p(x)**(1 - scale) p(x | c)**scale."""
    precision = (1 - scale) / 1.0**2 + scale / 0.5**2
    return scale * 0.8 / 0.5**2 / precision, precision**-0.5


def test_the_guided_ode_multiplies_deviations() -> None:
    """A closed form beside the numerical one: in the view y = x / alpha the guided ODE scales distances by
    (1 + s**2)**((1 - w) / 2) (0.25 + s**2)**(w / 2), so deviations combine geometrically: 1**(1 - w) 0.5**w."""
    for scale in (0.0, 1.0, 2.0, SCALE):
        assert solved(scale)[1] == pytest.approx(0.5**scale, rel=1e-4)
    assert solved(0.0) == pytest.approx((0.0, 1.0), abs=1e-4)
    assert solved(1.0) == pytest.approx((0.8, 0.5), abs=1e-4)


def correlated(mean: Any, cov: Any) -> Mixture:
    return Mixture(double([1.0]), torch.as_tensor(mean).double()[None], torch.as_tensor(cov).double()[None])


#: Conditional and unconditional Gaussian; the covariances of a pair don't commute in more than one dimension.
GAUSSIANS = {
    1: (NARROW, PLAIN),
    2: (correlated([0.8, -0.3], [[0.3, 0.1], [0.1, 0.2]]), correlated([0.0, 0.0], [[1.0, -0.3], [-0.3, 0.8]])),
    64: tuple(correlated(mean, cov) for mean, cov in zip(space().means, space().covs, strict=True)),
}


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("dim, scale", [(1, 0.0), (1, 1.0), (1, 2.0), (1, SCALE), (2, 2.0), (2, SCALE), (64, 2.0)])
def test_guided_sampling_draws_what_the_guided_ode_says(kind: Prediction, dim: int, scale: float) -> None:
    """A linear map takes N(0, I) to what is drawn: the sampler's, against that of the ODE, nearer with more steps;
    and drawn samples, within their sampling error."""
    positive, negative = GAUSSIANS[dim]
    schedule = SCHEDULE if kind == "eps" else SCHEDULES["zero_snr"]
    start = math.atan2(float(schedule.sigma[-1]), float(schedule.alpha[-1]))
    expected = torch.from_numpy(cached_flow(dim, scale, start))
    denoiser = guided(positive, negative, schedule, kind, scale)
    points = torch.cat([torch.zeros(1, dim), torch.eye(dim)]).double()
    errors = []
    for n in (50, 100, 200):
        found = score.ode_sample(denoiser, points, schedule.timesteps(n))
        errors.append(float((found - expected).abs().max()))
    assert errors[-1] < 0.02 and order_of(errors) > 0.7  # the last step, to clean data, is of first order
    x = torch.randn(2000 if dim < 64 else 500, dim, generator=generator(1), dtype=torch.float64)
    mean, columns = expected[0], expected[1:] - expected[0]
    drawn = score.ode_sample(denoiser, x, schedule.timesteps(125))
    assert_drawn_from(drawn, Mixture(double([1.0]), mean[None], (columns.T @ columns)[None]), bias=0.04)


def test_guided_sampling_does_not_draw_the_tilted_density() -> None:
    """p(x) p(c | x)**3 is wider, and centered elsewhere, than what guidance of scale 3 draws."""
    (mean, std), (tilted_mean, tilted_std) = solved(SCALE), tilted(SCALE)
    assert std == pytest.approx(0.125, abs=1e-3) and tilted_std == pytest.approx(0.316, abs=1e-3)
    assert tilted_mean == pytest.approx(0.96, abs=1e-3)
    assert mean - tilted_mean > 0.1
    schedule = SCHEDULES["zero_snr"]
    x = torch.randn(2000, 1, generator=generator(1), dtype=torch.float64)
    drawn = score.ode_sample(guided(NARROW, PLAIN, schedule, "v", SCALE), x, schedule.timesteps(125))
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_drawn_from(drawn, gaussian([tilted_mean], [tilted_std]))
    for scale in (0.0, 1.0):  # and where guidance adds nothing, the two agree
        assert solved(scale) == pytest.approx(tilted(scale), abs=1e-4)


def test_interval_guidance_is_the_conditional_model_outside() -> None:
    """With an empty interval the draw is the conditional model's, to the last bit."""
    schedule = SCHEDULES["zero_snr"]
    one, other = NARROW.network(schedule, "v"), PLAIN.network(schedule, "v")

    def network(interval: tuple[float, float]) -> Denoiser:
        def forward(x: Tensor, t: Tensor) -> Tensor:
            scale = guidance.interval_scale(SCALE, int(t[0]), schedule.T, interval)
            return guidance.guide(one(x, t), other(x, t), scale)

        return Denoiser(forward, schedule, "v")

    x, steps = randn(20, 1), schedule.timesteps(50)
    conditional = score.ode_sample(replace(network((0, 0)), network=one), x, steps)
    torch.testing.assert_close(score.ode_sample(network((0, 0)), x, steps), conditional)
    deviations = [float(score.ode_sample(network(i), x, steps).std()) for i in ((0, 0), (0.2, 0.7), (0, 1))]
    assert deviations[0] > deviations[1] > deviations[2]
