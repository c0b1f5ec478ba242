"""Every term of the bound against closed forms; the decoder against scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PREDICTIONS, Mixture, double, expectation_grid, gaussian, generator, hermite, line, randn
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.diffusion import forward, likelihood
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule

#: Few steps, so that every term can be computed by quadrature; noise enough at the end to be nearly normal.
SHORT = NoiseSchedule.linear(60, 1e-3, 0.3)


def expected_terms(denoiser: Denoiser, x0: Tensor, eps: Tensor, weights: Tensor) -> Tensor:
    """E L_t for every t, [T]: x0, eps [N, d] and weights [N] integrate over the data and the noise."""
    T, n = denoiser.schedule.T, len(x0)
    t = torch.arange(T).repeat_interleave(n)
    x0, eps = x0.repeat(T, 1), eps.repeat(T, 1)
    x_t = forward.q_sample(denoiser.schedule, x0, t, eps)
    return likelihood.vlb_term(denoiser, x0, x_t, t, t - 1).reshape(T, n) @ weights


def gaussian_grid(data: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """For a Gaussian with independent dimensions, whose terms are sums over them: one grid serves each dimension."""
    z, w = hermite(4)
    pairs = torch.cartesian_prod(z, z)
    x0 = data.means + data.covs[0].diagonal().sqrt() * pairs[:, :1]
    return x0, pairs[:, 1:].expand_as(x0), torch.outer(w, w).flatten()


WIDE = gaussian(randn(64, seed=5).tolist(), (0.2 + 0.7 * torch.linspace(0, 1, 64)).tolist())
GAUSSIANS = {1: gaussian([0.7], [0.5]), 2: gaussian([0.7, -0.3], [0.5, 0.9]), 64: WIDE}


# --- the bound ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", GAUSSIANS)
def test_bound_is_the_entropy_when_every_step_is_exact(dim: int) -> None:
    """With p(x_s | x_t) = q(x_s | x_t) nothing is lost but KL(q(x_T) || N(0, I)): E[bound] = H(x0) + that."""
    data, schedule = GAUSSIANS[dim], NoiseSchedule.linear()
    x0, eps, w = gaussian_grid(data)
    bound = expected_terms(data.exact_reverse(schedule), x0, eps, w).sum() + likelihood.prior_kl(schedule, x0) @ w
    mean, var = data.means[0], data.covs[0].diagonal()
    entropy = 0.5 * (2 * math.pi * math.e * var).log().sum()
    last = schedule.alpha_bar[-1]
    marginal = Normal(last.sqrt() * mean, (last * var + 1 - last).sqrt())
    lost = kl_divergence(marginal, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum()
    assert float((bound - entropy - lost) / dim) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_terms_of_a_mixture_have_their_closed_form(prediction: Prediction, variance: Any) -> None:
    """E L_t = (log(v / bt) - 1 + bt / v + c**2 MMSE_t / v) / 2, where v is the variance of p, bt = beta_tilde, c the
    factor of x0 in the posterior mean, and MMSE_t = E Var[x0 | x_t], here integrated over a fine grid of x_t."""
    data, schedule = line(), SHORT
    denoiser = Denoiser(data.network(schedule, prediction), schedule, prediction, variance)
    found = expected_terms(denoiser, *expectation_grid(data, 40))
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    bar, beta = schedule.alpha_bar, schedule.betas
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar])[:-1]
    beta_tilde = beta * (1 - before) / (1 - bar)
    beta_tilde[0] = beta_tilde[1]
    for t in range(schedule.T):
        a, s = float(bar[t].sqrt()), float((1 - bar[t]).sqrt())
        mmse = float(torch.trapezoid(data.log_prob(x, a, s).exp() * data.total_variance(x, a, s), x[:, 0]))
        v, bt = float((beta if variance == "beta" else beta_tilde)[t]), float(beta_tilde[t])
        if t > 0:
            c = float(before[t].sqrt() * beta[t] / (1 - bar[t]))
            closed = 0.5 * (math.log(v / bt) - 1 + bt / v + c**2 * mmse / v)
        else:
            closed = 0.5 * (math.log(2 * math.pi * v) + mmse / v)
        assert float(found[t]) == pytest.approx(closed, abs=1e-4)


def test_bound_bounds_and_more_steps_bind_tighter() -> None:
    """On a mixture: above the entropy for any number of steps, and closer with more."""
    data = line()
    x0, eps, w = expectation_grid(data, 40)
    entropy = -float(data.log_prob(x0) @ w)
    gaps = []
    for T in (30, 120):
        schedule = NoiseSchedule.linear(T, 3e-3 * 30 / T, min(0.6 * 30 / T, 0.9))
        bound = expected_terms(data.denoiser(schedule), x0, eps, w).sum() + likelihood.prior_kl(schedule, x0) @ w
        gaps.append(float(bound) - entropy)
    assert 0 < gaps[1] < 0.6 * gaps[0]


@pytest.mark.parametrize("steps", [60, 12, 1])
def test_elbo_estimates_the_bound(steps: int) -> None:
    """Drawn noise, against the expectation, within the sampling error; chains of fewer steps too."""
    data, rng = gaussian([0.7, -0.3], [0.5, 0.9]), generator(3)
    x0 = data.sample(3000, rng)
    timesteps = SHORT.timesteps(steps)
    found = likelihood.elbo(data.denoiser(SHORT), x0, generator=rng, timesteps=timesteps)
    assert found.timesteps == timesteps and found.terms.shape == (3000, steps) and found.prior.shape == (3000,)
    grid_x0, eps, w = gaussian_grid(data)
    expected = float(likelihood.prior_kl(SHORT, grid_x0) @ w)
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        ts, ss = torch.full((len(w),), t), torch.full((len(w),), s)
        x_t = forward.q_sample(SHORT, grid_x0, ts, eps)
        expected += float(likelihood.vlb_term(data.denoiser(SHORT), grid_x0, x_t, ts, ss) @ w)
    error = float(found.total.std() / 3000**0.5)
    assert abs(float(found.total.mean()) - expected) < 4 * error
    assert float(found.total.mean()) > float(-data.log_prob(x0).mean()) - 4 * error


def test_elbo_starts_at_the_last_timestep() -> None:
    with pytest.raises(ValueError, match="the chain starts at 59, got 58"):
        likelihood.elbo(line().denoiser(SHORT), randn(2, 1), generator=generator(), timesteps=[58, 0])


def test_prior_kl_against_torch() -> None:
    """Also where much of x0 is left at the end."""
    x0 = randn(3, 2, 4, seed=1)
    for schedule in (SHORT, NoiseSchedule.linear(60)):
        alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
        expected = kl_divergence(Normal(alpha * x0, sigma), Normal(torch.zeros_like(x0), 1.0)).sum((1, 2))
        torch.testing.assert_close(likelihood.prior_kl(schedule, x0), expected)
    assert likelihood.prior_kl(SHORT.rescale_zero_terminal_snr(), x0).tolist() == [0.0, 0.0, 0.0]


def test_normal_kl_against_torch() -> None:
    m1, l1, m2, l2 = (randn(5, seed=i) for i in range(4))
    expected = kl_divergence(Normal(m1, (l1 / 2).exp()), Normal(m2, (l2 / 2).exp()))
    torch.testing.assert_close(likelihood.normal_kl(m1, l1, m2, l2), expected)
    torch.testing.assert_close(likelihood.normal_log_prob(m1, m2, l2), Normal(m2, (l2 / 2).exp()).log_prob(m1))


# --- pixels ------------------------------------------------------------------------------------

PIXELS = torch.linspace(-1, 1, 256, dtype=torch.float64)


@given(mean=st.floats(-3, 3), log_std=st.floats(-9, 3))
def test_bins_cover_the_line(mean: float, log_std: float) -> None:
    log_var = torch.tensor(2 * log_std, dtype=torch.float64)
    log_p = likelihood.discretized_normal_log_prob(PIXELS, torch.tensor(mean, dtype=torch.float64), log_var)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert bool((log_p <= 0).all())


@pytest.mark.parametrize("std", [1e-3, 0.02, 0.5, 5.0])
def test_bins_against_scipy(std: float) -> None:
    """Also far in either tail, where the mass underflows and its log must not."""
    mean = 0.1
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255 * 2 - 1, [np.inf]])
    lower, upper = (edges[:-1] - mean) / std, (edges[1:] - mean) / std
    mirrored = lower > 0
    a, b = np.where(mirrored, -upper, lower), np.where(mirrored, -lower, upper)
    expected = norm.logcdf(b) + np.log1p(-np.exp(norm.logcdf(a) - norm.logcdf(b)))
    log_var = torch.tensor(2 * math.log(std), dtype=torch.float64)
    found = likelihood.discretized_normal_log_prob(PIXELS, torch.tensor(mean, dtype=torch.float64), log_var)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoder_can_be_trained(dtype: torch.dtype) -> None:
    x = torch.tensor([-1.0, 1.0, 1 / 255, 0.6 - 0.6 % (2 / 255) + 1 / 255], dtype=dtype)
    mean = torch.tensor([-1.5, 1.2, 0.9, -0.9], dtype=dtype, requires_grad=True)
    log_var = torch.full((4,), -8.0, dtype=dtype, requires_grad=True)
    likelihood.discretized_normal_log_prob(x, mean, log_var).sum().backward()
    for gradient in (mean.grad, log_var.grad):
        assert gradient is not None and bool(gradient.isfinite().all())
    assert mean.grad is not None and mean.grad[2] < 0 < mean.grad[3]  # towards the pixel


def test_bits_of_a_fair_coin() -> None:
    """Pixels of one of two values, equally often, cost one bit, plus what the decoder loses outside their bins."""
    points = double([[-51 / 255.0], [153 / 255.0]])
    data = Mixture(double([0.5, 0.5]), points, double([[[1e-14]], [[1e-14]]]))
    schedule = NoiseSchedule.linear()
    z, w = hermite(30)
    x0 = points.repeat_interleave(30, dim=0)
    eps, weights = z.repeat(2)[:, None], w.repeat(2) / 2
    nats = likelihood.prior_kl(schedule, x0) @ weights
    for t in range(1000):
        ts = torch.full((60,), t)
        x_t = forward.q_sample(schedule, x0, ts, eps)
        nats = nats + likelihood.vlb_term(data.denoiser(schedule), x0, x_t, ts, ts - 1, decoder="pixels") @ weights
    first = schedule.betas[1] * (1 - schedule.alpha_bar[0]) / (1 - schedule.alpha_bar[1])  # beta_tilde of t = 1
    inside = norm.cdf(1 / 255 / math.sqrt(first)) - norm.cdf(-1 / 255 / math.sqrt(first))
    excess = float(likelihood.bits_per_dim(nats, x0)) - (1 - math.log2(inside))
    assert 0 <= excess < 0.02  # the steps, each a little wrong where the two values part


def test_units() -> None:
    x0 = torch.zeros(2, 3, 4, 5)
    nats = torch.tensor([60 * math.log(256), 0.0])
    assert likelihood.bits_per_dim(nats, x0).tolist() == pytest.approx([8.0, 0.0])
    assert likelihood.nats_per_dim(nats, x0).tolist() == pytest.approx([math.log(256), 0.0])


def test_scaling_latents_moves_the_density_by_its_log() -> None:
    """What nats/dim of latents mean: z -> c z costs log c per dimension, the sample being the same."""
    x, c = randn(5, 1, seed=1), 3.0
    data, scaled = gaussian([0.2], [0.5]), gaussian([0.2 * c], [0.5 * c])
    torch.testing.assert_close(-scaled.log_prob(c * x), -data.log_prob(x) + math.log(c))


@given(
    t=st.sampled_from([0, 1, 59]),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decoder=st.sampled_from(["pixels", "latents"]),
    variance=st.sampled_from(["beta", "beta_tilde", "learned"]),
)
def test_terms_are_finite_and_so_are_their_gradients(
    t: int, shape: list[int], dtype: torch.dtype, decoder: Any, variance: Any
) -> None:
    x0 = (randn(2, *shape, seed=1).tanh() * 127.5).round().to(dtype) / 127.5
    channels = 2 * shape[0] if variance == "learned" else shape[0]
    output = randn(2, channels, *shape[1:], seed=2).to(dtype).requires_grad_()
    ts = torch.full((2,), t)
    x_t = forward.q_sample(SHORT, x0, ts, randn(2, *shape, seed=3).to(dtype))
    term = likelihood.vlb_term(Denoiser(lambda *_: output, SHORT, "x0", variance), x0, x_t, ts, ts - 1, decoder=decoder)
    assert term.shape == (2,) and bool(term.isfinite().all())
    assert decoder == "latents" or bool((term >= -1e-5).all())
    term.sum().backward()
    assert output.grad is not None and bool(output.grad.isfinite().all())
