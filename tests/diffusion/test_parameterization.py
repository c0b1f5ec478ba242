"""Every prediction turns into every other, and into the score of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import PREDICTIONS, SCHEDULES, Mixture, line, plane, randn, space
from torch import Tensor

from ldm.diffusion import forward, reverse
from ldm.diffusion import parameterization as prediction
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.schedule import NoiseSchedule


class Case(NamedTuple):
    schedule: NoiseSchedule
    t: Tensor
    x0: Tensor
    eps: Tensor
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor


@given(
    kind=st.sampled_from(PREDICTIONS),
    shape=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    t=st.sampled_from([0, 1, 500, 998, 999]),
    name=st.sampled_from([n for n in SCHEDULES if n != "zero_snr"]),
)
def test_a_target_gives_back_the_pair(
    kind: Prediction, shape: list[int], dtype: torch.dtype, t: int, name: str
) -> None:
    schedule = SCHEDULES[name]
    x0, eps = randn(2, *shape, seed=1).to(dtype), randn(2, *shape, seed=2).to(dtype)
    steps = torch.full((2,), t)
    alpha, sigma = schedule.at(steps, x0)
    x_t = forward.q_sample(schedule, x0, steps, eps)
    answer = prediction.target(kind, x0, eps, alpha, sigma)
    # One rounding error of x_t, magnified by what the conversion divides by.
    slack = 20 * torch.finfo(dtype).eps
    found = prediction.to_x0(kind, answer, x_t, alpha, sigma)
    torch.testing.assert_close(found, x0, rtol=0, atol=slack / float(alpha.min()))
    found = prediction.to_eps(kind, answer, x_t, alpha, sigma)
    torch.testing.assert_close(found, eps, rtol=0, atol=slack / float(sigma.min()))
    v = alpha * eps - sigma * x0
    found = prediction.to_v(kind, answer, x_t, alpha, sigma)
    torch.testing.assert_close(found, v, rtol=0, atol=slack / float(torch.minimum(alpha, sigma).min()))
    assert found.dtype == dtype and found.shape == x0.shape


#: The five forms: what stands for the pair (x0, eps) at t, and which x0 stands behind an answer.
FORMS: dict[str, tuple[Callable[[Case], Tensor], Callable[[Case, Tensor], Tensor]]] = {
    "eps": (lambda c: c.eps, lambda c, a: prediction.x0_from_eps(c.x_t, a, c.alpha, c.sigma)),
    "x0": (lambda c: c.x0, lambda c, a: a),
    "v": (lambda c: c.alpha * c.eps - c.sigma * c.x0, lambda c, a: prediction.x0_from_v(c.x_t, a, c.alpha, c.sigma)),
    "score": (
        lambda c: (c.alpha * c.x0 - c.x_t) / c.sigma**2,
        lambda c, a: prediction.x0_from_eps(c.x_t, prediction.eps_from_score(a, c.sigma), c.alpha, c.sigma),
    ),
    "mean": (
        lambda c: reverse.posterior(c.schedule, c.x0, c.x_t, c.t, c.t - 1)[0],
        lambda c, a: reverse.x0_from_mean(c.schedule, a, c.x_t, c.t, c.t - 1),
    ),
}
#: Which answer of each form an x0 is.
ANSWERS: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "eps": lambda c, x0: prediction.eps_from_x0(c.x_t, x0, c.alpha, c.sigma),
    "x0": lambda c, x0: x0,
    "v": lambda c, x0: prediction.v_from_x0(c.x_t, x0, c.alpha, c.sigma),
    "score": lambda c, x0: prediction.score_from_eps(prediction.eps_from_x0(c.x_t, x0, c.alpha, c.sigma), c.sigma),
    "mean": lambda c, x0: reverse.posterior(c.schedule, x0, c.x_t, c.t, c.t - 1)[0],
}


@pytest.mark.parametrize("given_form", FORMS)
@pytest.mark.parametrize("wanted", FORMS)
@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "zero_snr"])
def test_every_form_gives_every_other(given_form: str, wanted: str, name: str) -> None:
    """Noise, x0, v, score and the mean of the step to t - 1, at both ends and between."""
    schedule, t = SCHEDULES[name], torch.tensor([0, 1, 400, 998, 999])
    x0, eps = randn(5, 2, 3, seed=1), randn(5, 2, 3, seed=2)
    alpha, sigma = schedule.at(t, x0)
    case = Case(schedule, t, x0, eps, forward.q_sample(schedule, x0, t, eps), alpha, sigma)
    answer, _ = FORMS[wanted]
    given_answer, x0_of = FORMS[given_form]
    found = ANSWERS[wanted](case, x0_of(case, given_answer(case)))
    torch.testing.assert_close(found, answer(case), rtol=1e-6, atol=1e-6)


def test_v_is_that_of_diffusers() -> None:
    stock = diffusers.DDPMScheduler()
    x0, eps, t = randn(3, 4, seed=1), randn(3, 4, seed=2), torch.tensor([0, 400, 999])
    alpha, sigma = NoiseSchedule.linear().at(t, x0)
    ours = prediction.v_from(x0, eps, alpha, sigma)
    torch.testing.assert_close(ours, stock.get_velocity(x0, eps, t), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_nothing_divides_by_zero_where_all_is_noise(kind: Prediction) -> None:
    schedule = SCHEDULES["zero_snr"]
    x0, eps, t = randn(2, 3, seed=1), randn(2, 3, seed=2), torch.tensor([999, 999])
    alpha, sigma = schedule.at(t, x0)
    answer = prediction.target(kind, x0, eps, alpha, sigma)
    torch.testing.assert_close(prediction.to_x0(kind, answer, eps, alpha, sigma), x0)
    torch.testing.assert_close(prediction.to_eps(kind, answer, eps, alpha, sigma), eps)
    torch.testing.assert_close(prediction.to_v(kind, answer, eps, alpha, sigma), -x0)


@pytest.mark.parametrize("data", [line(), plane(), space()], ids=["line", "plane", "space"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_exact_network_gives_the_posterior_mean_and_the_score(data: Mixture, kind: Prediction) -> None:
    schedule = NoiseSchedule.scaled_linear()
    t = torch.tensor([0, 250, 700, 999])
    x_t = randn(4, data.dim, seed=3)
    alpha, sigma = schedule.at(t, x_t)
    denoiser = data.denoiser(schedule, kind)
    torch.testing.assert_close(denoiser.x0(x_t, t), data.denoise(x_t, alpha, sigma), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(denoiser.score(x_t, t), data.score(x_t, alpha, sigma), rtol=1e-7, atol=1e-9)
    eps = denoiser.eps(x_t, t)
    torch.testing.assert_close(prediction.score_from_eps(eps, sigma), data.score(x_t, alpha, sigma))
    torch.testing.assert_close(prediction.eps_from_score(data.score(x_t, alpha, sigma), sigma), eps)
    torch.testing.assert_close(denoiser.v(x_t, t), (eps - sigma * x_t) / alpha, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_adding_to_the_score_is_the_same_for_every_prediction(name: str) -> None:
    """Converted to the score by `to_eps` and `score_from_eps`, every kind has moved by the change, and by no more."""
    schedule = SCHEDULES[name]
    t = torch.tensor([0, 300, 998])
    x_t, change = randn(3, 4, seed=1), randn(3, 4, seed=2)
    alpha, sigma = schedule.at(t, x_t)
    for kind in PREDICTIONS:
        output = randn(3, 4, seed=3)
        before = prediction.score_from_eps(prediction.to_eps(kind, output, x_t, alpha, sigma), sigma)
        changed = prediction.add_to_score(kind, output, change, alpha, sigma)
        after = prediction.score_from_eps(prediction.to_eps(kind, changed, x_t, alpha, sigma), sigma)
        torch.testing.assert_close(after - before, change, rtol=1e-6, atol=1e-8)


def test_no_condition_moves_what_is_all_noise() -> None:
    one, last = torch.ones(1, 1), torch.zeros(1, 1)
    for kind in ("x0", "v"):
        assert prediction.add_to_score(kind, 3 * one, one, last, one).tolist() == [[3.0]]  # type: ignore[arg-type]


def test_errors_name_what_came() -> None:
    one = torch.ones(1)
    for function in (prediction.to_eps, prediction.to_x0, prediction.to_v, prediction.target, prediction.add_to_score):
        with pytest.raises(ValueError, match="expected eps, x0, v or flow, got 'noise'"):
            function("noise", one, one, one, one)  # type: ignore[arg-type]
