"""The posterior by independent linear algebra, the variances, and the ancestral step against diffusers'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PREDICTIONS, SCHEDULES, gaussian, generator, order_of, plane, randn
from torch import Tensor

from ldm.diffusion import forward, reverse, samplers
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule


def conditioned(schedule: NoiseSchedule, t: int, s: int, var0: float = 0.0) -> tuple[float, float, float]:
    """x_s given x_t (and x0, if var0 is 0), by conditioning their joint Gaussian, with x0 ~ N(0, var0) around its mean.

    Returns (factor of x_t, factor of the mean of x0, variance). The covariance comes from walking the chain.
    """
    betas = schedule.betas.tolist()
    alpha_s, var_s, decay, added = 1.0, var0, 1.0, 0.0
    for beta in betas[: s + 1]:
        alpha_s, var_s = math.sqrt(1 - beta) * alpha_s, (1 - beta) * var_s + beta
    for beta in betas[s + 1 : t + 1]:
        decay, added = math.sqrt(1 - beta) * decay, (1 - beta) * added + beta
    cov, var_t = decay * var_s, decay**2 * var_s + added
    gain = cov / var_t
    return gain, alpha_s - gain * decay * alpha_s, var_s - gain * cov


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pair", [(1, 0), (500, 499), (999, 998), (700, 300), (40, 3)])
def test_posterior_is_the_conditional_of_the_joint_gaussian(name: str, pair: tuple[int, int]) -> None:
    schedule, (t, s) = SCHEDULES[name], pair
    x0, x_t = randn(2, 3, seed=1), randn(2, 3, seed=2)
    mean, variance = reverse.posterior(schedule, x0, x_t, torch.tensor([t, t]), torch.tensor([s, s]))
    gain, rest, open_variance = conditioned(schedule, t, s)
    torch.testing.assert_close(mean, gain * x_t + rest * x0, rtol=1e-6, atol=1e-9)
    assert variance.flatten().tolist() == pytest.approx([open_variance] * 2, rel=1e-6)


def test_posterior_of_neighbors_is_the_textbook() -> None:
    """Ho et al. 2020, eq. 7, letter by letter."""
    schedule = NoiseSchedule.linear()
    x0, x_t, t = randn(3, 2, 2, seed=1), randn(3, 2, 2, seed=2), torch.tensor([1, 400, 999])
    mean, variance = reverse.posterior(schedule, x0, x_t, t, t - 1)
    beta, bar = schedule.betas[t][:, None, None], schedule.alpha_bar[t][:, None, None]
    before = schedule.alpha_bar[t - 1][:, None, None]
    textbook = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t
    torch.testing.assert_close(mean, textbook)
    torch.testing.assert_close(variance, (1 - before) / (1 - bar) * beta)


def test_the_clean_sample_is_a_point() -> None:
    schedule = NoiseSchedule.cosine()
    x0, x_t = randn(2, 3, seed=1), randn(2, 3, seed=2)
    mean, variance = reverse.posterior(schedule, x0, x_t, torch.tensor([0, 70]), torch.tensor([-1, -1]))
    torch.testing.assert_close(mean, x0)
    assert variance.flatten().tolist() == [0.0, 0.0]


def test_posterior_marginalizes_to_the_forward_process() -> None:
    """Drawing x_t and then x_s | x_t, x0 draws q(x_s | x0): as factors of x0 and variances, exactly."""
    schedule, t, s = NoiseSchedule.scaled_linear(), torch.tensor([640]), torch.tensor([210])
    one = torch.ones(1, 1, dtype=torch.float64)
    at_x0, variance = reverse.posterior(schedule, one, forward.q_sample(schedule, one, t, 0 * one), t, s)
    by_noise, _ = reverse.posterior(schedule, 0 * one, forward.q_sample(schedule, 0 * one, t, one), t, s)
    assert float(at_x0) == pytest.approx(float(schedule.alpha[210]))
    assert float(variance + by_noise**2) == pytest.approx(float(schedule.sigma[210] ** 2))


@given(t=st.sampled_from([0, 1, 2, 500, 998, 999]), data=st.data(), shape=st.lists(st.integers(1, 3), max_size=3))
def test_mean_gives_back_x0(t: int, data: st.DataObject, shape: list[int]) -> None:
    s = data.draw(st.sampled_from([-1, max(t - 7, -1), t - 1]))
    schedule = NoiseSchedule.linear()
    x0, x_t = randn(2, *shape, seed=1), randn(2, *shape, seed=2)
    ts, ss = torch.full((2,), t), torch.full((2,), s)
    mean, _ = reverse.posterior(schedule, x0, x_t, ts, ss)
    torch.testing.assert_close(reverse.x0_from_mean(schedule, mean, x_t, ts, ss), x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pair", [(5, 5), (5, 6), (0, -2), (1000, 3)])
def test_timesteps_out_of_order_are_refused(pair: tuple[int, int]) -> None:
    t, s = torch.tensor([pair[0]]), torch.tensor([pair[1]])
    with pytest.raises(IndexError, match="expected -1 <= s < t < 1000"):
        reverse.bridge(NoiseSchedule.linear(), t, s, 2)


# --- variances ---------------------------------------------------------------------------------


def test_learned_variance_runs_from_beta_tilde_to_beta_on_a_log_scale() -> None:
    schedule, t = NoiseSchedule.cosine(), torch.tensor([1, 300, 999])
    like = randn(3, 4)

    def at(fraction: float) -> torch.Tensor:
        return reverse.log_variance(schedule, t, t - 1, like, "learned", torch.full_like(like, fraction))

    beta = schedule.betas[t][:, None]
    beta_tilde = beta * (1 - schedule.alpha_bar[t - 1][:, None]) / (1 - schedule.alpha_bar[t][:, None])
    torch.testing.assert_close(at(1).exp(), beta.expand(3, 4))
    torch.testing.assert_close(at(-1).exp(), beta_tilde.expand(3, 4))
    torch.testing.assert_close(at(0).exp(), (beta * beta_tilde).sqrt().expand(3, 4))
    torch.testing.assert_close(reverse.log_variance(schedule, t, t - 1, like, "beta").exp(), beta)
    torch.testing.assert_close(reverse.log_variance(schedule, t, t - 1, like, "beta_tilde").exp(), beta_tilde)
    with pytest.raises(ValueError, match="learned with a fraction, got 'learned'"):
        reverse.log_variance(schedule, t, t - 1, like, "learned")


def test_at_the_clean_end_the_variance_stays_finite() -> None:
    schedule, t = NoiseSchedule.linear(), torch.tensor([0])
    first = schedule.betas[1] * (1 - schedule.alpha_bar[0]) / (1 - schedule.alpha_bar[1])
    for variance, fraction in (("beta_tilde", None), ("learned", -torch.ones(1, 1, dtype=torch.float64))):
        found = reverse.log_variance(schedule, t, t - 1, randn(1, 1), variance, fraction)  # type: ignore[arg-type]
        assert float(found.exp()) == pytest.approx(float(first))
    single = NoiseSchedule(torch.tensor([0.5], dtype=torch.float64))
    assert float(reverse.log_variance(single, t, t - 1, randn(1, 1), "beta_tilde").exp()) == pytest.approx(0.5)


@pytest.mark.parametrize("t", [1, 30, 500, 999])
def test_optimal_variance_is_that_of_the_data(t: int) -> None:
    """On a Gaussian, mean and learned variance together can be q(x_s | x_t) itself."""
    data, schedule = gaussian([0.7, -0.3], [0.5, 0.9]), NoiseSchedule.linear()
    x_t, steps = randn(4, 2, seed=2), torch.full((4,), t)
    mean, log_var = reverse.reverse_distribution(data.exact_reverse(schedule), x_t, steps, steps - 1)
    for i, (m, c) in enumerate(zip(data.means[0].tolist(), data.covs[0].diagonal().tolist(), strict=True)):
        gain, rest, variance = conditioned(schedule, t, t - 1, var0=c)
        torch.testing.assert_close(mean[:, i], gain * x_t[:, i] + rest * m, rtol=1e-8, atol=1e-10)
        assert log_var[:, i].exp().tolist() == pytest.approx([variance] * 4, rel=1e-6)


# --- ancestral sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(
    "variance", [("beta_tilde", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")]
)
@pytest.mark.parametrize("step", [(999, 1000), (500, 1000), (1, 1000), (0, 1000), (799, 5)])
def test_ancestral_step_is_that_of_diffusers(kind: Prediction, variance: Any, step: tuple[int, int]) -> None:
    ours, theirs = variance
    t, n = step
    schedule = NoiseSchedule.linear()
    stock = diffusers.DDPMScheduler(
        variance_type=theirs, clip_sample=False, timestep_spacing="trailing",
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[kind],
    )  # fmt: skip
    stock.set_timesteps(n)
    x_t, answer = randn(3, 2, 4, seed=1), randn(3, 4 if ours == "learned" else 2, 4, seed=2).tanh()
    expected = stock.step(answer, t, x_t, generator=generator(7), return_dict=False)[0]
    noise = torch.randn(x_t.shape, generator=generator(7), dtype=torch.float64)
    ts = torch.full((3,), t)
    denoiser = Denoiser(lambda *_: answer, schedule, kind, ours)
    found = reverse.ancestral_step(denoiser, x_t, ts, ts - 1000 // n, noise)
    tables = 1 / float(schedule.alpha[t]) + 1 / float(schedule.sigma[t] ** 2)  # theirs are float32, and divided by
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-7 * tables)


@pytest.mark.parametrize("t", [0, 199])
def test_the_clean_sample_gets_no_noise(t: int) -> None:
    """diffusers' DDPM leaves noise on it if t > 0 and the variance isn't fixed_small, at t = 199 of 5 steps, say."""
    answer, x_t, noise, ts = randn(3, 2, seed=1), randn(3, 2, seed=2), randn(3, 2, seed=3), torch.full((3,), t)
    denoiser = Denoiser(lambda *_: answer, NoiseSchedule.linear(), "x0", "beta")
    torch.testing.assert_close(reverse.ancestral_step(denoiser, x_t, ts, ts * 0 - 1, noise), answer)


def moments(steps: Iterable[Callable[[Tensor, Tensor], Tensor]], mean: float, var: float) -> tuple[float, float]:
    """Of what a sampler draws, on Gaussian data: its steps (x, noise) => x are a x + b + c noise; no sampling."""
    basis = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    noise = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    for step in steps:
        b, ab, cb = step(basis, noise).flatten().tolist()
        mean, var = (ab - b) * mean + b, (ab - b) ** 2 * var + (cb - b) ** 2
    return mean, var


def ancestral(denoiser: Denoiser, t: int, s: int) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, noise: Tensor) -> Tensor:
        return reverse.ancestral_step(denoiser, x, torch.full((len(x),), t), torch.full((len(x),), s), noise)

    return step


def ancestral_moments(denoiser: Denoiser, mean: float, var: float, timesteps: list[int]) -> tuple[float, float]:
    pairs = zip(timesteps, [*timesteps[1:], -1], strict=True)
    return moments((ancestral(denoiser, t, s) for t, s in pairs), mean, var)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ancestral_sampling_converges_with_order_one(variance: Any) -> None:
    data, schedule = gaussian([0.7], [0.5]), NoiseSchedule.linear()
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    denoiser = Denoiser(data.network(schedule, "v"), schedule, "v", variance)
    errors = []
    for n in (125, 250, 500, 1000):
        mean, var = ancestral_moments(denoiser, alpha * 0.7, alpha**2 * 0.25 + sigma**2, schedule.timesteps(n))
        errors.append(abs(var / 0.25 - 1) + abs(mean - 0.7))
    assert errors[-1] < 0.02
    assert order_of(errors) > 0.8


def test_ancestral_sampling_with_the_exact_variance_is_exact() -> None:
    data, schedule = gaussian([0.7], [0.5]), NoiseSchedule.linear(100)
    alpha, sigma = float(schedule.alpha[-1]), float(schedule.sigma[-1])
    mean, var = ancestral_moments(
        data.exact_reverse(schedule), alpha * 0.7, alpha**2 * 0.25 + sigma**2, schedule.timesteps()
    )
    # The last step draws no noise, so what x0 leaves open there is missing, and nothing else is.
    gain, _, missing = conditioned(schedule, 0, -1, var0=0.25)
    assert mean == pytest.approx(0.7, abs=1e-9)
    assert var + missing == pytest.approx(0.25, abs=1e-9)
    assert 0 < missing < 2e-4 and gain > 0


@given(
    kind=st.sampled_from(PREDICTIONS),
    variance=st.sampled_from(["beta", "beta_tilde", "learned"]),
    t=st.sampled_from([0, 1, 500, 998, 999]),
    far=st.booleans(),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_step_of_any_shape_and_dtype_is_that_of_float64(
    kind: Prediction, variance: Any, t: int, far: bool, shape: list[int], dtype: torch.dtype
) -> None:
    schedule, ts = NoiseSchedule.linear(), torch.full((2,), t)
    ss = torch.full((2,), max(t - 100, -1) if far else t - 1)
    channels = 2 * shape[0] if variance == "learned" else shape[0]
    answer = randn(2, channels, *shape[1:], seed=1).tanh().to(dtype)
    x, noise = randn(2, *shape, seed=2).to(dtype), randn(2, *shape, seed=3).to(dtype)
    found = reverse.ancestral_step(Denoiser(lambda *_: answer, schedule, kind, variance), x, ts, ss, noise)
    wide = Denoiser(lambda *_: answer.double(), schedule, kind, variance)
    expected = reverse.ancestral_step(wide, x.double(), ts, ss, noise.double())
    assert found.shape == x.shape and found.dtype == dtype and bool(found.isfinite().all())
    slack = 20 * torch.finfo(dtype).eps / float(schedule.alpha[t])  # x0 of eps divides by alpha
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=slack)


def test_a_draw_is_a_function_of_its_generator() -> None:
    data, schedule = plane(), NoiseSchedule.linear(20)
    x, denoiser = randn(4, 2), data.denoiser(schedule)
    first, again, other = (
        samplers.ancestral_sample(denoiser, x, schedule.timesteps(), generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_network_of_another_shape_is_refused() -> None:
    schedule, x, t = NoiseSchedule.linear(), randn(2, 3, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"expected \[2, 6, 4\] \(learned\), got \[2, 3, 4\]"):
        Denoiser(lambda x, t: x, schedule, "eps", "learned").x0(x, t)
    with pytest.raises(ValueError, match=r"expected \[2, 3, 4\] \(beta_tilde\), got \[2, 6, 4\]"):
        Denoiser(lambda x, t: torch.cat([x, x], 1), schedule).x0(x, t)
