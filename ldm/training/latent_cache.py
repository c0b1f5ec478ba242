"""The latent cache of a run: built by rank 0 while the others wait, then opened by all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.cache.latents import Builder, LatentCache, context_kind, posterior_kind
from ldm.data.cache.store import Kind
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import Row
from ldm.data.facts import KIND as FACTS
from ldm.models.vae import encode
from ldm.training.config import Config
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.encoders import Encoders
from ldm.training.samples import validation_pictures


def build_cache(
    config: Config,
    folder: Path,
    pictures: Sequence[Row],
    encoders: Encoders,
    latent_shape: tuple[int, int, int],
    name: str = "rows",
    flip: bool | None = None,
) -> LatentCache:
    """Encode what `folder` lacks of these pictures and captions, and open it. Every rank must call it.

    Args:
        name: of the table with the key of each picture in the stores; one for each sequence of pictures.
        flip: encode mirrored pictures, too; as the config says, where it is None.
    Raises:
        NoSpaceError: if it doesn't fit on the disk.
        BadDataError: if a picture can't be read.
    """
    data, table = config.data, Path(config.run) / "cache" / f"{name}.npy"
    posteriors, contexts = kinds(config, encoders, latent_shape)

    @torch.no_grad()
    def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encode(encoders.vae, pixels.to(encoders.vae.device))
        return posterior.mean, posterior.std

    def encode_captions(captions: list[str]) -> Tensor:
        assert encoders.text is not None
        return encoders.text.encode(captions)

    flipped = data.flip if flip is None else flip

    def build(tick: Tick) -> None:
        builder = Builder(folder, tick=tick)
        captions = (contexts, encode_captions) if contexts is not None else None
        builder.build(pictures, table, (posteriors, encode_pixels), captions, size=data.size, flip=flipped)

    on_rank_0(build)
    return LatentCache.open(folder, table, posteriors, contexts)


def kinds(config: Config, encoders: Encoders, latent_shape: tuple[int, int, int]) -> tuple[Kind, Kind | None]:
    """The stores of posteriors and, with a text encoder, of contexts."""
    text, prints, data = encoders.text_outline, encoders.fingerprints, config.data
    posteriors = posterior_kind(prints["vae"], latent_shape, data.size, data.background)
    if text is None:
        return posteriors, None
    return posteriors, context_kind(prints["text"], (text.tokenizer.model_max_length, text.dim))


def cache_bytes(
    config: Config, source: ConditionedPictures, encoders: Encoders, latent_shape: tuple[int, int, int]
) -> int:
    """Bytes that the cache of a run's pictures and captions takes; 0 without one.

    Args:
        source: training and held-out pictures.
    """
    if config.data.cache == "off":
        return 0
    posteriors, contexts = kinds(config, encoders, latent_shape)
    train, heldout = source.train, validation_pictures(config, source.heldout)
    encoded = len(train.all_pictures) * (2 if config.data.flip else 1) + len(heldout.all_pictures)
    size = posteriors.disk_bytes(encoded) + FACTS.disk_bytes(len(source.all_pictures))
    if contexts is not None:
        captions = {caption for part in (train, heldout) for row in part.pictures for caption in row.captions}
        size += contexts.disk_bytes(1 + len(captions))
    return size
