"""Samplers by name: ours against the mathematics written out, all of them against a distribution in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import Mixture, double, generator
from torch import Tensor

from ldm.diffusion.guidance import Guidance
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.samplers import ode_sample, predictor_corrector
from ldm.diffusion.schedule import NoiseSchedule, scheduler_config
from ldm.inference.defaults import SAMPLERS
from ldm.inference.samplers import build
from ldm.inference.sampling import sample

SCHEDULE = NoiseSchedule.scaled_linear()
T = SCHEDULE.T


def mixture(dims: int) -> Mixture:
    """Two clouds, weights 0.7 and 0.3, that neither a mean nor a variance describes."""
    means = torch.stack([torch.full((dims,), -0.8), torch.full((dims,), 1.1)]).double()
    covs = torch.stack([0.09 * torch.eye(dims), 0.04 * torch.eye(dims)]).double()
    return Mixture(double([0.7, 0.3]), means, covs)


def run(name: str, network: Any, kind: Prediction, x: Tensor, steps: int, rng: torch.Generator) -> Tensor:
    """Sample with a network of (x_t, t), one row of t each."""
    scheduler = build(name, scheduler_config(SCHEDULE, kind))
    scheduler.set_timesteps(steps)

    def denoiser(x_t: Tensor, t: Tensor, *names: str) -> tuple[Tensor, ...]:
        return (network(x_t, t.expand(len(x_t))),)

    chance = {} if name not in ("pc", "ddpm", "euler-a", "dpm++sde", "lcm") else {"generator": rng}
    x = x * scheduler.init_noise_sigma
    return sample(denoiser, x, scheduler, scheduler.timesteps, guidance=Guidance(T), **chance)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_ours_are_the_mathematics_written_out(kind: Prediction) -> None:
    """The loops of ldm.diffusion.samplers, from the same noise."""
    data, x = mixture(4), torch.randn(6, 4, generator=generator(2), dtype=torch.float64)
    network = data.network(SCHEDULE, kind)
    denoiser, levels = Denoiser(network, SCHEDULE, kind), SCHEDULE.timesteps(9)
    expected = predictor_corrector(denoiser, x, levels, generator(5))
    torch.testing.assert_close(run("pc", network, kind, x, 9, generator(5)), expected, rtol=1e-9, atol=1e-9)
    expected = ode_sample(denoiser, x, levels)
    torch.testing.assert_close(run("ode", network, kind, x, 9, generator(5)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])
def test_every_sampler_reaches_the_data(name: str) -> None:
    """With the exact network: the share of each cloud, and its mean and spread."""
    data = mixture(2)
    network = data.network(SCHEDULE, "eps")
    x = torch.randn(6000, 2, 1, 1, generator=generator(1))

    def flat(x_t: Tensor, t: Tensor) -> Tensor:
        place = t.clamp(0, T - 1).round().long()  # euler and its kin have t between timesteps
        return network(x_t.double().flatten(1), place).to(x_t).reshape(x_t.shape)

    steps = 200 if name in ("ddpm", "euler-a", "pc", "lms", "pndm") else 60
    found = run(name, flat, "eps", x, steps, generator(7)).double().flatten(1)
    second = found[:, 0] > 0.2
    assert abs(float(second.double().mean()) - 0.3) < 0.035
    for cloud, mean, std in ((found[~second], -0.8, 0.3), (found[second], 1.1, 0.2)):
        assert abs(float(cloud.mean()) - mean) < 0.05
        assert abs(float(cloud.std()) - std) < 0.05


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_samples_the_data_with_the_exact_consistency_function(steps: int) -> None:
    """Of N(m, s²), whose path ends at m + s (x_t - alpha m) / sqrt(alpha² s² + sigma²)."""
    mean, std = 0.4, 0.7

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.at(t, x_t)
        x0 = mean + std * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()
        return (x_t - alpha * x0) / sigma

    x = torch.randn(20000, 1, 1, 1, generator=generator(1), dtype=torch.float64)
    found = run("lcm", network, "eps", x, steps, generator(2))
    assert abs(float(found.mean()) - mean) < 0.02 and abs(float(found.std()) - std) < 0.02


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="sampler: expected one of .*, got 'dimm'; did you mean ddim?"):
        build("dimm", scheduler_config(SCHEDULE, "eps"))
