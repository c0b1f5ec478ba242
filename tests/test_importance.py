"""Importance sampling changes the draw of t, not the mean; and does what it is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator
from torch import Tensor

from ldm.diffusion import importance


def trained(losses: Tensor, history: int = 4) -> importance.LossSecondMoment:
    sampler = importance.LossSecondMoment(len(losses), history=history)
    for _ in range(history):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


LOSSES = torch.tensor([8.0, 0.5, 0.1, 0.1, 0.02], dtype=torch.float64)


def test_uniform_until_every_t_has_its_history() -> None:
    sampler = importance.LossSecondMoment(3, history=2)
    for t in ([0, 1, 2], [0, 1], [0, 0, 0]):
        sampler.update(torch.tensor(t), torch.ones(len(t)))
        torch.testing.assert_close(sampler.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    assert float(sampler.probabilities()[2]) > 0.4


def test_probabilities_follow_the_second_moment() -> None:
    """Eq. 18 of the paper: the root of the mean square, not the mean."""
    sampler = importance.LossSecondMoment(2, history=2, uniform=0.0)
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
    t, weight = sampler.sample(20_000, generator(1))
    torch.testing.assert_close(weight, 1 / (5 * p[t]))
    assert float((p * (1 / (5 * p)) * LOSSES).sum()) == pytest.approx(float(LOSSES.mean()))
    drawn = weight * LOSSES[t]
    assert abs(float(drawn.mean() - LOSSES.mean())) < 4 * float(drawn.std()) / 20_000**0.5
    counts = torch.bincount(t, minlength=5) / 20_000
    assert bool(((counts - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all())


def test_the_estimate_varies_less() -> None:
    sampler = trained(LOSSES)
    t, weight = sampler.sample(5_000, generator(2))
    uniform = LOSSES[torch.randint(5, (5_000,), generator=generator(3))]
    assert float((weight * LOSSES[t]).var()) < 0.05 * float(uniform.var())


@given(losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_no_t_is_ever_forgotten(losses: list[float]) -> None:
    p = trained(torch.tensor(losses, dtype=torch.float64)).probabilities()
    assert float(p.sum()) == pytest.approx(1)
    assert bool((p >= 0.0009 / len(losses)).all())


def test_the_history_is_saved_with_the_model() -> None:
    sampler, other = trained(LOSSES), importance.LossSecondMoment(5, history=4)
    other.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(other.probabilities(), sampler.probabilities())
    first, again = sampler.sample(9, generator(4))[0], other.sample(9, generator(4))[0]
    assert first.tolist() == again.tolist()
