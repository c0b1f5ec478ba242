"""Langevin dynamics leaves q(x_t) alone; the ODE keeps quantiles and yields the true density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SCHEDULES, Mixture, assert_drawn_from, gaussian, generator, line, order_of, plane, randn, space
from test_forward import noised
from torch import Tensor

from ldm.diffusion import reverse
from ldm.diffusion import samplers as score
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
ZERO_SNR = SCHEDULES["zero_snr"]


# --- Langevin ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [50, 400, 999])
def test_langevin_step_has_its_two_parts(t: int) -> None:
    """x + h score + sqrt(2 h) noise, for h = 2 (snr sigma)**2: drift and noise that belong together."""
    data, x, noise, ts = plane(), randn(3, 2, seed=1), randn(3, 2, seed=2), torch.full((3,), t)
    found = score.langevin_step(data.denoiser(SCHEDULE), x, ts, noise, snr=0.1)
    a, s = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    h = 2 * (0.1 * s) ** 2
    torch.testing.assert_close(found, x + h * data.score(x, a, s) + math.sqrt(2 * h) * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [50, 400, 999])
def test_langevin_converges_to_the_marginal_with_order_one(t: int) -> None:
    """On a Gaussian a step is x -> a x + c noise: its stationary variance c**2 / (1 - a**2) tends to that of q(x_t)."""
    data = gaussian([0.0], [0.5])
    denoiser, ts = data.denoiser(SCHEDULE), torch.tensor([t, t])
    variance = float(SCHEDULE.alpha_bar[t] * 0.25 + 1 - SCHEDULE.alpha_bar[t])
    errors = []
    for snr in (0.2, 0.2 / 2**0.5, 0.1):  # halving the step
        x, noise = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        a, c = score.langevin_step(denoiser, x, ts, noise, snr).flatten().tolist()
        errors.append(abs(c**2 / (1 - a**2) / variance - 1))
    assert errors[-1] < 0.02 and order_of(errors) == pytest.approx(1, abs=0.1)


def test_langevin_leaves_the_marginal_and_finds_it() -> None:
    data, t, rng = plane(), 300, generator(6)
    a, s = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    target, ts = noised(data, a, s), torch.full((4000,), t)
    for start, steps in ((target.sample(4000, rng), 40), (2 + 0.1 * randn(4000, 2), 400)):
        x = start
        for _ in range(steps):
            noise = torch.randn(4000, 2, generator=rng, dtype=torch.float64)
            x = score.langevin_step(data.denoiser(SCHEDULE), x, ts, noise, snr=0.2)
        assert_drawn_from(x, target, bias=0.03)


def test_corrector_repairs_what_the_predictor_missed() -> None:
    """Few, coarse steps: the predictor alone draws too narrow a distribution; corrected, it is nearer to the data."""
    data, n = plane(), 4000
    start = noised(data, float(SCHEDULE.alpha[-1]), float(SCHEDULE.sigma[-1])).sample(n, generator(7))
    errors = []
    for steps in (0, 4):
        x = score.predictor_corrector(
            data.denoiser(SCHEDULE), start, SCHEDULE.timesteps(25), generator(8), corrector_steps=steps, snr=0.3
        )
        errors.append(float((x.T.cov() - data.cov).abs().max()))
    assert errors[1] < 0.7 * errors[0]


def test_predictor_corrector_takes_the_steps_of_the_paper() -> None:
    """Alg. 1 by hand: predict at t, correct where the prediction landed, and don't correct clean samples."""
    denoiser, x, rng = plane().denoiser(SCHEDULE), randn(3, 2), generator(9)
    noise = [torch.randn(3, 2, generator=rng, dtype=torch.float64) for _ in range(4)]
    far, near, clean = torch.full((3,), 700), torch.full((3,), 300), torch.full((3,), -1)
    expected = reverse.ancestral_step(denoiser, x, far, near, noise[0])
    for i in (1, 2):
        expected = score.langevin_step(denoiser, expected, near, noise[i], snr=0.2)
    expected = reverse.ancestral_step(denoiser, expected, near, clean, noise[3])
    found = score.predictor_corrector(denoiser, x, [700, 300], generator(9), corrector_steps=2, snr=0.2)
    torch.testing.assert_close(found, expected)


# --- the ODE -----------------------------------------------------------------------------------

QUANTILES = torch.special.ndtri(torch.linspace(0.01, 0.99, 33, dtype=torch.float64))[:, None]


def level(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    return (1.0, 0.0) if t < 0 else (float(schedule.alpha[t]), float(schedule.sigma[t]))


@pytest.mark.parametrize("form", ["vp", "ve"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ode_keeps_quantiles_with_order_two(name: str, form: Any) -> None:
    """From noise to a level in the middle, against the transport that the distribution functions prescribe."""
    data, schedule = line(), SCHEDULES[name]
    top = 959 if (form, name) in {("ve", "zero_snr"), ("ve", "cosine")} else 999  # sigma / alpha leaps at the end
    x = data.transport(QUANTILES, (0.0, 1.0), level(schedule, top))
    expected = data.transport(x, level(schedule, top), level(schedule, 359))
    errors = []
    for stride in (40, 20, 10):
        found, change = score.probability_flow(data.denoiser(schedule), x, range(top, 358, -stride), form=form)
        errors.append(float((found - expected).abs().max()))
        assert change.tolist() == [0.0] * 33
    assert errors[-1] < 3e-3
    assert order_of(errors) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("form", ["vp", "ve"])
def test_ode_goes_both_ways(form: Any) -> None:
    data, schedule = plane(), NoiseSchedule.linear()
    x0, levels = data.sample(6, generator(1)), [-1, *range(0, 1000, 9)]
    options = {"form": form, "divergence": score.exact_divergence}
    x_t, up = score.probability_flow(data.denoiser(schedule), x0, levels, **options)
    back, down = score.probability_flow(data.denoiser(schedule), x_t, levels[::-1], **options)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-3)
    torch.testing.assert_close(up, -down, rtol=0, atol=1e-3)


def test_the_two_forms_are_one_curve() -> None:
    data = plane()
    x, levels = randn(5, 2), list(range(999, -1, -3))
    vp, _ = score.probability_flow(data.denoiser(SCHEDULE), x, levels)
    ve, _ = score.probability_flow(data.denoiser(SCHEDULE), x, levels, form="ve")
    torch.testing.assert_close(vp, ve, rtol=0, atol=1e-3)


def test_first_step_of_each_form_is_its_equation() -> None:
    """Euler's step of dx/dphi = v and of dy/ds = eps, seen through a step so small that nothing else is left."""
    data, x = plane(), randn(4, 2, seed=1)
    fine = NoiseSchedule(torch.full((3,), 1e-7, dtype=torch.float64) + torch.tensor([0.3, 0, 0], dtype=torch.float64))
    a0, s0, a1, s1 = *level(fine, 0), *level(fine, 2)
    x0 = data.denoise(x, a0, s0)
    eps = (x - a0 * x0) / s0
    by_v = x + (math.atan2(s1, a1) - math.atan2(s0, a0)) * (a0 * eps - s0 * x0)
    by_eps = a1 * (x / a0 + (s1 / a1 - s0 / a0) * eps)
    drift = -0.5 * (1 - a1**2 / a0**2) * (x + data.score(x, a0, s0))  # dx = -beta/2 (x + score) dt
    for form, expected in (("vp", by_v), ("ve", by_eps)):
        found, _ = score.probability_flow(data.denoiser(fine), x, [0, 2], form=form)  # type: ignore[arg-type]
        torch.testing.assert_close(found - x, expected - x, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(found - x, drift, rtol=1e-4, atol=1e-12)


@given(
    form=st.sampled_from(["vp", "ve"]),
    t=st.sampled_from([0, 1, 500, 998, 999]),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_steps_of_any_shape_and_dtype_are_those_of_float64(
    form: Any, t: int, shape: list[int], dtype: torch.dtype
) -> None:
    """One of Langevin, and one along the ODE, down to the timestep before or to clean data."""
    x, noise = randn(2, *shape, seed=1).to(dtype), randn(2, *shape, seed=2).to(dtype)
    denoiser, ts = Denoiser(lambda x, t: x.sin(), SCHEDULE, "v"), torch.full((2,), t)
    for step in (
        lambda x, noise: score.langevin_step(denoiser, x, ts, noise),
        lambda x, noise: score.probability_flow(denoiser, x, [t, t - 1], form=form)[0],
    ):
        found, expected = step(x, noise), step(x.double(), noise.double())
        assert found.shape == x.shape and found.dtype == dtype
        slack = 50 * torch.finfo(dtype).eps / (float(SCHEDULE.alpha[t]) if form == "ve" else 1)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=slack)


def test_ve_refuses_infinite_noise() -> None:
    with pytest.raises(ValueError, match="infinite at zero terminal SNR"):
        score.probability_flow(line().denoiser(ZERO_SNR), randn(2, 1), [999, 998], form="ve")


# --- its likelihood ----------------------------------------------------------------------------


def exact_prior(data: Mixture, schedule: NoiseSchedule) -> Callable[[Tensor], Tensor]:
    return lambda x: data.log_prob(x, *level(schedule, schedule.T - 1))


@pytest.mark.parametrize("data", [line(), plane()], ids=["line", "plane"])
def test_ode_likelihood_is_the_log_density(data: Mixture) -> None:
    """From the standard normal, which zero terminal SNR makes exact."""
    x0 = data.sample(20, generator(2))
    found = score.ode_log_likelihood(data.denoiser(ZERO_SNR), x0)
    torch.testing.assert_close(found, data.log_prob(x0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name, form",
    [(name, "vp") for name in ("linear", "scaled_linear", "cosine", "sigmoid")]
    + [(name, "ve") for name in ("linear", "scaled_linear", "variance_exploding")],
)
def test_ode_likelihood_in_both_forms(name: str, form: Any) -> None:
    """From the marginal at the last timestep, which is known here."""
    data, schedule = line(), SCHEDULES[name]
    x0 = torch.linspace(-1.8, 2.0, 12, dtype=torch.float64)[:, None]
    found = score.ode_log_likelihood(data.denoiser(schedule), x0, form=form, log_prior=exact_prior(data, schedule))
    torch.testing.assert_close(found, data.log_prob(x0), rtol=0, atol=1e-3)


def test_ode_likelihood_in_64_dimensions() -> None:
    """Exact trace, nats per dimension; a Gaussian mixture of correlated dimensions."""
    data = space()
    x0 = data.sample(4, generator(3))
    found = score.ode_log_likelihood(data.denoiser(ZERO_SNR), x0, timesteps=ZERO_SNR.timesteps(100))
    torch.testing.assert_close(found / 64, data.log_prob(x0) / 64, rtol=0, atol=1e-3)


def test_hutchinson_is_unbiased() -> None:
    """The mean over all probes of signs is the trace, and so is the likelihood's; one probe is not."""
    data = plane()
    x = randn(5, 2, seed=1).requires_grad_()
    t = torch.full((5,), 300)
    field = data.denoiser(SCHEDULE).v(x, t)
    exact = score.exact_divergence(field, x)
    probes = [torch.tensor([a, b], dtype=torch.float64).expand(5, 2) for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    estimates = []
    for probe in probes:
        estimates.append(score.hutchinson_divergence(probe)(data.denoiser(SCHEDULE).v(x, t), x))
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact)
    assert float((estimates[0] - exact).abs().max()) > 1e-3
    x0, steps = data.sample(5, generator(4)), ZERO_SNR.timesteps(100)
    found = [
        score.ode_log_likelihood(data.denoiser(ZERO_SNR), x0, score.hutchinson_divergence(p), timesteps=steps)
        for p in probes
    ]
    torch.testing.assert_close(torch.stack(found).mean(0), data.log_prob(x0), rtol=0, atol=1e-2)
    by_trace = score.ode_log_likelihood(data.denoiser(ZERO_SNR), x0, timesteps=steps)  # itself exact to 1e-3, above
    torch.testing.assert_close(torch.stack(found).mean(0), by_trace, rtol=0, atol=1e-9)


def test_divergence_of_pictures() -> None:
    """Any shape: of the field x -> (A x) for a fixed matrix the divergence is its trace."""
    matrix = randn(12, 12, seed=1)
    x = randn(3, 2, 3, 2, seed=2).requires_grad_()
    field = (x.flatten(1) @ matrix.T).reshape(x.shape)
    torch.testing.assert_close(score.exact_divergence(field, x), matrix.trace().expand(3))


def test_sampling_leaves_no_graph() -> None:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    denoiser = Denoiser(lambda x, t: weight * x, SCHEDULE, "v")
    assert not score.ode_sample(denoiser, randn(2, 3), SCHEDULE.timesteps(3)).requires_grad
