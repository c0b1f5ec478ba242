"""Some pictures of many, and their pixels in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.cache.latents import load_pixels
from ldm.data.dataset import Row

BATCH = 32


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


def pixel_batches(rows: Sequence[Row], size: int, doing: str) -> Iterator[Tensor]:
    """The pictures, center crops, as pixels [<=32,3,size,size]; the first of several processes shows a bar."""
    silent = os.environ.get("RANK", "0") != "0"
    for start in tqdm(range(0, len(rows), BATCH), desc=doing, unit="batch", leave=False, disable=silent):
        chosen = [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
        yield torch.stack([load_pixels(row, size) for row in chosen])
