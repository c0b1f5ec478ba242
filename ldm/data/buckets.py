"""Aspect buckets: pictures of any aspect ratio, in few sizes of about the same area.

    size 64, step 16, ratio 2:    48 x 96    48 x 80    64 x 64    80 x 48    96 x 48

A batch has one size, so that each picture goes to the bucket whose aspect ratio is nearest to its own, is resized to
cover it, and loses the least at its edges. Squares alone are one bucket. A picture's size is known since it was
checked: nothing is decoded to choose its bucket. (NovelAI's aspect ratio bucketing, 2022; Podell et al. 2023, section
2.3, SDXL.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ldm.data.images import Size


def bucket_sizes(size: int, step: int, ratio: float) -> tuple[Size, ...]:
    """The sizes (width, height) of buckets, from the tallest to the widest, the square among them.

    Args:
        size: edge of the square; the others have about its area: one side is the nearest to it that `step` divides.
        step: divides all sides, and `size`.
        ratio: of the longer side to the shorter one, at most.
    """
    if size % step:
        raise ValueError(f"size: expected a multiple of {step}, got {size}")
    sides = range(step, round(size * ratio) + 1, step)
    pairs = {(side, round(size * size / side / step) * step) for side in sides}
    pairs |= {(height, width) for width, height in pairs}
    return tuple(sorted((pair for pair in pairs if max(pair) <= ratio * min(pair)), key=lambda pair: pair[0] / pair[1]))


def in_bucket(latent_shape: tuple[int, int, int], edge: int, size: Size) -> tuple[int, int, int]:
    """(C, h, w) of the latents of pictures of this size, where those of squares of `edge` pixels are `latent_shape`."""
    channels, h, w = latent_shape
    return channels, size[1] * h // edge, size[0] * w // edge


@dataclass(frozen=True)
class Buckets:
    """The sizes that some pictures are brought to.

    Attributes:
        sizes: (width, height) of each bucket that has pictures.
        of: int64 [N], the bucket of each picture.
    """

    sizes: tuple[Size, ...]
    of: npt.NDArray[np.int64]

    @classmethod
    def square(cls, size: int, pictures: int) -> Buckets:
        """One bucket, of squares, for so many pictures."""
        return cls(((size, size),), np.zeros(pictures, np.int64))

    @classmethod
    def nearest(cls, pictures: npt.NDArray[np.integer], sizes: Sequence[Size]) -> Buckets:
        """For each of the sizes of pictures, int [N,2], that of `sizes` whose aspect ratio is nearest to its own.

        Aspect ratios are compared by their logarithms, so that 2:1 is as far from a square as 1:2 is.
        """
        width, height = np.maximum(pictures, 1).astype(np.float64).T
        ratios = np.array([math.log(wide / high) for wide, high in sizes])
        chosen = np.abs(np.log(width / height)[:, None] - ratios).argmin(1)
        used = np.unique(chosen)
        return cls(tuple(sizes[i] for i in used), np.searchsorted(used, chosen).astype(np.int64))

    def __len__(self) -> int:
        return len(self.of)

    def size(self, number: int) -> Size:
        """The size (width, height) that a picture is brought to."""
        return self.sizes[self.of[number]]

    def groups(self) -> list[tuple[Size, npt.NDArray[np.int64]]]:
        """Each size with the numbers of its pictures, int64, ascending."""
        return [(size, np.flatnonzero(self.of == i)) for i, size in enumerate(self.sizes)]

    def twice(self) -> Buckets:
        """Those of the same pictures followed by as many others, which lie beside them."""
        return Buckets(self.sizes, np.concatenate([self.of, self.of]))

    def __str__(self) -> str:
        groups = ", ".join(f"{width} x {height}: {len(group):,}" for (width, height), group in self.groups())
        return f"buckets: {groups}"
