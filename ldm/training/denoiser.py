"""The U-Net that a recipe, its pictures and its frozen networks ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ldm.data.conditioned import ConditionedPictures
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import build_unet
from ldm.training.config import Config


def denoiser(
    config: Config, source: ConditionedPictures, text: TextEncoder | None, latent_shape: tuple[int, int, int]
) -> Callable[..., Any]:
    """What makes it, with random weights; asked for `learned_variance`, with as many more channels.

    Raises:
        ValueError: if it should learn at half the size first, and such latents can't be halved once per level.
    """
    levels, size = len(config.unet.channels), latent_shape[1]
    if config.loop.half_size_steps and size % 2**levels:
        raise ValueError(
            f"loop.half_size_steps: {levels} levels need latents divisible by {2**levels} to learn at half the size, "
            f"but they are {size} x {size}; set it to 0"
        )
    return partial(
        build_unet,
        config.unet,
        latent_shape=latent_shape,
        context_dim=text.dim if text else None,
        classes=len(source.labels.names) + 1 if source.labels else 0,
        condition_channels=latent_shape[0] if source.condition_column else 0,
    )
