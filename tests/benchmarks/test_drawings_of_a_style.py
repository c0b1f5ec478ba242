"""Which drawings the LoRA benchmark teaches and asks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.lora import of_style, pick, plain, sepia
from ldm.data.dataset import read_captioned

ROWS = [
    ("pizza", "pizza", "openmoji", "food-drink"),
    ("red pizza", "pizza", "openmoji", "food-drink"),
    ("outline of a pizza", "pizza", "openmoji", "food-drink"),
    ("cook", "cook", "openmoji", "people-body"),
    ("pizza, noto style", "pizza", "noto", "food-drink"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    lines = []
    for number, (text, concept, style, group) in enumerate(ROWS):
        name = f"{number}.png"
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / "data" / name)
        lines.append(
            json.dumps({"file_name": name, "text": text, "concept": concept, "style": style, "group": group}) + "\n"
        )
    (tmp_path / "data/metadata.jsonl").write_text("".join(lines))
    return tmp_path / "data"


def test_plain_drawings_are_those_that_their_designers_made(data: Path) -> None:
    every = read_captioned(data)
    assert {row.captions[0] for row in plain(every)} == {"pizza", "cook", "pizza, noto style"}
    assert [row.captions[0] for row in of_style(every, "noto")] == ["pizza, noto style"]
    with pytest.raises(SystemExit, match="style: no drawings of 'ink' in .*; there are noto, openmoji"):
        of_style(every, "ink")


def test_sepia_is_brown_on_cream_of_things_alone(data: Path, tmp_path: Path) -> None:
    sepia(str(data), tmp_path / "styles")
    its = of_style(read_captioned(tmp_path / "styles"), "sepia")
    assert [row.captions[0] for row in its] == ["pizza, sepia style"]
    assert np.asarray(its[0].image())[0, 0].tolist() == [0x3B, 0x24, 0x12]  # of black
    pick(str(tmp_path / "styles"), "sepia", tmp_path / "picked")
    assert [row.captions[0] for row in read_captioned(tmp_path / "picked")] == ["pizza, sepia style"]
