"""The embedded data set: names as Unicode's CLDR gives them, a fixed split, compositions that are really new."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.dataset import read_captioned, split_of
from ldm.data.emoji.openmoji import (
    HOLDOUT,
    SHOWCASE,
    build,
    find_compositions,
    find_drawings,
    in_demo,
    make_folder,
    render,
    write_rows,
)


@pytest.fixture(scope="module")
def drawings() -> list:  # type: ignore[type-arg]
    return find_drawings()


# Read off the CLDR's English annotations (common/annotations*/en.xml) by hand, not derived by our rules.
CLDR = {
    "2764": "red heart",
    "1F355": "pizza",
    "1F1EF-1F1F5": "flag: Japan",
    "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F": "flag: England",
    "1F469-1F3FF-200D-1F692": "woman firefighter: dark skin tone",
    "1F468-1F3FB-200D-1F9B0": "man: light skin tone, red hair",
    "1F468-200D-1F9B0": "man: red hair",
    "1F9D4-200D-2642": "man: beard",
    "1F468-200D-1F469-200D-1F466": "family: man, woman, boy",
    "1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FD": "people holding hands: light skin tone, medium skin tone",
    "1F44B-1F3FE": "waving hand: medium-dark skin tone",
    "1F60E": "smiling face with sunglasses",
    "2614": "umbrella with rain drops",
    "1F3FF": "dark skin tone",
}


def test_captions_are_cldr_names(drawings: list) -> None:  # type: ignore[type-arg]
    named = {"-".join(drawing.codes): drawing.caption for drawing in drawings}
    assert {codes: named[codes] for codes in CLDR} == CLDR


# One of each group, by OpenMoji's names of them.
GROUPS = {
    "2764": "smileys-emotion",
    "1F355": "food-drink",
    "1F344": "animals-nature",
    "1F1EF-1F1F5": "flags",
    "1F469-1F3FF-200D-1F692": "people-body",
    "1F680": "travel-places",
    "26BD": "activities",
    "1F511": "objects",
    "2648": "symbols",
    # two whose first code point is of another group
    "1F344-200D-1F7EB": "food-drink",
    "1F441-200D-1F5E8": "smileys-emotion",
}


def test_groups_are_those_of_openmoji(drawings: list) -> None:  # type: ignore[type-arg]
    grouped = {"-".join(drawing.codes): drawing.group for drawing in drawings}
    assert {codes: grouped[codes] for codes in GROUPS} == GROUPS
    assert set(grouped.values()) == {*GROUPS.values(), "component"}


# Read off the same annotations: what they say beside the name.
DESCRIBED = {
    "1F680": "rocket, space, travel and places",
    "1F355": "pizza, cheese, slice, food and drink",
    "1F1EF-1F1F5": "flag: Japan, flags",
    "1F469-1F3FF-200D-1F692": "woman firefighter: dark skin tone, firetruck, people and body",
}


def test_the_longer_caption_is_name_keywords_and_group(drawings: list) -> None:  # type: ignore[type-arg]
    described = {"-".join(drawing.codes): drawing.described for drawing in drawings}
    assert {codes: described[codes] for codes in DESCRIBED} == DESCRIBED
    assert sum(bool(drawing.keywords) for drawing in drawings) > 2000


def test_every_name_is_used_once(drawings: list) -> None:  # type: ignore[type-arg]
    captions = [drawing.caption for drawing in drawings]
    assert 3800 < len(captions) < 4100
    assert len(set(captions)) == len(captions)
    assert not [caption for caption in captions if "_" in caption or "  " in caption or caption != caption.strip(" :")]


def test_split_keeps_a_twentieth_out(drawings: list) -> None:  # type: ignore[type-arg]
    heldout = [drawing.caption for drawing in drawings if split_of(drawing.caption, HOLDOUT) == "heldout"]
    expected, deviation = HOLDOUT * len(drawings), (HOLDOUT * (1 - HOLDOUT) * len(drawings)) ** 0.5
    assert abs(len(heldout) - expected) < 4 * deviation
    assert not set(SHOWCASE) & set(heldout)
    assert set(SHOWCASE) <= {drawing.caption for drawing in drawings if in_demo(drawing)}


def test_compositions_are_new_pairs_of_trained_parts(drawings: list) -> None:  # type: ignore[type-arg]
    """Checked on the captions' words alone, where the code goes by code points."""
    compositions = find_compositions(drawings)
    assert len(compositions) > 50
    trained = {drawing.caption for drawing in drawings if split_of(drawing.caption, HOLDOUT) == "train"}
    parts = [caption.rsplit(": ", 1) for caption in trained if caption.count("skin tone") == 1]
    people, tones = {part[0] for part in parts}, {part[-1].split(",")[0] for part in parts}
    for caption in compositions:
        assert caption not in trained
        person, qualities = caption.rsplit(": ", 1)
        assert person in people
        assert qualities.split(",")[0] in tones


def test_folder_is_an_ordinary_captioned_folder(tmp_path: Path) -> None:
    count = build(tmp_path, size=32, subset="demo")
    pictures = read_captioned(tmp_path)
    assert len(pictures) == count == len(list((tmp_path / "images").glob("*.png")))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert {row["text"] for row in rows if row["split"] == "heldout"} == {row.captions[0] for row in pictures.heldout}
    assert all({"group", "composition", "keywords"} <= row.extra.keys() for row in pictures)
    both = read_captioned(tmp_path, caption_columns=["text", "keywords"])
    assert all(row.captions == (pictures[i].captions[0], row.captions[1]) for i, row in enumerate(both))
    assert all(row.captions[1].startswith(row.captions[0]) for row in both)
    assert "CC BY-SA 4.0" in (tmp_path / "ATTRIBUTION.md").read_text("utf-8")
    assert all(row.image().size == (32, 32) for row in pictures)


def test_drawing_is_on_white_and_the_right_color(drawings: list) -> None:  # type: ignore[type-arg]
    named = {drawing.caption: drawing for drawing in drawings}
    for caption, channel in {"red circle": 0, "green circle": 1, "blue circle": 2}.items():
        pixels = np.asarray(
            Image.open(io.BytesIO(render(named[caption].svg.read_text("utf-8"), 64))).convert("RGB"), float
        )
        assert pixels[0, 0].tolist() == [255, 255, 255]
        middle = pixels[28:36, 28:36].mean((0, 1))
        assert middle.argmax() == channel
        assert middle[channel] - np.delete(middle, channel).min() > 60


def test_a_folder_that_is_made_again_holds_no_picture_without_a_row(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "ATTRIBUTION.md").touch()
    (tmp_path / "conditions").mkdir()
    for name in ("images/old.png", "images/new.png", "conditions/old.png", "conditions/new.png"):
        (tmp_path / name).touch()
    make_folder(tmp_path)
    write_rows(tmp_path, [{"file_name": "images/new.png", "outline": "conditions/new.png", "text": "new"}])
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["new.png", "new.png"]
