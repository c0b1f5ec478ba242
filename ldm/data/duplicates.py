"""Pictures that a data set holds twice, and held-out pictures that look like training pictures: a leak.

Pictures are compared as thumbnails of 16 x 16 colors, which another size, format or quality hardly changes. Perceptual
hashes (pHash, dHash) see gray shapes and confuse drawings that differ in color: flags, skin tones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ldm.data.dataset import Row
from ldm.data.images import to_square

EDGE = 16
NEAR = 2.0  # root of the mean squared difference, of 255 levels: what a JPEG of quality 90 changes
CHUNK = 256


@dataclass(frozen=True)
class Pair:
    """Two rows whose pictures are the same, or nearly (`distance` above 0, of 255 levels)."""

    first: Row
    second: Row
    distance: float

    def __str__(self) -> str:
        return f"{self.first.where} and {self.second.where}"


def thumbnails(pictures: Sequence[Row]) -> npt.NDArray[np.float32]:
    """float32 [N, 16 * 16 * 3] in [0, 255]; decoded in threads, with a progress bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        squares = threads.map(lambda row: to_square(row.image(), EDGE).reshape(-1), pictures)
        bar = tqdm(squares, "looking for duplicates", len(pictures), unit="picture", leave=False)
        return np.stack(list(bar)).astype(np.float32)


def duplicates(pictures: Sequence[Row]) -> tuple[list[Pair], list[Pair]]:
    """Pairs within one split, and pairs of a training and a held-out picture; each row with its nearest earlier one."""
    small = thumbnails(pictures)
    within: list[Pair] = []
    across: list[Pair] = []
    splits = [row.split for row in pictures]
    for numbers in np.array_split(np.arange(len(small)), -(-len(small) // CHUNK)):
        distances = _distances(small[numbers], small[: numbers[-1] + 1])
        distances[np.arange(distances.shape[1])[None] >= numbers[:, None]] = np.inf  # earlier rows alone
        for number, row in zip(numbers.tolist(), distances, strict=True):
            for found, same in ((within, True), (across, False)):
                near = [i for i in np.flatnonzero(row < NEAR).tolist() if (splits[i] == splits[number]) is same]
                if near:
                    best = min(near, key=row.__getitem__)
                    found.append(Pair(pictures[best], pictures[number], float(row[best])))
    return within, across


def groups(pictures: Sequence[Row], most: float = NEAR, captioned: Sequence[bool] = ()) -> list[list[Pair]]:
    """Each picture that has copies, paired with every one of them, whatever the splits.

    The copy to keep is one with a caption, of those the largest, of several the first. All others of a group are near
    it, not merely near each other: a chain of small changes is no group.

    Args:
        most: the largest distance of a copy, of 255 levels; 0 is another file of the same thumbnail.
        captioned: whether each picture has a caption; () leaves that out of account.
    """
    first = list(captioned) or [True] * len(pictures)
    order = sorted(range(len(pictures)), key=lambda i: (not first[i], -pictures[i].size[0] * pictures[i].size[1], i))
    small = thumbnails(pictures)[order]
    kept = np.ones(len(small), bool)
    found: dict[int, list[Pair]] = {}
    chunks = np.array_split(np.arange(len(small)), -(-len(small) // CHUNK))
    for numbers in tqdm(chunks, "comparing pictures", unit="chunk", leave=False, disable=len(chunks) < 16):
        distances = _distances(small[numbers], small[: numbers[-1] + 1])
        for number, row in zip(numbers.tolist(), distances, strict=True):
            near = np.flatnonzero((row[:number] <= most) & kept[:number])
            if len(near):
                best = int(near[row[near].argmin()])
                kept[number] = False
                pair = Pair(pictures[order[best]], pictures[order[number]], float(row[best]))
                found.setdefault(best, []).append(pair)
    return [
        sorted(pairs, key=lambda pair: pair.distance)
        for _, pairs in sorted(found.items(), key=lambda each: order[each[0]])
    ]


def _distances(some: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Root of the mean squared difference of each pair, float64 [len(some), len(others)]."""
    one, two = some.astype(np.float64), others.astype(np.float64)
    squares = (one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * one @ two.T
    roots: npt.NDArray[np.float64] = np.sqrt(np.maximum(squares, 0) / one.shape[1])
    return roots


def alike(pairs: Sequence[Pair]) -> str:
    """How alike these pairs are: `look the same`, `look nearly the same`, or how many of each."""
    same = sum(pair.distance == 0 for pair in pairs)
    if same in (0, len(pairs)):
        return "look the same" if same else "look nearly the same"
    return f"look the same ({same}) or nearly so ({len(pairs) - same})"


def named(pairs: Sequence[Pair], most: int = 3) -> str:
    """The first of these pairs, the most alike first, and how many more there are; a line each."""
    first = sorted(pairs, key=lambda pair: pair.distance)[:most]
    more = f"\nand {len(pairs) - most} more" if len(pairs) > most else ""
    return "".join(f"\n{pair}" for pair in first) + more
