"""Several seeds of a prompt, on vectors whose answer is known by construction."""

from __future__ import annotations

import torch

from ldm.evaluation.metrics.seeds import seed_metrics

REAL = torch.eye(6)  # six real pictures, far from each other


def found(seeds: list[list[int]], matches: list[list[int]], groups: list[str] | None = None) -> dict:  # type: ignore[type-arg]
    """Each seed is a copy of the real picture of this number; matches: the pictures that have the prompt."""
    vectors = REAL[torch.tensor(seeds)] + 0.01
    table = torch.zeros(len(matches), len(REAL), dtype=torch.bool)
    for row, pictures in enumerate(matches):
        table[row, pictures] = True
    return seed_metrics(vectors, REAL, table, groups or ["a"] * len(seeds), "euclidean", 50)


def test_a_model_that_knows_one_picture_of_each_caption_covers_one_of_them() -> None:
    one = found([[0, 0, 0, 0]], [[0, 1, 2, 3]])
    assert one["coverage"]["value"] == 0.25
    assert one["reliability"]["value"] == 1
    every = found([[0, 1, 2, 3]], [[0, 1, 2, 3]])
    assert every["coverage"]["value"] == 1
    assert abs(every["coverage"]["of_even_choice"] - (1 - 0.75**4)) < 1e-12


def test_what_is_nearest_to_another_caption_covers_nothing() -> None:
    mush = found([[4, 5, 4, 0]], [[0, 1]])
    assert mush["coverage"]["value"] == 0.5
    assert mush["reliability"]["value"] == 0
    assert mush["recall"]["top1"]["value"] == 0.25


def test_captions_of_one_picture_have_no_coverage_and_groups_have_their_own_recall() -> None:
    both = found([[0, 0], [2, 3]], [[0], [1]], ["food", "flags"])
    assert "coverage" not in both
    assert both["groups"]["food"]["top1"]["value"] == 1
    assert both["groups"]["flags"]["top1"]["value"] == 0
    assert both["groups"]["food"]["top1"]["n"] == 2
    assert both["reliability"] | {} == {**both["reliability"], "value": 0.5, "n": 2}
    assert "groups" not in found([[0]], [[0]])
