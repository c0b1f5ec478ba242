"""Wide and tall scenes: where the drawings lie is the truth, and the split has no favorites."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.aspect import in_frame, ink, is_whole, left_in, shows_all
from ldm.data.dataset import read_captioned
from ldm.data.emoji import scenes
from ldm.data.emoji.openmoji import find_drawings

pytest.importorskip("resvg_py")


def test_both_drawings_lie_in_their_boxes_and_square_crops_cut_them(tmp_path: Path) -> None:
    made = scenes.build(tmp_path / "scenes", 32, limit=12)
    pictures = read_captioned(tmp_path / "scenes", progress=False)
    assert made == len(pictures) == 60
    assert Counter(map(tuple, pictures.sizes.tolist())) == {(32, 32): 12, (64, 32): 24, (32, 64): 24}
    alone = {row.captions[0]: row.image() for row in pictures if row.size == (32, 32)}
    for row in pictures:
        image, boxes = row.image(), scenes.boxes_of(row.extra["boxes"])
        word = " beside " if row.size[0] > 32 else " above "
        names = row.captions[0].split(word) if len(boxes) == 2 else [row.captions[0]]
        for name, box in zip(names, boxes, strict=True):
            assert np.array_equal(image.crop(box), alone[name])
        assert shows_all(image, image, boxes) and in_frame(image, image) == 1
        assert left_in(image, row.size) == 1
        if len(boxes) == 2:
            left, top = (side // 2 - 16 for side in row.size)
            square = image.crop((left, top, left + 32, top + 32))
            kept = left_in(image, (32, 32))
            assert kept == ink(square).sum() / ink(image).sum() < 1
            assert in_frame(square, image) == pytest.approx(kept)


def test_a_limit_above_all_drawings_takes_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [one for one in find_drawings() if not one.tones and one.group not in scenes.LEFT_OUT][:8]
    monkeypatch.setattr(scenes, "find_drawings", lambda: few)
    assert scenes.build(tmp_path / "scenes", 8, limit=20) == 8 * 5
    alone = [row.captions[0] for row in read_captioned(tmp_path / "scenes", progress=False) if row.size == (8, 8)]
    assert sorted(alone) == sorted(one.caption for one in few)


def test_partners_do_not_decide_the_split() -> None:
    drawings = [one for one in find_drawings() if not one.tones][:200]
    pairs = [scene for scene in scenes.list_scenes(drawings) if len(scene.drawings) == 2]
    held = sum(scenes.split_of(scene.caption, 0.05) == "heldout" for scene in pairs) / len(pairs)
    assert abs(held - 0.05) < 5 * (0.05 * 0.95 / len(pairs)) ** 0.5


def test_ink_on_the_edge_is_a_subject_cut_off() -> None:
    picture = Image.new("RGB", (20, 10), "white")
    picture.paste((200, 0, 0), (5, 2, 15, 8))
    assert is_whole(picture) and not is_whole(picture.crop((0, 0, 10, 10)))


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [
        (4, None, "size: expected 8"),
        (32, 3, "drawings: expected at least 8"),
        (32, 0, "drawings: expected at least 8, got 0"),
        (32, -9, "drawings: expected"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, size: int, limit: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes.build(tmp_path / "scenes", size, limit)
