"""Strips, GIFs and films hold the pictures they are made of, in order."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ldm.data.animation import check_motion, save_motion, strip

COLORS = ["red", "lime", "blue"]
PICTURES = [Image.new("RGB", (17, 16), color) for color in COLORS]


def color(pixels: np.ndarray) -> str:
    """The color of a picture's middle, as far as a film keeps it."""
    return COLORS[int(pixels[8, 8].argmax())]


def test_a_strip_is_a_row() -> None:
    found = strip(PICTURES)
    assert found.size == (51, 16)
    assert all(np.array_equal(np.asarray(found)[:, 17 * i : 17 * i + 17], one) for i, one in enumerate(PICTURES))


def test_a_gif_repeats_and_takes_its_time(tmp_path: Path) -> None:
    save_motion(PICTURES, tmp_path / "a.gif", fps=5)
    with Image.open(tmp_path / "a.gif") as found:
        assert found.info["loop"] == 0 and found.info["duration"] == 200
        assert [color(np.asarray(frame.convert("RGB"))) for frame in ImageSequence.Iterator(found)] == COLORS


def test_a_film(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    save_motion(PICTURES, tmp_path / "a.mp4", fps=5)
    with av.open(str(tmp_path / "a.mp4")) as found:
        stream = found.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (18, 16, 5)
        assert [color(frame.to_ndarray(format="rgb24")) for frame in found.decode(stream)] == COLORS


def test_a_film_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    check_motion(tmp_path / "a.gif")
    with pytest.raises(ModuleNotFoundError, match=r'MP4 needs PyAV: pip install "ldm\[video\]"'):
        check_motion(tmp_path / "a.mp4")
