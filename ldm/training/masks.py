"""What an inpainting model learns to fill in: masks, a function of (seed, n), and what they leave of a picture.

    mask          [1,S,S], True where the picture is to be new: all of it, a side, boxes, or strokes of a brush
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

from ldm.models.vae import Posterior
from ldm.training.randomness import generator

WHOLE, SIDE, BOXES = 0.1, 0.2, 0.35  # shares of the masks; the rest are strokes
MOST = 3  # boxes, strokes


@dataclass(frozen=True)
class Masking:
    """Mask and posterior noise of sample n, for any n >= 0.

    Attributes:
        seed, key: with n, all that they depend on.
        size: edge of the pictures.
        latent_shape: (C, h, w).
    """

    seed: int
    size: int
    latent_shape: tuple[int, int, int]
    key: str = "mask"

    def __call__(self, n: int, pixels: Tensor) -> dict[str, Tensor]:
        """The mask bool [1,S,S], the masked picture [3,S,S], and noise [C,h,w] for the posterior of that."""
        rng = generator(self.seed, self.key, n)
        mask = draw_mask(rng, self.size)
        return {
            "mask": mask,
            "masked_pixels": masked(pixels, mask),
            "mask_noise": torch.randn(self.latent_shape, generator=rng),
        }


def draw_mask(rng: torch.Generator, size: int) -> Tensor:
    """A random mask, bool [1,size,size]. Boxes and strokes are wider than a latent of a VAE that halves three times."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))

    def places(count: int) -> list[tuple[float, float]]:
        return [(between(0, size), between(0, size)) for _ in range(count)]

    kind, count = between(0, 1), 1 + int(between(0, MOST))
    picture = Image.new("L", (size, size), 255 if kind < WHOLE else 0)
    pen = ImageDraw.Draw(picture)
    if WHOLE <= kind < WHOLE + SIDE:
        edge, side = round(between(0.25, 0.75) * size), int(between(0, 4))
        last = size - 1
        pen.rectangle([(0, 0, edge, last), (0, 0, last, edge), (edge, 0, last, last), (0, edge, last, last)][side], 255)
    elif WHOLE + SIDE <= kind < WHOLE + SIDE + BOXES:
        for x, y in places(count):
            wide, high = (between(size / 8, size / 2) for _ in range(2))
            left, top = min(x, size - wide), min(y, size - high)
            pen.rectangle((round(left), round(top), math.ceil(left + wide), math.ceil(top + high)), 255)
    elif kind >= WHOLE:
        for _ in range(count):
            stroke(pen, places(2 + int(between(0, 4))), between(size / 8, size / 4))
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
