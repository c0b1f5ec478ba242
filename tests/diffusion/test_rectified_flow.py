"""Rectified flow against closed forms, the variance-preserving process of the same SNR, and in stock samplers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from oracles import PREDICTIONS, SCHEDULES, assert_drawn_from, double, gaussian, generator, line, order_of, plane, randn
from test_forward import noised
from test_samplers import QUANTILES

from ldm.diffusion.forward import q_sample
from ldm.diffusion.likelihood import elbo
from ldm.diffusion.losses import diffusion_loss, loss_weight, min_snr
from ldm.diffusion.parameterization import Prediction, add_to_score, target, to_eps, to_flow, to_v, to_x0
from ldm.diffusion.reverse import posterior
from ldm.diffusion.samplers import ode_log_likelihood, ode_sample, probability_flow
from ldm.diffusion.schedule import (
    NoiseSchedule,
    RectifiedFlow,
    prediction_from_config,
    schedule_from_config,
    scheduler_config,
)
from ldm.diffusion.timesteps import logit_normal, shifted, uniform

FLOW = RectifiedFlow.straight()
#: As if time had no steps: then what is left is a sampler's own error.
FINE = RectifiedFlow.straight(100_000)
STOCK = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler,
         "deis": diffusers.DEISMultistepScheduler}  # fmt: skip

diffusers.utils.logging.set_verbosity_error()


def test_the_path_is_straight_from_data_to_noise() -> None:
    assert torch.equal(FLOW.alpha + FLOW.sigma, torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(FLOW.sigma, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, rtol=0, atol=1e-15)
    torch.testing.assert_close(FLOW.snr, (FLOW.alpha / FLOW.sigma) ** 2)
    same = NoiseSchedule(FLOW.betas)  # x / sqrt(alpha**2 + sigma**2)
    torch.testing.assert_close(same.snr, FLOW.snr, rtol=1e-9, atol=0)
    x0, eps, t = randn(4, 3, seed=1), randn(4, 3, seed=2), torch.tensor([0, 10, 500, 999])
    scale = (FLOW.alpha**2 + FLOW.sigma**2).sqrt()[t][:, None]
    torch.testing.assert_close(q_sample(FLOW, x0, t, eps) / scale, q_sample(same, x0, t, eps))


def test_the_velocity_of_a_gaussian_is_its_closed_form() -> None:
    data, t = gaussian([0.7], [0.5]), torch.arange(0, 1000, 37)
    x = randn(len(t), 1, seed=3)
    s = FLOW.sigma[t][:, None]
    var = (1 - s) ** 2 * 0.25 + s**2
    velocity = (s - (1 - s) * 0.25) / var * (x - (1 - s) * 0.7) - 0.7  # E[eps - x0 | x], by Gaussian conditioning
    torch.testing.assert_close(data.denoiser(FLOW, "flow").flow(x, t), velocity, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(data.denoiser(FLOW, "eps").flow(x, t), velocity, rtol=1e-6, atol=1e-6)
    assert float(FLOW.alpha[-1]) > 0  # so eps and x0 follow from each other everywhere


@pytest.mark.parametrize("schedule", [FLOW, SCHEDULES["linear"], SCHEDULES["cosine"]])
def test_every_prediction_follows_from_the_velocity(schedule: NoiseSchedule) -> None:
    t = torch.tensor([3, 400, 900])
    x0, eps = randn(3, 5, seed=4), randn(3, 5, seed=5)
    alpha, sigma = schedule.at(t, x0)
    x_t = q_sample(schedule, x0, t, eps)
    flow = target("flow", x0, eps, alpha, sigma)
    torch.testing.assert_close(flow, eps - x0)
    for convert, right in ((to_eps, eps), (to_x0, x0), (to_v, alpha * eps - sigma * x0), (to_flow, eps - x0)):
        torch.testing.assert_close(convert("flow", flow, x_t, alpha, sigma), right)
    torch.testing.assert_close(to_flow("eps", eps, x_t, alpha, sigma), flow)
    change = randn(3, 5, seed=6)
    moved = add_to_score("flow", flow, change, alpha, sigma)
    torch.testing.assert_close(to_eps("flow", moved, x_t, alpha, sigma), eps - sigma * change)


def test_a_weighting_is_one_loss_for_both_predictions() -> None:
    """min-SNR on the velocity's error is min-SNR on that of eps, of the same wrong answer."""
    t, x0, eps, wrong = torch.tensor([5, 300, 990]), randn(3, 4, seed=7), randn(3, 4, seed=8), randn(3, 4, seed=9)

    def losses(kind: Prediction) -> torch.Tensor:
        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            alpha, sigma = FLOW.at(t, x_t)
            return (to_flow if kind == "flow" else to_eps)("x0", wrong, x_t, alpha, sigma)

        return diffusion_loss(network, FLOW, x0, t, eps, prediction=kind, weighting=min_snr())

    torch.testing.assert_close(losses("flow"), losses("eps"), rtol=1e-6, atol=0)
    assert torch.equal(loss_weight(FLOW, t, "flow"), torch.ones(3, dtype=torch.float64))


def test_the_bridge_is_gaussian_conditioning() -> None:
    """Given x0, x_s and x_t are jointly normal: Cov(x_s, x_t) = alpha_{t|s} sigma_s**2."""
    t, s = torch.tensor([1, 500, 999]), torch.tensor([0, 100, 998])
    x0, x_t = randn(3, 2, seed=10), randn(3, 2, seed=11)
    mean, var = posterior(FLOW, x0, x_t, t, s)
    alpha_t, alpha_s, var_t, var_s = (table[i][:, None] for table, i in (
        (FLOW.alpha, t), (FLOW.alpha, s), (FLOW.sigma**2, t), (FLOW.sigma**2, s)))  # fmt: skip
    cov = alpha_t / alpha_s * var_s
    torch.testing.assert_close(var, var_s - cov**2 / var_t, rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(mean, alpha_s * x0 + cov / var_t * (x_t - alpha_t * x0), rtol=1e-9, atol=1e-12)


def test_the_bound_is_that_of_the_process_with_the_same_snr() -> None:
    """L_t depends on the SNR alone (Kingma et al. 2021); the two paths take the same noise to other places."""
    flow, same = RectifiedFlow.straight(50), NoiseSchedule(RectifiedFlow.straight(50).betas)
    data = plane()
    x0 = data.sample(20, generator(4))
    one, other = (elbo(data.denoiser(s, k), x0, generator=generator(5)) for s, k in ((flow, "flow"), (same, "v")))
    torch.testing.assert_close(
        one.terms[:, :-1], other.terms[:, :-1], rtol=1e-6, atol=1e-9
    )  # the decoder's has a scale
    assert float(one.total.mean()) > -float(data.log_prob(x0).mean())


# --- the ODE --------------------------------------------------------------------------------------


def test_the_ode_carries_every_quantile() -> None:
    data, top = line(), (float(FLOW.alpha[-1]), float(FLOW.sigma[-1]))
    x = data.transport(QUANTILES, (0.0, 1.0), top)
    clean, denoiser = data.transport(x, top), data.denoiser(FLOW, "flow")
    errors = [
        float((probability_flow(denoiser, x, FLOW.timesteps(n), form="flow")[0]
               - data.transport(x, top, level(FLOW, FLOW.timesteps(n)[-1]))).abs().max()) for n in (25, 50, 100)
    ]  # fmt: skip
    assert errors[-1] < 2e-3 and order_of(errors) > 1.6, errors
    assert float((ode_sample(denoiser, x, FLOW.timesteps(100), form="flow") - clean).abs().max()) < 0.02


def level(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    return float(schedule.alpha[t]), float(schedule.sigma[t])


def test_its_likelihood_is_the_datas() -> None:
    data = line()
    x0 = data.sample(30, generator(6))
    found = ode_log_likelihood(
        data.denoiser(FLOW, "flow"), x0, form="flow", timesteps=FLOW.timesteps(500),
        log_prior=lambda x: data.log_prob(x, *level(FLOW, 999)),
    )  # fmt: skip
    torch.testing.assert_close(found, data.log_prob(x0), rtol=0, atol=0.02)


def test_the_form_must_fit_the_path() -> None:
    for schedule, form in ((FLOW, "vp"), (SCHEDULES["linear"], "flow")):
        denoiser = line().denoiser(schedule, "eps")
        with pytest.raises(ValueError, match="form: rectified flow"):
            probability_flow(denoiser, randn(2, 1), [999, 500], form=form)


# --- stock samplers -------------------------------------------------------------------------------


def draw(name: str, schedule: RectifiedFlow, data: object, x: torch.Tensor, n: int) -> torch.Tensor:
    stock = STOCK[name].from_config(scheduler_config(schedule, "flow"))
    stock.set_timesteps(n)
    network = data.network(schedule, "flow")  # type: ignore[attr-defined]
    for t in stock.timesteps:
        x = stock.step(network(stock.scale_model_input(x, t), torch.full((len(x),), int(t))), t, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", STOCK)
def test_stock_samplers_draw_the_data(name: str, shift: float) -> None:
    data, schedule = plane(), RectifiedFlow.straight(shift=shift)
    x = noised(data, 0.001, 0.999).sample(1500, generator(2))
    assert_drawn_from(draw(name, schedule, data, x, 100), data, bias=0.04)


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_their_error_falls_with_the_number_of_steps(name: str) -> None:
    data = line()
    x = data.transport(QUANTILES, (0.0, 1.0), (1e-5, 1 - 1e-5))
    clean = data.transport(x, (1e-5, 1 - 1e-5))
    errors = [float((draw(name, FINE, data, x, n) - clean).abs().max()) for n in (25, 50, 100)]
    assert errors[-1] < 0.05 and order_of(errors) > 0.7, errors  # the last step is of first order


def test_training_looks_where_the_sampler_steps() -> None:
    u = torch.arange(1, 21, dtype=torch.float64) / 20 * 0.999
    for shift in (1.0, 3.0):
        stock = STOCK["dpm++"].from_config(scheduler_config(RectifiedFlow.straight(shift=shift), "flow"))
        stock.set_timesteps(20)
        t, weight = shifted(uniform(1000), 1000, shift)(u)
        assert int((t.flip(0) - stock.timesteps).abs().max()) <= 3  # u is cut to a thousandth before it is shifted
        assert torch.equal(weight, torch.ones_like(u))
    plain = logit_normal(1000)
    assert shifted(plain, 1000, 1.0) is plain


# --- as a config ----------------------------------------------------------------------------------


def test_it_comes_back_from_a_stock_scheduler() -> None:
    made = STOCK["dpm++"].from_config(scheduler_config(RectifiedFlow.straight(500, shift=2.5), "flow"))
    found = schedule_from_config(made.config)
    assert isinstance(found, RectifiedFlow) and (found.T, found.shift) == (500, 2.5)
    assert prediction_from_config(made.config) == "flow"
    assert isinstance(NoiseSchedule.from_name("rectified_flow"), RectifiedFlow)
    assert made.config.use_flow_sigmas and made.config.prediction_type == "flow_prediction"


def test_what_does_not_belong_together_is_refused() -> None:
    for kind in PREDICTIONS:
        with pytest.raises(ValueError, match="belong together"):
            scheduler_config(FLOW, kind)
    with pytest.raises(ValueError, match="belong together"):
        scheduler_config(SCHEDULES["linear"], "flow")
    with pytest.raises(ValueError, match="zero_terminal_snr: rectified_flow ends in noise"):
        NoiseSchedule.from_name("rectified_flow", zero_terminal_snr=True)
    assert double([1.0]).dtype == FLOW.alpha.dtype
