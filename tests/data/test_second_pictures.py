"""Second pictures in folders, shards and Hub sets are the same; and those that are rendered from drawings."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import road
from PIL import Image

from benchmarks.conditions import edge_agreement, right_entries
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import BadDataError, read_captioned
from ldm.data.emoji import openmoji
from ldm.data.emoji.variants import PALETTE, nearest_entries


def write_shards(data: Path, out: Path, second: str = "outline", skip: int = -1, twice: bool = False) -> Path:
    """A folder of `road.draw_folder` as two shards; row `skip` has no second picture, with `twice` each has two."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    out.mkdir()
    for shard in (0, 1):
        with tarfile.open(out / f"{shard}.tar", "w") as tar:
            for number, row in enumerate(rows):
                if number % 2 != shard:
                    continue
                members = {"png": data / row["file_name"], f"{second}.png": data / row["outline"]}
                members |= {f"{second}.jpg": data / row["outline"]} if twice else {}
                for suffix, path in members.items():
                    if number != skip or suffix == "png":
                        tar.add(path, f"{number:04d}.{suffix}")
                info = tarfile.TarInfo(f"{number:04d}.txt")
                info.size = len(row["text"])
                tar.addfile(info, io.BytesIO(row["text"].encode()))
    return out


def save_set(data: Path, out: Path) -> Path:
    """The same as a data set that `datasets` has saved, its second pictures in a column of pictures."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    columns: dict[str, Any] = {
        "image": [str(data / row["file_name"]) for row in rows],
        "outline": [str(data / row["outline"]) for row in rows],
        "text": [row["text"] for row in rows],
    }
    kinds = datasets.Features(image=datasets.Image(), outline=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict(columns, features=kinds).save_to_disk(str(out))
    return out


def conditioned(source: Path, column: str = "outline", **words: Any) -> ConditionedPictures:
    pictures = read_captioned(source, progress=False, **words)
    return ConditionedPictures.read(pictures, condition_column=column, progress=False)


def test_second_pictures_are_the_same_from_any_source(tmp_path: Path) -> None:
    data = road.draw_folder(tmp_path / "data")
    found = {}
    for source in (data, write_shards(data, tmp_path / "shards"), save_set(data, tmp_path / "saved")):
        read = conditioned(source)
        for number, row in enumerate(read.pictures):
            second = read.condition(number)
            pair = row.image().tobytes(), second.image().tobytes()
            assert pair[0] != pair[1] and second.size == (16, 16) and second.content and not second.captions
            assert found.setdefault((row.captions[0]), pair) == pair
        assert len(read) == 24 and len(read.all_pictures) == 48
    assert len(found) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"skip": 3}, r"outline: key has no such picture: .*1\.tar member 0003\.png"),
        ({"twice": True}, r"outline: key has several pictures of that name"),
        ({"second": "sketch"}, r"column 'outline' is missing: .* the nearest is 'sketch': set data\.condition_column"),
    ],
)
def test_rows_without_a_second_picture_are_named(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    shards = write_shards(road.draw_folder(tmp_path / "data"), tmp_path / "shards", **words)
    with pytest.raises(BadDataError, match=message):
        conditioned(shards)
    assert len(read_captioned(shards, progress=False)) == 24  # without the column nothing is wrong


def test_a_broken_second_picture_of_a_data_set_is_named(tmp_path: Path) -> None:
    row = {"image": {"bytes": png((1, 2, 3))}, "outline": {"bytes": b"\x89PNG broken"}, "text": "cat"}
    kinds = datasets.Features(image=datasets.Image(decode=False), outline=datasets.Image(decode=False),
                              text=datasets.Value("string"))  # fmt: skip
    good = {**row, "outline": {"bytes": png((4, 5, 6))}, "text": "red cat"}
    datasets.Dataset.from_list([good, row], features=kinds).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(BadDataError, match=r"picture is broken .*saved row 1"):
        conditioned(tmp_path / "saved")
    with pytest.raises(BadDataError, match="column 'text' is missing|column holds no pictures"):
        conditioned(tmp_path / "saved", "text")


def png(color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


# --- rendered ones ------------------------------------------------------------------------------------


def test_the_palette_has_24_entries() -> None:
    assert PALETTE.shape == (24, 3) and len({tuple(entry) for entry in PALETTE.tolist()}) == 24
    assert PALETTE[0].tolist() == [255, 255, 255]
    assert nearest_entries(PALETTE).tolist() == list(range(24))


@pytest.mark.parametrize("condition", ["outline", "colors"])
def test_each_drawing_has_its_outline_or_its_colors(
    tmp_path: Path, condition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py")
    few = [one for one in openmoji.find_drawings() if one.caption in openmoji.SHOWCASE][:6]
    monkeypatch.setattr(openmoji, "find_drawings", lambda: few)
    made = openmoji.build(tmp_path / "set", 64, condition=condition)
    read = conditioned(tmp_path / "set", condition, holdout=0)
    assert made == len(read) >= 5
    for number, row in enumerate(read.pictures):
        drawn, second = row.image(), read.condition(number).image()
        pixels = np.asarray(second).reshape(-1, 3)
        if condition == "outline":
            assert (pixels.max(1) - pixels.min(1)).max() == 0 and pixels.min() < 40  # black lines on white
            assert (np.asarray(drawn).min(-1)[np.asarray(second)[..., 0] < 40] < 60).all()
            assert edge_agreement(drawn, second) > 0.6 and edge_agreement(second, second) == 1
        else:
            assert {tuple(pixel) for pixel in pixels.tolist()} <= {tuple(entry) for entry in PALETTE.tolist()}
            assert right_entries(second, second) == 1
            assert right_entries(drawn, second) > 0.5 > right_entries(Image.new("RGB", (64, 64), "white"), second)


def test_edges_agree_within_a_pixel() -> None:
    line = Image.new("L", (20, 20), 255)
    line.paste(0, (9, 0, 10, 20))
    moved, far = Image.new("L", (20, 20), 255), Image.new("L", (20, 20), 255)
    moved.paste(0, (10, 0, 11, 20))
    far.paste(0, (2, 0, 3, 20))
    assert edge_agreement(line, moved) == pytest.approx(1) and edge_agreement(line, far) == 0
    assert edge_agreement(Image.new("L", (20, 20), 255), line) == 0
