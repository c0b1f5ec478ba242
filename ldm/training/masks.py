"""What an inpainting model learns to fill in: masks, a function of (seed, n), and what they leave of a picture.

    mask          [1,H,W], True where the picture is to be new: all of it, a side, boxes, or strokes of a brush
    masked        pixels * (not mask): the masked part is gray
    channels      the mask at the latents' size and the latents of the masked picture, which follow x_t

These are the channels, in the order, that stock StableDiffusionInpaintPipeline gives its U-Net (Rombach et al. 2022,
section 4.5). The latents of a masked picture are not those of the picture: a VAE sees across the mask's edge. So they
are encoded at each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.data.images import Size
from ldm.models.vae import Posterior
from ldm.training.randomness import generator

WHOLE, SIDE, BOXES = 0.1, 0.2, 0.35  # shares of the masks; the rest are strokes
MOST = 3  # boxes, strokes


@dataclass(frozen=True)
class Masking:
    """Mask and posterior noise of sample n, for any n >= 0.

    Attributes:
        seed, key: with n, all that they depend on.
        size: of the pictures: the edge of squares, or width and height.
        latent_shape: (C, h, w).
    """

    seed: int
    size: int | Size
    latent_shape: tuple[int, int, int]
    key: str = "mask"

    def __call__(self, n: int, pixels: Tensor) -> dict[str, Tensor]:
        """The mask bool [1,H,W], the masked picture [3,H,W], and noise [C,h,w] for the posterior of that."""
        rng = generator(self.seed, self.key, n)
        mask = draw_mask(rng, self.size)
        return {
            "mask": mask,
            "masked_pixels": masked(pixels, mask),
            "mask_noise": torch.randn(self.latent_shape, generator=rng),
        }


def draw_mask(rng: torch.Generator, size: int | Size) -> Tensor:
    """A random mask, bool [1,H,W]. Boxes and strokes are wider than a latent of a VAE that halves three times."""
    width, height = (size, size) if isinstance(size, int) else size

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))

    def places(count: int) -> list[tuple[float, float]]:
        return [(between(0, width), between(0, height)) for _ in range(count)]

    kind, count = between(0, 1), 1 + int(between(0, MOST))
    picture = Image.new("L", (width, height), 255 if kind < WHOLE else 0)
    pen = ImageDraw.Draw(picture)
    if WHOLE <= kind < WHOLE + SIDE:
        share, side = between(0.25, 0.75), int(between(0, 4))
        across, down, right, foot = round(share * width), round(share * height), width - 1, height - 1
        pen.rectangle(
            [(0, 0, across, foot), (0, 0, right, down), (across, 0, right, foot), (0, down, right, foot)][side], 255
        )
    elif WHOLE + SIDE <= kind < WHOLE + SIDE + BOXES:
        for x, y in places(count):
            wide, high = (between(edge / 8, edge / 2) for edge in (width, height))
            left, top = min(x, width - wide), min(y, height - high)
            pen.rectangle((round(left), round(top), math.ceil(left + wide), math.ceil(top + high)), 255)
    elif kind >= WHOLE:
        for _ in range(count):
            stroke(pen, places(2 + int(between(0, 4))), between(min(width, height) / 8, min(width, height) / 4))
    return torch.from_numpy(np.array(picture) > 0)[None]


def stroke(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], width: float) -> None:
    """A line through these points, with round joints and ends."""
    pen.line(list(points), 255, round(width))
    for x, y in points:
        pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)


def masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels [...,3,H,W] in [-1,1] that are gray where the mask [...,1,H,W] is True."""
    return pixels * (~mask).to(pixels)


def mask_channels(mask: Tensor, posterior: Posterior, noise: Tensor) -> Tensor:
    """What follows x_t: masks bool [B,1,H,W] and the posterior of the masked pictures => [B,1+C,h,w]."""
    latents = posterior.sample(noise)
    small = interpolate(mask.to(latents), size=latents.shape[-2:])  # nearest, as stock
    return torch.cat([small, latents], dim=1)
