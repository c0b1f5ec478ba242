"""Nouns x colors x styles x people: what is held out never occurs in training, and pictures show what captions say."""

from __future__ import annotations

import colorsys
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.dataset import read_captioned
from ldm.data.emoji import compositions
from ldm.data.emoji.compositions import HELD_COLORS, NEVER_RECOLORED, Picture, build, list_pictures
from ldm.data.emoji.openmoji import Drawing, find_drawings, render
from ldm.data.emoji.styles import Style, read_style
from ldm.data.emoji.variants import FAMILIES, dominant_family, has_hair, outline, recolored, with_hair

SQUARE = '<path fill="#f00" d="M0 0h10v10H0z"/>'


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    return find_drawings()


@pytest.fixture(scope="module")
def pictures(drawings: list[Drawing]) -> list[Picture]:
    """Of two styles; `square` has every emoji."""
    square = Style("square", {drawing.codes: SQUARE for drawing in drawings}, "Squares", "nobody", "MIT", "")
    few = Style("few", {drawing.codes: SQUARE for drawing in drawings[::2]}, "Few", "nobody", "MIT", "")
    return list(list_pictures(drawings, [few, square]))


def named(drawings: list[Drawing], caption: str) -> Drawing:
    return next(drawing for drawing in drawings if drawing.caption == caption)


def pixels(svg: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(io.BytesIO(render(svg, 48))).convert("RGB"), float) / 255


def middle_hue(svg: str) -> float:
    """The median hue, in degrees, of all pixels that have one."""
    image = pixels(svg).reshape(-1, 3)
    return 360 * float(np.median([colorsys.rgb_to_hsv(*pixel)[0] for pixel in image[np.ptp(image, 1) > 0.12]]))


@pytest.mark.parametrize(("color", "low", "high"), [("green", 60, 110), ("purple", 250, 290), ("pink", 300, 360)])
def test_a_recolored_drawing_has_the_hue_of_its_word(
    drawings: list[Drawing], color: str, low: float, high: float
) -> None:
    """Hues are measured, not looked up in the table of entries."""
    for caption in ("strawberry", "t-shirt", "fox"):
        drawing = named(drawings, caption)
        family = dominant_family(drawing)
        assert family is not None
        svg = drawing.svg.read_text("utf-8")
        assert not low <= middle_hue(svg) <= high
        assert low <= middle_hue(recolored(svg, family, color)) <= high


def test_what_has_a_meaning_in_its_color_is_not_recolored(drawings: list[Drawing]) -> None:
    for caption in ("red heart", "flag: Japan", "green apple", "woman firefighter", "stop button", "blue circle"):
        assert dominant_family(named(drawings, caption)) is None
    assert sum(dominant_family(drawing) is not None for drawing in drawings) > 600


def test_an_outline_is_black_lines_on_white(drawings: list[Drawing]) -> None:
    for caption in ("pizza", "man firefighter", "cat face"):  # the second has groups within groups
        image = pixels(outline(named(drawings, caption).svg.read_text("utf-8")))
        assert float((image.max(-1) - image.min(-1)).max()) < 0.02
        assert 0.02 < float((image.mean(-1) < 0.5).mean()) < 0.5


def test_other_hair_changes_the_hair_alone(drawings: list[Drawing]) -> None:
    svg = named(drawings, "woman firefighter: dark skin tone").svg.read_text("utf-8")
    assert has_hair(svg)
    assert not has_hair(named(drawings, "pizza").svg.read_text("utf-8"))
    before, after = pixels(svg), pixels(with_hair(svg, "pink"))

    def pink(image: np.ndarray) -> float:  # type: ignore[type-arg]
        return float((np.abs(image - np.array([0xFF, 0xA7, 0xC0]) / 255).max(-1) < 0.01).mean())

    assert pink(before) == 0 < 0.004 < pink(after)
    changed = np.abs(after - before).max(-1) > 0.01
    assert changed.mean() < 0.1
    assert before[changed].mean() < 0.5  # it was black


def test_what_is_held_out_is_never_a_training_caption(pictures: list[Picture]) -> None:
    training = {caption for picture in pictures if not picture.test for caption in picture.captions.values()}
    heldout = {picture.captions["text"] for picture in pictures if picture.test}
    assert not training & heldout
    tests = Counter(picture.test for picture in pictures)
    assert all(tests[test] > 40 for test in ("concept", "skin tone", "color", "new color", "style"))


def test_a_held_out_concept_occurs_in_no_style_color_or_outline(pictures: list[Picture]) -> None:
    unseen = {picture.concept for picture in pictures if picture.test == "concept"}
    assert not unseen & {picture.concept for picture in pictures if not picture.test}


def test_a_held_out_style_is_of_a_concept_and_a_style_that_are_trained_on(pictures: list[Picture]) -> None:
    trained = {(picture.concept, picture.style) for picture in pictures if not picture.test}
    for picture in pictures:
        if picture.test == "style":
            assert (picture.concept, picture.style) not in trained
            assert (picture.concept, "openmoji") in trained
            assert picture.captions["text"].endswith(f", {picture.style} style")
            assert picture.concept in picture.captions.values()  # a prompt without a style matches it, too


def test_colors_are_held_out_by_a_latin_square(pictures: list[Picture]) -> None:
    color_pictures = [picture for picture in pictures if picture.color and picture.captions["text"] != picture.concept]
    never = [picture for picture in color_pictures if picture.concept in NEVER_RECOLORED]
    assert len({picture.concept for picture in never}) == len(NEVER_RECOLORED) == 60
    assert {picture.test for picture in never} == {"new color"}
    others = [picture for picture in color_pictures if picture.concept not in NEVER_RECOLORED]
    held = Counter(picture.concept for picture in others if picture.test == "color")
    assert set(held.values()) <= {HELD_COLORS - 1, HELD_COLORS}  # an object's own color may fall among them
    by_color = Counter(picture.color for picture in others if picture.test == "color")
    every_color = Counter(picture.color for picture in others)
    assert all(0.25 < by_color[color] / every_color[color] < 0.5 for color in FAMILIES)


def test_the_split_of_a_picture_does_not_depend_on_the_styles_given(
    drawings: list[Drawing], pictures: list[Picture]
) -> None:
    alone = {picture.name: picture.row() for picture in list_pictures(drawings, [])}
    beside = {picture.name: picture.row() for picture in pictures if picture.style == "openmoji"}
    assert alone == beside
    assert len({picture.name for picture in pictures}) == len(pictures)


def test_the_folder_is_an_ordinary_captioned_folder(
    tmp_path: Path, drawings: list[Drawing], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [named(drawings, caption) for caption in ("pizza", "guitar", "ninja: dark skin tone", "hot pepper")]
    monkeypatch.setattr(compositions, "find_drawings", lambda: few)
    package(tmp_path / "icons", {"1f355": "slice"}, {"slice": {"body": SQUARE}})
    made = build(tmp_path / "out", {"square": tmp_path / "icons"}, size=64)
    found = read_captioned(tmp_path / "out", caption_columns=["text", "styled", "keywords", "colored"])
    assert len(found) == made
    assert all(row.image().size == (64, 64) for row in found)
    captions = {row.captions for row in found}
    assert ("pizza", "pizza, square style") in captions
    assert "pink hot pepper" in {row.captions[0] for row in found}
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert {row["text"]: row["split"] for row in rows if row["test"]} == {
        row.captions[0]: row.split for row in found.heldout
    }
    repeats = {row["text"] if row["style"] == "openmoji" else "of another style": row["repeats"] for row in rows}
    assert repeats["pizza"] == 4 and repeats["ninja: dark skin tone"] == 2 and repeats["hot pepper"] == 2
    assert repeats["pink hot pepper"] == 1 and repeats["outline of a pizza"] == 1 and repeats["of another style"] == 4
    text = (tmp_path / "out" / "ATTRIBUTION.md").read_text("utf-8")
    assert "CC BY-SA 4.0" in text
    assert "| square | Squares | A. Designer, https://example.org | MIT |" in text


def package(folder: Path, chars: dict[str, str], icons: dict[str, object], **more: object) -> None:
    folder.mkdir(parents=True)
    found = {"icons": icons, "width": 10, "height": 10, **more}
    (folder / "icons.json").write_text(json.dumps(found), "utf-8")
    (folder / "chars.json").write_text(json.dumps(chars), "utf-8")
    info = {
        "name": "Squares",
        "author": {"name": "A. Designer", "url": "https://example.org"},
        "license": {"spdx": "MIT"},
    }
    (folder / "info.json").write_text(json.dumps(info), "utf-8")


def test_an_icon_package_is_matched_by_code_points_and_through_aliases(tmp_path: Path, drawings: list[Drawing]) -> None:
    aliases = {"other": {"parent": "slice"}, "turned": {"parent": "slice", "hFlip": True}}
    chars = {"1f355": "other", "1f680": "turned", "2764-fe0f": "slice", "1f3b8": "nothing"}
    package(tmp_path / "it" / "package", chars, {"slice": {"body": SQUARE}}, aliases=aliases)
    style = read_style("it", tmp_path / "it", drawings)
    assert set(style.svgs) == {("1F355",), ("2764",)}
    image = pixels(style.svgs[("1F355",)])
    assert image[24, 24].tolist() == [1, 0, 0]  # the icon fills the middle, the margin is white
    assert image[1, 1].tolist() == [1, 1, 1]


def test_a_package_without_code_points_is_matched_by_name(tmp_path: Path, drawings: list[Drawing]) -> None:
    icons = {"woman-firefighter-dark-skin-tone": {"body": SQUARE}, "pizza": {"body": SQUARE}, "bogus": {"body": SQUARE}}
    package(tmp_path / "it", {}, icons)
    assert set(read_style("it", tmp_path / "it", drawings).svgs) == {("1F355",), ("1F469", "1F3FF", "200D", "1F692")}


def test_bad_styles_are_named(tmp_path: Path, drawings: list[Drawing]) -> None:
    with pytest.raises(ValueError, match=r"--style noto=.*: no icons\.json there; .*npm pack @iconify-json/noto"):
        read_style("noto", tmp_path, drawings)
    with pytest.raises(ValueError, match="the name is a word of captions"):
        read_style("No To", tmp_path, drawings)
    package(tmp_path / "odd", {}, {"bogus": {"body": SQUARE}})
    with pytest.raises(ValueError, match="none of its 1 icons is a known emoji"):
        read_style("odd", tmp_path / "odd", drawings)
    with pytest.raises(ValueError, match="always in the data set"):
        build(tmp_path / "out", {"openmoji": tmp_path})
    with pytest.raises(ValueError, match="expected 8 to 4096"):
        build(tmp_path / "out", {}, size=1)


def test_a_folder_of_other_pictures_is_left_alone(
    tmp_path: Path, drawings: list[Drawing], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.data.emoji import openmoji

    monkeypatch.setattr(compositions, "find_drawings", lambda: [named(drawings, "pizza")])
    monkeypatch.setattr(openmoji, "find_drawings", lambda: [named(drawings, "pizza")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/cat.txt").write_text("a cat")
    for make in (lambda out: build(out, {}, 16), lambda out: openmoji.build(out, 16)):
        with pytest.raises(ValueError, match="mine: expected an empty folder, none, or an earlier data set"):
            make(tmp_path / "mine")
        with pytest.raises(ValueError, match="expected a folder, got a file"):
            make(tmp_path / "mine/cat.txt")
        make(tmp_path / "new")
        make(tmp_path / "new")  # again, over what it made
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["cat.txt"]
