"""The halves that the inpainting benchmark masks."""

from __future__ import annotations

import numpy as np
from PIL import Image

from benchmarks.inpainting import half_mask, hole_distance, inverted, only


def test_masks_are_the_four_halves() -> None:
    masks = [np.asarray(half_mask(number, 8)) for number in range(4)]
    left, right, upper, lower = masks
    assert (left[:, :4] == 255).all() and (left[:, 4:] == 0).all() and (upper[:4] == 255).all()
    assert (left + right == 255).all() and (upper + lower == 255).all()
    assert (np.asarray(inverted(half_mask(0, 8))) == right).all()


def test_only_the_masked_part_stays() -> None:
    picture = Image.new("RGB", (8, 8), (10, 20, 30))
    kept = np.asarray(only(picture, half_mask(1, 8)))
    assert (kept[:, 4:] == (10, 20, 30)).all() and (kept[:, :4] == 255).all()


def test_the_distance_is_of_the_hole_alone() -> None:
    true, made = Image.new("RGB", (8, 8), (10, 20, 30)), Image.new("RGB", (8, 8), (13, 20, 26))
    assert hole_distance(made, true, half_mask(2, 8)) == np.sqrt((9 + 0 + 16) / 3)
    made.paste((255, 255, 255), (0, 4, 8, 8))  # what is kept doesn't count
    assert hole_distance(made, true, half_mask(2, 8)) == np.sqrt((9 + 0 + 16) / 3)
