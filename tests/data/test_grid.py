"""Captions beneath pictures: legible in any script that a font has, and never the same for two texts."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont, features

from ldm.data import grid
from ldm.data.grid import captioned_grid, legible, wrap

PICTURE = Image.new("RGB", (32, 32), "red")
PAIRS = {
    "Chinese": ("猫", "狗"),
    "Japanese": ("ねこ", "いぬ"),
    "Korean": ("고양이", "개"),
    "Cyrillic": ("кошка", "собака"),
    "Greek": ("γάτα", "σκύλος"),
    "Arabic": ("قطة", "كلب"),
    "accents": ("café", "cafè"),
    "long Chinese": ("猫" * 80, "猫" * 3 + "狗" * 77),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    grid._font.cache_clear()
    grid._warned.clear()
    yield
    grid._font.cache_clear()


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "font_files", lambda: ())


@pytest.fixture
def dejavu(monkeypatch: pytest.MonkeyPatch) -> str:
    """One system font: DejaVu Sans, which has Cyrillic, Greek and Arabic, and no Chinese."""
    matplotlib = importlib.util.find_spec("matplotlib")
    assert matplotlib is not None and matplotlib.origin
    file = str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")
    monkeypatch.setattr(grid, "font_files", lambda: (file,))
    return file


def picture_of(caption: str) -> np.ndarray:
    return np.asarray(captioned_grid([PICTURE], [caption]))


@pytest.mark.parametrize("kind", PAIRS)
def test_two_captions_are_two_grids(kind: str) -> None:
    one, other = PAIRS[kind]
    assert not np.array_equal(picture_of(one), picture_of(other))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.usefixtures("no_fonts")
def test_without_a_font_the_code_points_are_written_and_a_warning_is_given_once(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = PAIRS[kind]
    assert not np.array_equal(picture_of(one), picture_of(other))
    printed = capsys.readouterr().err
    lacking = min(c for c in one if ord(c) > 127)
    assert f"no font on this machine shows {lacking} (U+{ord(lacking):04X})" in printed and printed.count("\n") == 1
    assert ("fonts-noto-cjk" in printed) is (kind in ("Chinese", "Japanese", "Korean", "long Chinese"))
    picture_of(one)
    assert capsys.readouterr().err == ""
    text, _ = legible(one, 12)
    assert text.isascii() and f"U+{ord(lacking):04X}" in text


def test_a_font_of_the_system_is_taken_where_it_has_the_characters(
    dejavu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("Cyrillic", "Greek", "accents", *(["Arabic"] if features.check("raqm") else [])):
        text, font = legible(PAIRS[kind][0], 12)
        assert text == PAIRS[kind][0] and font.getname()[0] == "DejaVu Sans"
    assert legible("a cat", 12)[1].getname() == ImageFont.load_default(12).getname()
    assert capsys.readouterr().err == ""
    text, font = legible("рыжий 猫!", 12)
    assert text == "рыжий U+732B !" and font.getname()[0] == "DejaVu Sans"
    assert "shows 猫" in capsys.readouterr().err


def test_right_to_left_letters_need_shaping(dejavu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid.features, "check", lambda name: False)
    assert legible("قطة", 12)[0] == "U+0642 U+0637 U+0629"


@pytest.mark.parametrize(
    "text", ["a red heart on a blue flag in the wind at noon", "x" * 60, "猫" * 40, "a " + "b" * 50]
)
def test_lines_fit_their_cell(text: str) -> None:
    text, font = legible(text, 12)
    lines = wrap(text, font, 128)
    assert len(lines) <= 2 and all(font.getlength(line) <= 128 for line in lines)
    assert lines[-1].endswith("…") and "".join(lines)[:-1].replace(" ", "") in text.replace(" ", "")
    assert wrap("a cat", font, 128) == ["a cat"] and wrap("", font, 128) == [""]


def test_pictures_stand_over_their_captions() -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    made = captioned_grid([Image.new("RGB", (8, 8), color) for color in colors], ["a", "b", ""], columns=2, edge=64)
    cell = 64 + 4
    for i, color in enumerate(colors):
        left, top = 4 + i % 2 * cell, 4 + i // 2 * (64 + round(2.6 * 9) + 4)
        assert made.getpixel((left, top)) == made.getpixel((left + 63, top + 63)) == color
    below = [np.asarray(made)[4 + 64 : 4 + 64 + 20, 4 + n * cell : 4 + n * cell + 64] for n in (0, 1)]
    assert all((part < 128).any() for part in below)
    for one, other in itertools.combinations(below, 2):
        assert not np.array_equal(one, other)
