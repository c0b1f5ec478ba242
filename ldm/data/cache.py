"""What never changes during training, computed once: the posterior of every picture, the context of every caption.

Encoding costs as much as a training step and gives the same answer every epoch. What does change from
epoch to epoch stays open: the latents are drawn anew from the stored posterior, mirrored pictures have a
posterior of their own, and captions are chosen and dropped when a sample is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.captioned import Row
from ldm.data.pictures import Crop, to_pixels, to_square

#: pixels [B,3,H,W] => mean and std of the posterior, each [B,C,h,w].
EncodePixels = Callable[[Tensor], tuple[Tensor, Tensor]]
#: B captions => context [B,L,D].
EncodeCaptions = Callable[[list[str]], Tensor]


def load_pixels(
    row: Row, size: int, crop: Crop = "center", position: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """A row's picture => pixels, float32 [3,size,size] in [-1,1]."""
    return torch.from_numpy(np.ascontiguousarray(to_pixels(to_square(row.image(), size, crop, position, flip))))


def choose_caption(captions: Sequence[str], u: float | None) -> str:
    """The caption that a uniform u in [0, 1) picks; None, a dropped caption, picks the null caption ""."""
    return "" if u is None else captions[int(u * len(captions))]


def encode_pictures(
    pictures: Sequence[Row],
    encode_pixels: EncodePixels,
    *,
    size: int,
    flip: bool,
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean and std of every picture's posterior, each [N,F,C,h,w]; F is 2 with mirrored pictures, else 1."""
    means, stds = [], []
    flips = (False, True) if flip else (False,)
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc="encoding pictures", unit="batch", disable=not progress):
        rows = [pictures[i] for i in range(start, min(start + batch_size, len(pictures)))]
        pixels = torch.stack([load_pixels(row, size, flip=mirrored) for row in rows for mirrored in flips])
        mean, std = encode_pixels(pixels)
        means.append(mean.unflatten(0, (len(rows), len(flips))).cpu())
        stds.append(std.unflatten(0, (len(rows), len(flips))).cpu())
    return torch.cat(means), torch.cat(stds)


@dataclass(frozen=True)
class LatentCache:
    """Posteriors and contexts, in memory.

    Attributes:
        mean, std: [N,F,C,h,w]; F is 2 if there are mirrored pictures, else 1.
        context: [M,L,D], one for each different caption; None for a model that knows no text.
        numbers: caption => its row in `context`.
    """

    mean: Tensor
    std: Tensor
    context: Tensor | None
    numbers: dict[str, int]

    @classmethod
    def build(
        cls,
        pictures: Sequence[Row],
        encode_pixels: EncodePixels,
        encode_captions: EncodeCaptions | None,
        *,
        size: int,
        flip: bool,
        batch_size: int = 32,
        progress: bool = True,
    ) -> LatentCache:
        """Encode every picture and every caption once."""
        mean, std = encode_pictures(
            pictures, encode_pixels, size=size, flip=flip, batch_size=batch_size, progress=progress
        )
        if encode_captions is None:
            return cls(mean, std, None, {})
        captions = ["", *sorted({caption for row in pictures for caption in row.captions})]
        contexts = [
            encode_captions(captions[start : start + batch_size]).cpu()
            for start in tqdm(
                range(0, len(captions), batch_size), desc="encoding captions", unit="batch", disable=not progress
            )
        ]
        numbers = {caption: number for number, caption in enumerate(captions)}
        return cls(mean, std, torch.cat(contexts), numbers)
