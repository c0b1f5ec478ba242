"""What the samplers draw, when the network is exact: diffusers' schedulers as the pipeline uses them, and our own.

Two kinds of proof. The deterministic samplers approximate a map that is known on a line, where quantiles stay, so
their error is a number without sampling noise, and must fall with the order that the method promises. And all of
them, for every prediction and schedule, must draw the data, within the sampling error that the test computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from oracles import (
    PREDICTIONS,
    SCHEDULES,
    Mixture,
    assert_drawn_from,
    gaussian,
    generator,
    line,
    order_of,
    plane,
    space,
)
from test_forward import noised
from test_reverse import ancestral, moments
from test_samplers import QUANTILES, level
from torch import Tensor

from ldm.diffusion import samplers as score
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.schedule import NoiseSchedule, scheduler_config

diffusers.utils.logging.set_verbosity_error()  # from_config says which arguments a sampler doesn't know

Step = Callable[[Tensor, Tensor], Tensor]

STOCK: dict[str, Any] = {
    "DDPM": diffusers.DDPMScheduler,
    "DDIM": diffusers.DDIMScheduler,
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Heun": diffusers.HeunDiscreteScheduler,
}
#: The order that each promises. UniPC of order 2 promises 3 where the corrector has what it needs.
ORDERS = {"DDIM": 1, "DPM-Solver++": 2, "UniPC": 2, "Euler": 1, "Heun": 2, "ODE": 2, "ODE, VE form": 2}
SAMPLERS = [*STOCK, "predictor-corrector", "ODE", "ODE, VE form"]
#: Every pair that is possible: noise prediction can't start from zero SNR.
PAIRS = [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) != ("zero_snr", "eps")]


def possible(samplers: Iterable[str]) -> list[tuple[str, str, Prediction]]:
    """Where alpha is 0, or next to it, as at the end of "cosine", the VE form has no place to start from."""
    found = [(sampler, *pair) for sampler in samplers for pair in PAIRS]
    return [(a, s, p) for a, s, p in found if not (a == "ODE, VE form" and s in ("zero_snr", "cosine"))]


def build(sampler: str, schedule: NoiseSchedule, prediction: Prediction) -> Any:
    config = scheduler_config(schedule, prediction)
    if sampler == "Heun" and schedule.zero_terminal_snr:
        # It doesn't know how to rescale: give it the betas, with the tiny last SNR that the others put in themselves.
        bar = torch.cat([schedule.alpha_bar[:-1], torch.tensor([2.0**-24])])
        config |= {"trained_betas": (1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])).tolist()}
    return STOCK[sampler].from_config(config)


def draw(
    sampler: str, data: Mixture, schedule: NoiseSchedule, prediction: Prediction, x: Tensor, n: int, stop: int = -1
) -> Tensor:
    """x_t at the last timestep [B, d] => clean samples, in n steps; or x_t at the timestep `stop`, one of the n."""
    denoiser = data.denoiser(schedule, prediction)
    timesteps = schedule.timesteps(n)
    if sampler == "predictor-corrector":
        return score.predictor_corrector(denoiser, x, timesteps, generator(1))
    if sampler in ("ODE", "ODE, VE form"):
        form: score.Form = "vp" if sampler == "ODE" else "ve"
        if stop >= 0:
            return score.probability_flow(denoiser, x, timesteps[: timesteps.index(stop) + 1], form=form)[0]
        return score.ode_sample(denoiser, x, timesteps, form=form)
    stock, exploding = build(sampler, schedule, prediction), sampler in ("Euler", "Heun")
    stock.set_timesteps(n)
    if exploding:
        x = x * (stock.sigmas[0].double() ** 2 + 1).sqrt()  # x => y = x / alpha, what `init_noise_sigma` is for
    options = {"generator": generator(1)} if sampler == "DDPM" else {}
    for t in stock.timesteps:
        if int(t) <= stop and (sampler != "Heun" or stock.state_in_first_order):
            break
        answer = denoiser.network(stock.scale_model_input(x, t), torch.full((len(x),), int(t)))
        x = stock.step(answer, t, x, return_dict=False, **options)[0]
    return x * level(schedule, stop)[0] if exploding and stop >= 0 else x


@pytest.mark.parametrize("sampler, schedule_name, prediction", possible(ORDERS))
def test_error_falls_with_the_order_of_the_method(sampler: str, schedule_name: str, prediction: Prediction) -> None:
    data, schedule = line(), SCHEDULES[schedule_name]
    top, stop = level(schedule, 999), 399
    x = data.transport(QUANTILES, (0.0, 1.0), top)
    middle, clean = data.transport(x, top, level(schedule, stop)), data.transport(x, top)
    errors, clean_errors = [], []
    for n in (25, 50, 100):
        errors.append(float((draw(sampler, data, schedule, prediction, x, n, stop) - middle).abs().max()))
        clean_errors.append(float((draw(sampler, data, schedule, prediction, x, n) - clean).abs().max()))
    # Tables of diffusers are float32: below 1e-4 there is no order to see.
    assert errors[-1] < 1e-4 or order_of(errors) > ORDERS[sampler] - 0.35, errors
    # The last step of every method, to clean data, is the denoiser's answer: of first order only.
    assert order_of(clean_errors) > 0.7 and clean_errors[-1] < 0.15, clean_errors


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear", "variance_exploding"])
def test_unipc_has_order_three_where_the_schedule_is_smooth(schedule_name: str) -> None:
    data, schedule = line(), SCHEDULES[schedule_name]
    x = data.transport(QUANTILES, (0.0, 1.0), level(schedule, 999))
    middle = data.transport(x, level(schedule, 999), level(schedule, 399))
    errors = [float((draw("UniPC", data, schedule, "v", x, n, 399) - middle).abs().max()) for n in (25, 50, 100)]
    assert order_of(errors) > 2.7


@pytest.mark.parametrize("sampler", ["DDPM", "predictor-corrector"])
@pytest.mark.parametrize("schedule_name, prediction", PAIRS)
def test_error_of_the_random_ones_falls_with_order_one(
    sampler: str, schedule_name: str, prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Gaussian, where mean and variance of what is drawn follow from the steps, without drawing anything."""
    data, schedule = gaussian([0.7], [0.5]), SCHEDULES[schedule_name]
    alpha, sigma = level(schedule, 999)
    denoiser = data.denoiser(schedule, prediction)
    at = lambda x, t: torch.full((len(x),), int(t))  # noqa: E731

    def ddpm(n: int) -> Iterator[Step]:
        stock = build("DDPM", schedule, prediction)
        stock.set_timesteps(n)
        for t in stock.timesteps:

            def step(x: Tensor, noise: Tensor, t: Any = t) -> Tensor:
                monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
                return stock.step(denoiser.network(x, at(x, t)), t, x, return_dict=False)[0]  # type: ignore[no-any-return]

            yield step

    def predictor_corrector(n: int) -> Iterator[Step]:
        timesteps = schedule.timesteps(n)
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            yield ancestral(denoiser, t, s)
            if s >= 0:
                yield lambda x, noise, s=s: score.langevin_step(denoiser, x, at(x, s), noise)

    errors = []
    for n in (50, 100, 200):
        steps = ddpm(n) if sampler == "DDPM" else predictor_corrector(n)
        mean, var = moments(steps, alpha * 0.7, alpha**2 * 0.25 + sigma**2)
        errors.append(abs(var / 0.25 - 1) + abs(mean - 0.7))
    assert errors[-1] < 0.1 and order_of(errors) > 0.65, errors


@pytest.mark.parametrize("sampler, schedule_name, prediction", possible(SAMPLERS))
def test_every_combination_draws_the_data(sampler: str, schedule_name: str, prediction: Prediction) -> None:
    """Means, covariances and the weights of the components, in the plane."""
    data, schedule = plane(), SCHEDULES[schedule_name]
    x = noised(data, *level(schedule, 999)).sample(1500, generator(2))
    assert_drawn_from(draw(sampler, data, schedule, prediction, x, 100), data, bias=0.04)


@pytest.mark.parametrize("sampler, schedule_name, prediction", possible(SAMPLERS))
def test_every_combination_draws_on_a_line(sampler: str, schedule_name: str, prediction: Prediction) -> None:
    data, schedule = line(), SCHEDULES[schedule_name]
    x = noised(data, *level(schedule, 999)).sample(1000, generator(2))
    assert_drawn_from(draw(sampler, data, schedule, prediction, x, 100), data, bias=0.04)


#: With v every schedule, with sigmoid every prediction.
IN_SPACE = [(a, s, p) for a, s, p in possible(SAMPLERS) if p == "v" or s == "sigmoid"]


@pytest.mark.parametrize("sampler, schedule_name, prediction", IN_SPACE)
def test_every_sampler_draws_in_64_dimensions(sampler: str, schedule_name: str, prediction: Prediction) -> None:
    data, schedule = space(), SCHEDULES[schedule_name]
    x = noised(data, *level(schedule, 999)).sample(500, generator(3))
    assert_drawn_from(draw(sampler, data, schedule, prediction, x, 100), data, bias=0.04)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_a_wrong_process_is_noticed(prediction: Prediction) -> None:
    """The check above can fail: here the network's schedule is one, the sampler's another."""
    data, schedule = plane(), SCHEDULES["linear"]
    x = noised(data, *level(schedule, 999)).sample(2000, generator(2))
    stock = build("DDIM", SCHEDULES["scaled_linear"], prediction)
    stock.set_timesteps(125)
    for t in stock.timesteps:
        answer = data.network(schedule, prediction)(x, torch.full((len(x),), int(t)))
        x = stock.step(answer, t, x, return_dict=False)[0]
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_drawn_from(x, data, bias=0.04)


def test_quirks_of_diffusers() -> None:
    """What docs/theory.md warns of. The day this fails, a warning can go."""
    clean = x = torch.zeros(2, 3, dtype=torch.float64)
    ddpm = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=False, prediction_type="sample")
    ddpm.set_timesteps(timesteps=[199])
    assert float(ddpm.step(clean, 199, x, generator=generator(1)).prev_sample.std()) > 0.1  # noise on the last sample
    rescaled = NoiseSchedule.linear().rescale_zero_terminal_snr()
    euler = build("Euler", rescaled, "v")
    assert euler.alphas_cumprod[-1] > euler.alphas_cumprod[-2]  # signal grows at the very end
    heun = diffusers.HeunDiscreteScheduler.from_config(scheduler_config(rescaled, "v"))
    assert float(heun.alphas_cumprod[-1]) > 1e-5  # not rescaled
    ddim = build("DDIM", SCHEDULES["linear"], "x0")
    ddim.set_timesteps(30)
    arrives = ddim.step(clean + 1, ddim.timesteps[1], x + 1, return_dict=False)[0]
    alpha, sigma = SCHEDULES["linear"].at(ddim.timesteps[1:2], x)
    noise = (x + 1 - alpha) / sigma
    alpha, sigma = SCHEDULES["linear"].at(ddim.timesteps[2:3] + 1, x)  # one above the next of its own timesteps
    torch.testing.assert_close(arrives, alpha + sigma * noise, rtol=0, atol=1e-6)
