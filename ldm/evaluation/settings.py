"""How the pictures that are judged are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.inference.defaults import EVERYWHERE


@dataclass(frozen=True)
class Settings:
    """U-Net evaluations, guidance, and the seed of the first picture; picture i has seed + i."""

    steps: int
    guidance_scale: float
    seed: int = 0
    guidance_interval: tuple[float, float] = EVERYWHERE
