"""Pictures in a row: a strip, an animated GIF or a film."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

MOTION = (".gif", ".mp4")


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = pictures[0].size
    whole = Image.new("RGB", (len(pictures) * width, height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * width, 0))
    return whole


def check_motion(path: Path) -> None:
    """Raise a ModuleNotFoundError if what writes this format isn't installed."""
    if path.suffix.lower() == ".mp4":
        _av()


def save_motion(pictures: Sequence[Image.Image], path: Path, fps: float = 8.0) -> None:
    """Write pictures of one size as an animation that repeats (.gif) or a film (.mp4, H.264).

    Args:
        fps: pictures a second; GIF has hundredths of a second.
    Raises:
        ModuleNotFoundError: for MP4 without PyAV.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".mp4":
        _save_mp4(pictures, path, fps)
    else:
        first, *rest = [picture.convert("RGB") for picture in pictures]
        first.save(path, save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)


def _save_mp4(pictures: Sequence[Image.Image], path: Path, fps: float) -> None:
    av = _av()
    width, height = (edge + edge % 2 for edge in pictures[0].size)  # H.264 has half as many colors along an edge
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            frame = Image.new("RGB", (width, height), "white")
            frame.paste(picture, (0, 0))
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError('MP4 needs PyAV: pip install "ldm[video]", or write a .gif', name="av") from None
    return av
