"""Memorization: copies are flagged, new pictures are not."""

from __future__ import annotations

import pytest
import torch
from oracles import Mixture, generator
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.metrics.memorization import memorization, nearest


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def verdict(generated: Tensor, heldout: Tensor, training: Tensor) -> str:
    far, near = (nearest(some, training, "euclidean")[0] for some in (generated, heldout))
    return memorization(far, near)["verdict"]  # type: ignore[no-any-return]


def test_copies_are_flagged_and_held_out_pictures_are_not() -> None:
    training, heldout = randn(16, 32), randn(12, 32, seed=1)
    copied = training + 0.01 * randn(16, 32, seed=2)
    assert verdict(copied, heldout, training) == "copies"
    assert verdict(heldout, heldout, training) == "no sign of copies"
    assert verdict(randn(16, 32, seed=3), heldout, training) == "no sign of copies"  # a model of the data distribution
    assert verdict(10 + heldout, heldout, training) == "no sign of copies"  # a model of something else


def test_a_third_of_copies_is_measured() -> None:
    training, heldout = randn(300, 32), randn(200, 32, seed=1)
    generated = torch.cat([training[:60] + 0.01 * randn(60, 32, seed=2), randn(120, 32, seed=3)])
    found = memorization(*(nearest(some, training, "euclidean")[0] for some in (generated, heldout)))
    assert found["verdict"] == "some copies"
    assert found["near_copies"]["drawn"]["value"] == pytest.approx(1 / 3, abs=0.08)
    assert found["near_copies"]["heldout"]["value"] == pytest.approx(0.05, abs=0.01)


def test_duplicates_across_the_split_are_not_held_against_the_model() -> None:
    """If a fifth of the held-out pictures are in the training set, a fifth of the generated ones may be."""
    training = randn(300, 32)
    heldout = torch.cat([training[:40], randn(160, 32, seed=1)])
    generated = torch.cat([training[40:80], randn(160, 32, seed=2)])
    assert verdict(generated, heldout, training) == "no sign of copies"
    assert verdict(training[:200], heldout, training) == "copies"


def test_a_network_that_has_memorized_sixteen_pictures_is_flagged() -> None:
    """The optimal denoiser of sixteen pictures, E[x0 | x_t], sampled by DDIM."""
    training, heldout = randn(16, 12).double(), randn(16, 12, seed=1).double()
    tight = 1e-6 * torch.eye(12, dtype=torch.float64).expand(16, 12, 12)
    mixture = Mixture(torch.full((16,), 1 / 16, dtype=torch.float64), training, tight)
    schedule = NoiseSchedule.linear()
    x = torch.randn(24, 12, generator=generator(), dtype=torch.float64)
    timesteps = schedule.timesteps(50)
    for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
        x0 = mixture.denoise(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        x = x0 if following < 0 else float(schedule.alpha[following]) * x0 + float(schedule.sigma[following]) * eps
    distance, number = nearest(x, training, "euclidean")
    assert len(set(number.tolist())) > 4  # not always the same picture
    assert memorization(distance, nearest(heldout, training, "euclidean")[0])["verdict"] == "copies"
