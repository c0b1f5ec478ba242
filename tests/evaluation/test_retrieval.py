"""Retrieval on known vectors, and the pixel features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.evaluation.features import pixel_extractor
from ldm.evaluation.metrics.retrieval import (
    caption_matches,
    distances,
    ranks,
    recall_among,
    recall_at_k,
    relatives_estimate,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_among_relatives_only_color_and_style_count() -> None:
    related = caption_matches(["pizza", "pizza", "rocket", ""], [["pizza"]] * 3 + [["rocket"], [], []])
    assert related.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
    matches = torch.eye(6, dtype=torch.bool)[[0, 1, 3, 4]]
    matches[1, 2] = True
    distance = torch.tensor([
        [0.2, 0.3, 0.4, 0.1, 0.1, 0.1],  # a rocket is nearer, but of the pizzas the right one
        [0.2, 0.3, 0.4, 0.5, 0.5, 0.5],  # the wrong pizza
        [0.1, 0.1, 0.1, 0.2, 0.1, 0.1],  # one rocket alone is no choice
        [0.1, 0.1, 0.1, 0.2, 0.1, 0.1],
    ])  # fmt: skip
    hit, chance = recall_among(distance, matches, related)
    assert hit[:2].tolist() == [1, 0] and hit[2:].isnan().all()
    assert chance[:2].tolist() == pytest.approx([1 / 3, 2 / 3]) and chance[2:].isnan().all()
    found = relatives_estimate(hit, chance)["relatives"]
    assert found["top1"]["value"] == 0.5 and found["top1"]["n"] == 2 and found["chance"] == pytest.approx(0.5)
    assert relatives_estimate(hit[2:], chance[2:]) == {}


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
