"""The chain and its shortcut give the same distribution, and the one that the data imply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SCHEDULES, Mixture, assert_drawn_from, generator, plane, randn

from ldm.diffusion import forward
from ldm.diffusion.schedule import NoiseSchedule


def noised(data: Mixture, alpha: float, sigma: float) -> Mixture:
    """The distribution of alpha x0 + sigma eps."""
    eye = torch.eye(data.dim, dtype=torch.float64)
    return replace(data, means=alpha * data.means, covs=alpha**2 * data.covs + sigma**2 * eye)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_compose_to_the_marginal(name: str) -> None:
    """Exactly: follow the factor of x0 and the variance of the noise through every q(x_t | x_{t-1})."""
    schedule = SCHEDULES[name]
    one = torch.ones(1, 1, dtype=torch.float64)
    factor, variance = one, 0 * one
    for step in range(schedule.T):
        t = torch.tensor([step])
        by_signal = forward.q_step(schedule, one, t, 0 * one)
        by_noise = forward.q_step(schedule, 0 * one, t, one)
        factor, variance = by_signal * factor, by_signal**2 * variance + by_noise**2
        torch.testing.assert_close(factor, forward.q_sample(schedule, one, t, 0 * one), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(variance, forward.q_sample(schedule, 0 * one, t, one) ** 2, rtol=1e-9, atol=1e-12)


def test_chain_and_shortcut_draw_the_noised_data() -> None:
    data, n, rng = plane(), 4000, generator(5)
    schedule = NoiseSchedule.linear(60, 1e-3, 0.1)
    x0 = data.sample(n, rng)
    x = x0
    for step in range(schedule.T):
        x = forward.q_step(schedule, x, torch.full((n,), step), torch.randn(n, 2, generator=rng, dtype=torch.float64))
        if step in (0, 20, 59):
            expected = noised(data, float(schedule.alpha[step]), float(schedule.sigma[step]))
            assert_drawn_from(x, expected)
            eps = torch.randn(n, 2, generator=rng, dtype=torch.float64)
            assert_drawn_from(forward.q_sample(schedule, x0, torch.full((n,), step), eps), expected)


def test_each_sample_has_its_own_t() -> None:
    schedule = NoiseSchedule.linear()
    x0, eps, t = randn(3, 2, 4, 4, seed=1), randn(3, 2, 4, 4, seed=2), torch.tensor([0, 500, 999])
    together = forward.q_sample(schedule, x0, t, eps)
    for i in range(3):
        one = forward.q_sample(schedule, x0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], one, rtol=0, atol=0)
        expected = schedule.alpha_bar[t[i]].sqrt() * x0[i] + (1 - schedule.alpha_bar[t[i]]).sqrt() * eps[i]
        torch.testing.assert_close(together[i], expected)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    t=st.sampled_from([0, 1, 500, 998, 999]),
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_shape_and_dtype_is_noised_as_float64_is(name: str, t: int, shape: list[int], dtype: torch.dtype) -> None:
    schedule, steps = SCHEDULES[name], torch.full((2,), t)
    x, noise = randn(2, *shape, seed=1).to(dtype), randn(2, *shape, seed=2).to(dtype)
    for draw in (forward.q_step, forward.q_sample):
        found, expected = draw(schedule, x, steps, noise), draw(schedule, x.double(), steps, noise.double())
        assert found.shape == x.shape and found.dtype == dtype
        # Where beta ends near 1 ("cosine"), its rounding error is large beside 1 - beta, and the root makes it larger.
        slack = torch.finfo(dtype).eps ** (0.5 if draw is forward.q_step and t == 999 else 1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=10 * slack)
