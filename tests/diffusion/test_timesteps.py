"""Every draw of t has the distribution it says; importance sampling changes the draw, not the mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator
from torch import Tensor

from ldm.diffusion import timesteps


def trained(losses: Tensor, history: int = 4) -> timesteps.LossSecondMoment:
    sampler = timesteps.LossSecondMoment(len(losses), history=history)
    for _ in range(history):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=torch.float64)


LOSSES = torch.tensor([8.0, 0.5, 0.1, 0.1, 0.02], dtype=torch.float64)


@pytest.mark.parametrize("T", [1, 7, 1000])
def test_uniform_t_is_uniform(T: int) -> None:
    """Each t owns the T-th part of [0, 1), its ends included."""
    u = torch.arange(4 * T, dtype=torch.float64) / (4 * T)
    t, weight = timesteps.uniform(T)(u)
    assert torch.bincount(t, minlength=T).tolist() == [4] * T
    assert bool((weight == 1).all())
    assert int(timesteps.uniform(T)(torch.tensor([1 - 1e-16], dtype=torch.float64))[0]) == T - 1


def test_only_the_steps_that_are_used_are_learned() -> None:
    """Each of them owns an equal part of [0, 1)."""
    u = torch.arange(300, dtype=torch.float64) / 300
    t, weight = timesteps.among([999, 666, 332])(u)
    assert t.tolist() == [999] * 100 + [666] * 100 + [332] * 100 and bool((weight == 1).all())


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_t_has_the_published_density(mean: float, std: float) -> None:
    """The share of draws in each tenth of the chain is the normal distribution function of the logit's edges."""
    t, weight = timesteps.logit_normal(1000, mean, std)(uniform(50_000, 5))
    edges = torch.arange(1, 10) / 10
    normal = torch.distributions.Normal(mean, std).cdf(edges.logit())
    expected = torch.diff(torch.cat([torch.zeros(1), normal, torch.ones(1)]))
    found = torch.bincount(t // 100, minlength=10) / 50_000
    assert bool(((found - expected).abs() < 4.5 * (expected / 50_000).sqrt() + 1e-3).all())
    assert bool((weight == 1).all())
    assert timesteps.logit_normal(1000)(torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))[0].tolist() == [0, 999]


def test_uniform_until_every_t_has_its_history() -> None:
    sampler = timesteps.LossSecondMoment(3, history=2)
    for t in ([0, 1, 2], [0, 1], [0, 0, 0]):
        sampler.update(torch.tensor(t), torch.ones(len(t)))
        torch.testing.assert_close(sampler.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    assert float(sampler.probabilities()[2]) > 0.4


def test_probabilities_follow_the_second_moment() -> None:
    """Eq. 18 of the paper: the root of the mean square, not the mean."""
    sampler = timesteps.LossSecondMoment(2, history=2, uniform=0.0)
    sampler.update(torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, 3.0, 0.0, 4.0]))
    root = torch.tensor([3.0, 8**0.5], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities(), root / root.sum())


def test_the_oldest_loss_makes_room() -> None:
    sampler = trained(torch.tensor([1.0, 1.0]), history=3)
    for loss in (5.0, 6.0, 7.0):
        sampler.update(torch.tensor([0]), torch.tensor([loss]))
    assert sorted(sampler.losses[0].tolist()) == [5.0, 6.0, 7.0]


def test_the_weighted_mean_is_the_uniform_mean() -> None:
    """Exactly, as a sum over t of p_t times the weighted loss; and over draws, within their sampling error."""
    sampler = trained(LOSSES)
    p = sampler.probabilities()
    t, weight = sampler(uniform(20_000, 1))
    torch.testing.assert_close(weight, 1 / (5 * p[t]))
    assert float((p * (1 / (5 * p)) * LOSSES).sum()) == pytest.approx(float(LOSSES.mean()))
    drawn = weight * LOSSES[t]
    assert abs(float(drawn.mean() - LOSSES.mean())) < 4 * float(drawn.std()) / 20_000**0.5
    counts = torch.bincount(t, minlength=5) / 20_000
    assert bool(((counts - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all())


def test_the_estimate_varies_less() -> None:
    sampler = trained(LOSSES)
    t, weight = sampler(uniform(5_000, 2))
    evenly = LOSSES[torch.randint(5, (5_000,), generator=generator(3))]
    assert float((weight * LOSSES[t]).var()) < 0.05 * float(evenly.var())


@given(
    u=st.floats(0, 1, exclude_max=True) | st.just(1 - 2**-53), T=st.integers(1, 1200),
    mean=st.floats(-5, 5), std=st.floats(0.1, 20),
)  # fmt: skip
def test_every_u_gives_a_t(u: float, T: int, mean: float, std: float) -> None:
    """Also the last before 1, where the last t ends a rounding error too early, and where the logistic is 1."""
    for sampler in (timesteps.uniform(T), timesteps.logit_normal(T, mean, std), timesteps.LossSecondMoment(T)):
        t, weight = sampler(torch.tensor([u], dtype=torch.float64))
        assert t.dtype == torch.int64 and weight.dtype == torch.float64
        assert 0 <= int(t) < T and float(weight) == pytest.approx(1)


def test_the_ends_of_the_draw() -> None:
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert timesteps.LossSecondMoment(7)(last)[0].tolist() == [6]  # seven times 1/7 is less
    assert timesteps.logit_normal(1000, std=10.0)(last)[0].tolist() == [999]


@given(losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_no_t_is_ever_forgotten(losses: list[float]) -> None:
    p = trained(torch.tensor(losses, dtype=torch.float64)).probabilities()
    assert float(p.sum()) == pytest.approx(1)
    assert bool((p >= 0.0009 / len(losses)).all())


def test_the_history_is_saved_with_the_model() -> None:
    sampler, other = trained(LOSSES), timesteps.LossSecondMoment(5, history=4)
    other.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(other.probabilities(), sampler.probabilities())
    u = uniform(9, 4)
    assert sampler(u)[0].tolist() == other(u)[0].tolist()
