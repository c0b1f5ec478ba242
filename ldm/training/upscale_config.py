"""The section of the config that makes an upscaler of the diffusion model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ldm.system.checks import check

FACTORS = (0, 2, 4, 8)


@dataclass(frozen=True)
class UpscaleConfig:
    """An upscaler: a model that makes pictures of `data.size` pixels of ones that are `factor` times smaller.

    Attributes:
        factor: how many times larger, along an edge; the VAE must shrink by as much. 0 is no upscaler.
        crop: edge in pixels of the squares of large pictures that it learns from; 0 is whole ones. It generates
            pictures of any size.
        max_noise_level: the highest level of the noise that small pictures are put under, of 1000.
        base: the pipeline whose pictures it is to upscale, as a folder or a Hub id: some of the small pictures are then
            what this model makes of them. null is none.
        base_share: share of the samples that show those.
        base_strength: how much of a picture the base may noise away and make anew; how much of that is random.
    """

    factor: int = 0
    crop: int = 128
    max_noise_level: int = 350
    base: str | None = None
    base_share: float = 0.5
    base_strength: float = 0.3

    def __post_init__(self) -> None:
        if self.base is not None:
            object.__setattr__(self, "base", os.path.expanduser(self.base))
        if self.factor not in FACTORS:
            raise ValueError(f"upscale.factor: expected one of {', '.join(map(str, FACTORS))}, got {self.factor}")
        check("upscale.crop", self.crop, at_least=0)
        check("upscale.max_noise_level", self.max_noise_level, at_least=1, below=1000)
        check("upscale.base_share", self.base_share, at_least=0, at_most=1)
        check("upscale.base_strength", self.base_strength, at_least=0, at_most=1)
        if self.base is not None and not self.factor:
            raise ValueError("upscale.base: only an upscaler has one; set upscale.factor=4, or leave it out")

    def check_beside(self, config: Any) -> None:
        """Raise a ValueError if another section of a config is not an upscaler's."""
        if not self.factor:
            return
        data, size = config.data, config.data.size
        refused = {
            "init": (config.init, "an upscaler begins with random weights; its base is named by vae and upscale.base"),
            "lora.rank": (config.lora.rank, "adapters stand beside a model that generates; set it to 0"),
            "data.inpaint": (data.inpaint, "what follows x_t is the small picture; set it to false"),
            "data.condition_column": (data.condition_column, "what follows x_t is the small picture; leave it out"),
            "data.buckets": (data.buckets, "an upscaler learns from square crops; set it to false"),
            "data.number_columns": (data.number_columns, "an upscaler's class is its noise level; leave it out"),
            "diffusion.few_steps": (config.diffusion.few_steps, "an upscaler learns every timestep; set it to 0"),
            "optim.ema_widths": (config.optim.ema_widths, "an upscaler has one average, of ema_decay; set it to []"),
            "data.label_column": (data.label_column, "an upscaler's class is its noise level; leave it out"),
            "data.cache": (data.cache == "off", "an upscaler learns from crops of latents that are kept; leave it out"),
            "loop.half_size_steps": (config.loop.half_size_steps, "an upscaler learns from crops anyway; set it to 0"),
        }  # fmt: skip
        for key, (given, why) in refused.items():
            if given:
                raise ValueError(f"{key}: {why} (upscale.factor={self.factor})")
        levels = 2 ** (len(config.unet.channels) - 1) * self.factor
        if self.crop % levels or self.crop > size:
            raise ValueError(
                f"upscale.crop: expected a multiple of {levels}, as the U-Net's levels need, up to data.size={size}, "
                f"got {self.crop}"
            )
