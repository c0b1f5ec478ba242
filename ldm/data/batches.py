"""Rows => what networks take: pixels of one picture or of a batch, one of several captions; and some rows of many."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.dataset import Row
from ldm.data.facts import hash_content
from ldm.data.images import Crop, Size, to_pixels, to_size
from ldm.data.rows import BadDataError

BATCH = 32
PIXELS = 1  # version of the path from a file to pixels: raise it when that changes what a picture looks like


def load_pixels(
    row: Row,
    size: int | Size,
    crop: Crop = "center",
    position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    content: bytes | None = None,
) -> Tensor:
    """A row's picture => pixels, float32 [3,H,W] in [-1,1].

    Args:
        size: edge of a square, or width and height.
    Raises:
        BadDataError: naming the row, if the picture can't be read, or its hash isn't `content`.
    """
    data = row.read()
    if content is not None and hash_content(data) != content:
        raise BadDataError(f"picture changed while it was being encoded; run the same command again: {row.where}")
    size = (size, size) if isinstance(size, int) else size
    return torch.from_numpy(to_pixels(to_size(row.image(data), size, crop, position, flip)))


def choose_caption(captions: Sequence[str], u: float | None) -> str:
    """The caption that a uniform u in [0, 1) picks; None, a dropped caption, picks the null caption ""."""
    return "" if u is None else captions[int(u * len(captions))]


class Selectable(Protocol):
    """Pictures of which some can be taken."""

    def __len__(self) -> int: ...
    def select(self, indices: Iterable[int]) -> Self: ...


Pictures = TypeVar("Pictures", bound=Selectable)


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, spread evenly."""
    chosen = min(most, count)
    return [i * count // chosen for i in range(chosen)]


def evenly(pictures: Pictures, most: int) -> Pictures:
    """At most so many of the pictures, spread evenly over all of them."""
    return pictures.select(spread(len(pictures), most))


def pixel_batches(rows: Sequence[Row], size: int | Size, doing: str) -> Iterator[Tensor]:
    """The pictures, center crops, as pixels [<=32,3,H,W]; the first of several processes shows a bar."""
    silent = os.environ.get("RANK", "0") != "0"
    for start in tqdm(range(0, len(rows), BATCH), desc=doing, unit="batch", leave=False, disable=silent):
        chosen = [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
        yield torch.stack([load_pixels(row, size) for row in chosen])
