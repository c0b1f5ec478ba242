"""Consistency distillation against the exact ODE of a mixture, and against stock's schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from oracles import PREDICTIONS, Mixture, double, generator, randn
from torch import Tensor

from ldm.diffusion import distillation
from ldm.diffusion.parameterization import Prediction, target
from ldm.diffusion.schedule import NoiseSchedule, scheduler_config

SCHEDULE = NoiseSchedule.scaled_linear()
#: Two bumps on a line.
LINE = Mixture(double([0.3, 0.7]), double([[-1.0], [0.6]]), double([[[0.04]], [[0.09]]]))


def at(t: int, count: int) -> Tensor:
    return torch.full((count,), t)


def level(t: int) -> tuple[float, float]:
    return float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])


def test_pairs_are_stock_s_timesteps_and_what_is_left_is_uniform() -> None:
    """Every timestep that LCMScheduler can choose, alike, each with the one below it; a scale that depends on none."""
    u = (torch.arange(50 * 40, dtype=torch.float64) + 0.5) / (50 * 40)
    t, s, share = distillation.solver_pairs(u, 1000, 50)
    stock = LCMScheduler(**{"original_inference_steps": 50})
    stock.set_timesteps(50)
    assert t.unique().flip(0).tolist() == stock.timesteps.tolist()
    assert torch.bincount(t).unique().tolist() == [0, 40]
    assert torch.equal(s, torch.where(t == 19, 0, t - 20))
    torch.testing.assert_close(share.reshape(50, 40), ((torch.arange(40.0).double() + 0.5) / 40).expand(50, 40))
    t, _, share = distillation.solver_pairs(torch.tensor([0, 1 - 1e-16], dtype=torch.float64), 1000, 50)
    assert t.tolist() == [19, 999] and float(share.min()) >= 0 and float(share.max()) <= 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_f_is_what_stock_s_scheduler_shows(prediction: Prediction) -> None:
    stock = LCMScheduler.from_config({**scheduler_config(SCHEDULE, prediction), "original_inference_steps": 50})
    stock.set_timesteps(50)
    x, output = randn(3, 4, 2, 2, seed=1).float(), randn(3, 4, 2, 2, seed=2).float()
    for t in stock.timesteps.tolist():
        stock._step_index = None
        expected = stock.step(output, t, x, generator=generator()).denoised
        found = distillation.consistency(SCHEDULE, prediction, output, x, at(t, 3))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    at_0 = distillation.consistency(SCHEDULE, prediction, output, x, at(0, 3))
    assert torch.equal(at_0, x)  # the boundary condition, whatever the network says


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_solver_s_step_is_stock_s(prediction: Prediction) -> None:
    stock = DDIMScheduler.from_config(scheduler_config(SCHEDULE, prediction))
    stock.set_timesteps(50)
    x, output = randn(3, 4, 2, 2, seed=1).float(), randn(3, 4, 2, 2, seed=2).float()
    for t in (999, 499, 39):
        expected = stock.step(output, t, x).prev_sample
        found = distillation.ddim_step(SCHEDULE, prediction, output, x, at(t, 3), at(t - 20, 3))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_follows_the_exact_ode(prediction: Prediction) -> None:
    """Its error falls by four with half the stride, as that of a method of first order does; one point is exact."""
    x, network = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], LINE.network(SCHEDULE, prediction)

    def step(t: int, s: int) -> Tensor:
        return distillation.ddim_step(SCHEDULE, prediction, network(x, at(t, 41)), x, at(t, 41), at(s, 41))

    for t in (899, 499, 199):
        errors = [(step(t, t - k) - LINE.transport(x, level(t), level(t - k))).abs().max() for k in (20, 10)]
        assert 3 < float(errors[0] / errors[1]) < 5 and float(errors[0]) < 0.01
    point = Mixture(double([1.0]), double([[0.4]]), double([[[0.0]]]))
    output = point.network(SCHEDULE, prediction)(x, at(899, 41))
    found = distillation.ddim_step(SCHEDULE, prediction, output, x, at(899, 41), at(0, 41))
    noise = (x - level(899)[0] * 0.4) / level(899)[1]
    torch.testing.assert_close(found, level(0)[0] * 0.4 + level(0)[1] * noise)


def losses(student: str, steps: int) -> Tensor:
    """The loss where student and target are the exact consistency function ("ends") or the denoiser, [16]."""
    x0 = LINE.sample(16, generator(3))
    t, s, _ = distillation.solver_pairs(torch.linspace(0.03, 0.999, 16, dtype=torch.float64), 1000, steps)
    denoiser = LINE.network(SCHEDULE, "v")

    def ends(x: Tensor, t: Tensor) -> Tensor:
        found = torch.empty_like(x)
        for one in t.unique().tolist():  # x0 at the end of each path, said as v
            rows, (alpha, sigma) = t == one, level(one)
            end = LINE.transport(x[rows], (alpha, sigma))
            eps = (x[rows] - alpha * end) / sigma
            found[rows] = target("v", end, eps, double(alpha), double(sigma))
        return found

    network = ends if student == "ends" else denoiser
    return distillation.consistency_loss(
        network, network, denoiser, SCHEDULE, "v", x0, randn(16, 1, seed=4), t, s, huber_c=1e-4
    )


def test_the_exact_consistency_function_has_the_least_loss() -> None:
    """All that is left of it is the solver's error, which goes with its steps; the denoiser is far from consistent."""
    exact, finer = (float(losses("ends", steps).mean()) for steps in (50, 250))
    assert exact < 0.15 * float(losses("denoiser", 50).mean())
    assert finer < 0.4 * exact


def test_only_the_student_gets_a_gradient() -> None:
    student, average, teacher = (torch.nn.Linear(4, 4) for _ in range(3))
    x0, eps = randn(6, 4).float(), randn(6, 4, seed=1).float()
    t, s, _ = distillation.solver_pairs(torch.rand(6, dtype=torch.float64), 1000, 50)
    networks = [lambda x, t, layer=layer: layer(x) for layer in (student, average, teacher)]
    loss = distillation.consistency_loss(*networks, SCHEDULE, "v", x0, eps, t, s, huber_c=0.001)
    assert loss.shape == (6,)
    loss.sum().backward()
    assert student.weight.grad is not None and bool(student.weight.grad.any())
    assert average.weight.grad is None and teacher.weight.grad is None


def test_the_distance_goes_from_a_square_to_an_absolute_value() -> None:
    small, large = torch.full((2, 3), 1e-4).double(), torch.full((2, 3), -50.0).double()
    torch.testing.assert_close(distillation.pseudo_huber(small, 0.1), double([5e-8, 5e-8]), rtol=1e-3, atol=0)
    torch.testing.assert_close(distillation.pseudo_huber(large, 0.1), double([49.9, 49.9]), rtol=1e-3, atol=0)
