"""Retrieval and memorization on known pictures."""

from __future__ import annotations

import pytest
import torch
from oracles import Mixture, generator
from torch import Tensor

from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.features import pixel_extractor
from ldm.evaluation.metrics.memorization import memorization, nearest
from ldm.evaluation.metrics.retrieval import caption_matches, distances, ranks, recall_at_k


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- retrieval -----------------------------------------------------------------------------------


def test_ranks_agree_with_sorting() -> None:
    distance, matches = randn(40, 30).abs(), randn(40, 30, seed=1) > 1
    matches[:, 0] |= ~matches.any(1)
    for row, right, rank in zip(distance, matches, ranks(distance, matches), strict=True):
        order = sorted(range(30), key=lambda i: float(row[i]))
        assert int(rank) == 1 + next(place for place, i in enumerate(order) if right[i])


def test_a_picture_of_the_same_caption_is_a_hit() -> None:
    captions = [("red heart",), ("heart", "red heart"), ("pizza",), ("cat",)]
    matches = caption_matches(["red heart", "pizza"], captions)
    assert matches.tolist() == [[True, True, False, False], [False, False, True, False]]
    real = randn(4, 8)
    generated = torch.stack([real[1], real[3]])  # the other red heart, and a cat for the prompt "pizza"
    found = recall_at_k(ranks(distances(generated, real, "euclidean"), matches), 4)
    assert found["top1"]["value"] == 0.5 and found["top5"]["value"] == 1.0
    assert found["chance"]["top1"] == 0.25


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_copies_have_rank_1_and_constant_features_the_last_rank(metric: str) -> None:
    real = randn(50, 8)
    matches = torch.eye(50, dtype=torch.bool)
    assert (ranks(distances(real, real, metric), matches) == 1).all()  # type: ignore[arg-type]
    constant = torch.ones(50, 8)
    assert (ranks(distances(constant, constant, metric), matches) == 50).all()  # type: ignore[arg-type]


def test_cosine_neighbors_are_those_of_the_angle() -> None:
    a, b = randn(10, 6), randn(20, 6, seed=1) * torch.arange(1, 21).reshape(-1, 1)
    angles = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    assert torch.equal(distances(a, b, "cosine").argsort(1), angles.argsort(1, descending=True))


def test_the_pixel_extractor_averages_squares() -> None:
    extractor = pixel_extractor(64)
    pixels = randn(2, 3, 64, 64)
    averaged = pixels.reshape(2, 3, 16, 4, 16, 4).mean((3, 5)).flatten(1)
    torch.testing.assert_close(extractor.embed(pixels), averaged)
    assert extractor.resize == "average pooling over 4 x 4 pixels, 64 => 16" and extractor.sha256 is None


# --- memorization --------------------------------------------------------------------------------------


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
