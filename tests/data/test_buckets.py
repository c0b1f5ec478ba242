"""Aspect buckets: sizes of one area, the nearest one for each picture, and what is cut off it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.buckets import Buckets, bucket_sizes
from ldm.data.images import to_size, to_square


def test_sizes_of_the_module_s_example() -> None:
    assert bucket_sizes(64, 16, 2.0) == ((48, 96), (48, 80), (64, 64), (80, 48), (96, 48))


@given(step=st.sampled_from([8, 16, 32, 64]), edge=st.integers(1, 20), ratio=st.floats(1.1, 4))
def test_sizes_keep_the_area_and_come_in_pairs(step: int, edge: int, ratio: float) -> None:
    size = step * edge
    sizes = bucket_sizes(size, step, ratio)
    assert (size, size) in sizes and len(set(sizes)) == len(sizes)
    assert set(sizes) == {(high, wide) for wide, high in sizes}
    for wide, high in sizes:
        assert wide % step == high % step == 0 and max(wide, high) <= ratio * min(wide, high)
        # no multiple of the step brings one of the sides nearer to the area, given the other
        errors = [
            min(abs(area - size * size / side) for area in (other,)) for side, other in ((wide, high), (high, wide))
        ]
        assert min(errors) <= step / 2 + 1e-9
    ratios = [wide / high for wide, high in sizes]
    assert ratios == sorted(ratios)


def test_a_size_that_the_step_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        bucket_sizes(40, 16, 2.0)


@given(pictures=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=30))
def test_each_picture_goes_to_the_nearest_aspect_ratio(pictures: list[tuple[int, int]]) -> None:
    sizes = bucket_sizes(256, 64, 2.0)
    buckets = Buckets.nearest(np.array(pictures, np.uint32), sizes)
    for number, (width, height) in enumerate(pictures):
        distance = {(w, h): abs(math.log(width * h / (height * w))) for w, h in sizes}
        assert distance[buckets.size(number)] == pytest.approx(min(distance.values()))
    assert {size for size, _ in buckets.groups()} == {buckets.size(number) for number in range(len(pictures))}
    assert sorted(np.concatenate([group for _, group in buckets.groups()])) == list(range(len(pictures)))
    assert buckets.twice().size(len(pictures)) == buckets.size(0) and len(buckets.twice()) == 2 * len(pictures)


@given(
    picture=st.tuples(st.integers(1, 60), st.integers(1, 60)), size=st.sampled_from(bucket_sizes(64, 16, 2.0)),
    position=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)  # fmt: skip
def test_a_picture_covers_its_bucket_and_loses_the_least(
    picture: tuple[int, int], size: tuple[int, int], position: tuple[float, float]
) -> None:
    """Red counts columns, green rows: of one side nothing is lost, of the other what the aspect ratios differ by."""
    width, height = picture
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0], grid[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
    for crop in ("center", "random"):
        found = to_size(Image.fromarray(grid), size, crop, position)  # type: ignore[arg-type]
        assert found.shape == (size[1], size[0], 3)
    kept = (min(width, round(height * size[0] / size[1])), min(height, round(width * size[1] / size[0])))
    assert max(1, kept[0]) == width or max(1, kept[1]) == height
    exact = to_size(Image.fromarray(grid), (max(1, kept[0]), max(1, kept[1])))
    left, top = ((side - max(1, k)) // 2 for side, k in zip(picture, kept, strict=True))
    assert (exact[0, :, 0] == 4 * np.arange(left, left + exact.shape[1])).all()
    assert (exact[:, 0, 1] == 4 * np.arange(top, top + exact.shape[0])).all()


def test_a_square_is_what_it_was() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS, box=(10, 0, 40, 30)))
    assert np.array_equal(to_square(picture, 16), expected)
    assert np.array_equal(to_size(picture, (50, 30)), np.asarray(picture))
