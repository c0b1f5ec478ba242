"""The latent cache of a run: built by rank 0 while the others wait, then opened by all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.cache.latents import Builder, LatentCache, context_kind, posterior_kind
from ldm.data.dataset import Row
from ldm.models.vae import encode
from ldm.training.config import Config
from ldm.training.distributed import while_others_wait
from ldm.training.encoders import Encoders


def build_cache(
    config: Config,
    folder: Path,
    pictures: Sequence[Row],
    encoders: Encoders,
    latent_shape: tuple[int, int, int],
    name: str = "rows",
) -> LatentCache:
    """Encode what `folder` lacks of these pictures and captions, and open it. Every rank must call it.

    Args:
        name: of the table that says where in the stores each picture is; one for each sequence of pictures.
    Raises:
        NoSpaceError: if it doesn't fit on the disk.
        BadDataError: if a picture can't be read.
    """
    text, told = encoders.text_outline, encoders.fingerprints
    data, table = config.data, Path(config.run) / "cache" / f"{name}.npy"
    posteriors = posterior_kind(told["vae"], latent_shape, data.size, data.background)
    contexts = None
    if text is not None:
        contexts = context_kind(told["text"], (text.tokenizer.model_max_length, text.dim))

    @torch.no_grad()
    def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encode(encoders.vae, pixels.to(encoders.vae.device))
        return posterior.mean, posterior.std

    def encode_captions(captions: list[str]) -> Tensor:
        assert encoders.text is not None
        return encoders.text.encode(captions)

    def build(tick: Callable[[], None]) -> None:
        builder = Builder(folder, tick=tick)
        captions = (contexts, encode_captions) if contexts is not None else None
        builder.build(pictures, table, (posteriors, encode_pixels), captions, size=data.size, flip=data.flip)

    while_others_wait(build)
    return LatentCache.open(folder, table, posteriors, contexts)
