"""What an upscaler learns from: crops of large pictures' latents, and the small pictures that they belong to, noised.

    small         the picture shrunk by the factor, as it is or after the base model's image-to-image
    level         0 ... max_noise_level, a class of the U-Net
    channels      small under noise of that level, in pixels, which follow x_t
    crop          the same square of latents and small picture: a latent stands for one of the small picture's pixels

These are the channels and the class that stock StableDiffusionUpscalePipeline gives its U-Net. The noise hides what a
base model gets wrong in detail (conditioning augmentation, Ho et al. 2022, section 4); the base's own versions show
what it gets wrong at large (`ldm.training.small_pictures`). All of it is a function of (seed, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.pipelines.upscale import low_resolution_scheduler
from ldm.training.randomness import generator
from ldm.training.small_pictures import SmallPictures
from ldm.training.upscale_config import UpscaleConfig


@dataclass(frozen=True)
class Crops:
    """Crop, small picture and noise level of sample n, for any n >= 0.

    Attributes:
        seed, key: with n, all that they depend on.
        config: the section of the config.
        small: of the rows that samples show.
    """

    seed: int
    config: UpscaleConfig
    small: SmallPictures
    key: str = "upscale"

    @property
    def edge(self) -> int:
        """Of a crop, in latents, which are as many as small pixels."""
        return self.config.crop // self.config.factor or self.small.size

    def __call__(
        self, n: int, row: int, position: tuple[float, float], flip: bool, sample: dict[str, Any]
    ) -> dict[str, Any]:
        """A sample of whole pictures => of a crop, with its noise level as `class` and the noised small as `channels`.

        Args:
            position: (x, y) of the crop, each in [0, 1).
            sample: of which `mean`, `std` [C,h,w] and `pixels` [3,H,W] are cropped.
        """
        rng = generator(self.seed, self.key, n)
        own = float(torch.rand((), generator=rng, dtype=torch.float64)) < self.config.base_share
        left, top = (int(place * (self.small.size - self.edge + 1)) for place in position)

        def crop(whole: Tensor, scale: int = 1) -> Tensor:
            y, x, edge = top * scale, left * scale, self.edge * scale
            return whole[..., y : y + edge, x : x + edge]

        small = self.small.pixels(row, int(own and self.config.base is not None and self.small.store is not None), flip)
        level, channels = noised(rng, crop(small), self.config.max_noise_level)
        scales = {"mean": 1, "std": 1, "pixels": self.config.factor}
        cropped = {name: crop(sample[name], scale).contiguous() for name, scale in scales.items() if name in sample}
        return {**sample, **cropped, "class": level, "channels": channels}

    def whole(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Noise levels [N] and noised small pictures [N,3,s,s] of rows as they are, for validation."""
        made = [
            noised(generator(self.seed, self.key, n), self.small.pixels(n, 0, False), self.config.max_noise_level)
            for n in numbers
        ]
        return torch.tensor([level for level, _ in made]), torch.stack([channels for _, channels in made])


def noised(rng: torch.Generator, small: Tensor, most: int) -> tuple[int, Tensor]:
    """A random level up to `most`, and a small picture [3,h,w] under noise of that level."""
    level = int(torch.randint(most + 1, (), generator=rng))
    noise = torch.randn(small.shape, generator=rng)
    noisy: Tensor = low_resolution_scheduler().add_noise(small[None], noise[None], torch.tensor([level]))[0]
    return level, noisy
