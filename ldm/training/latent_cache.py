"""The latent cache of a run: built by rank 0 while the others wait, then opened by all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.batches import BATCH, evenly, pixel_batches
from ldm.data.buckets import Buckets, in_bucket
from ldm.data.cache.latents import Builder, LatentCache, context_kind, posterior_kind
from ldm.data.cache.store import Kind
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import Row
from ldm.data.facts import KIND as FACTS
from ldm.models.vae import encode
from ldm.training.config import Config
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.encoders import Encoders
from ldm.training.sizes import buckets_of


def build_cache(
    config: Config,
    pictures: Sequence[Row],
    encoders: Encoders,
    latent_shape: tuple[int, int, int],
    name: str = "rows",
    *,
    buckets: Buckets | None = None,
    flip: bool | None = None,
) -> LatentCache:
    """Encode what the cache lacks of these pictures and captions, and open it. Every rank must call it.

    Args:
        latent_shape: of squares of data.size.
        buckets: of the pictures; None for squares.
        name: of the table with the keys of these pictures in the stores; one for each sequence of pictures.
        flip: encode mirror images, too; by default as data.flip.
    Raises:
        NoSpaceError: if it doesn't fit on the disk.
        BadDataError: if a picture can't be read.
    """
    data, folder, table = config.data, config.cache_folder(), Path(config.run) / "cache" / f"{name}.npy"
    assert folder is not None, "data.cache is off"
    mirrored = data.flip if flip is None else flip
    buckets = buckets or Buckets.square(data.size, len(pictures))
    posteriors, contexts = kinds(config, encoders, latent_shape, buckets)

    @torch.no_grad()
    def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encode(encoders.vae, pixels.to(encoders.vae.device))
        return posterior.mean, posterior.std

    def encode_captions(captions: list[str]) -> Tensor:
        assert encoders.text is not None
        return encoders.text.encode(captions)

    def build(tick: Tick) -> None:
        builder = Builder(folder, tick=tick)
        captions = (contexts, encode_captions) if contexts is not None else None
        builder.build(pictures, table, (posteriors, encode_pixels), captions, buckets=buckets, flip=mirrored)

    on_rank_0(build)
    return LatentCache.open(folder, table, posteriors, contexts, buckets)


@torch.no_grad()
def encode_once(
    config: Config,
    pictures: Sequence[Row],
    buckets: Buckets,
    captions: Sequence[str],
    encoders: Encoders,
    latent_shape: tuple[int, int, int],
    name: str,
) -> tuple[list[Tensor], Tensor | None]:
    """The mean of each picture's posterior [C,h,w], and contexts [M,L,D] of captions, which are theirs or "".

    Both come from the cache, which is filled for it, if there is one. Without a text encoder there are no contexts.
    Every rank must call it.
    """
    if config.cache_folder() is not None:
        cache = build_cache(config, pictures, encoders, latent_shape, name, buckets=buckets, flip=False)
        with cache.reading():
            means = [cache.posterior(number, False)[0] for number in range(len(pictures))]
            context = torch.stack([cache.context(caption) for caption in captions]) if cache.contexts else None
        return means, context
    vae = encoders.vae
    encoded: dict[int, Tensor] = {}
    for size, group in buckets.groups():
        numbers = iter(group.tolist())
        for pixels in pixel_batches([pictures[number] for number in group.tolist()], size, "encoding"):
            encoded |= {next(numbers): mean for mean in encode(vae, pixels).mean}
    means = [encoded[number] for number in range(len(pictures))]
    text = encoders.text
    if text is None:
        return means, None
    return means, torch.cat([text.encode(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)])


def kinds(
    config: Config, encoders: Encoders, latent_shape: tuple[int, int, int], buckets: Buckets
) -> tuple[list[Kind], Kind | None]:
    """The stores of posteriors, one for each bucket, and, with a text encoder, of contexts."""
    text, prints, data = encoders.text_outline, encoders.fingerprints, config.data
    posteriors = [
        posterior_kind(prints["vae"], in_bucket(latent_shape, data.size, size), size, data.background)
        for size in buckets.sizes
    ]
    if text is None:
        return posteriors, None
    return posteriors, context_kind(prints["text"], (text.tokenizer.model_max_length, text.dim))


def validation_pictures(config: Config, heldout: ConditionedPictures) -> ConditionedPictures:
    """The held-out pictures whose loss is measured."""
    return evenly(heldout, config.loop.evaluation_pictures)


def buckets_of_all(config: Config, source: ConditionedPictures) -> Buckets:
    """The buckets of `source.all_pictures`: a second picture has its row's."""
    buckets = buckets_of(config, source.pictures)
    return buckets.twice() if source.condition_column else buckets


def cache_bytes(
    config: Config, source: ConditionedPictures, encoders: Encoders, latent_shape: tuple[int, int, int]
) -> int:
    """Bytes that the cache of a run's pictures and captions takes; 0 without one.

    Args:
        source: training and held-out pictures.
    """
    if config.data.cache == "off":
        return 0
    train, heldout = source.train, validation_pictures(config, source.heldout)
    size, records = FACTS.disk_bytes(len(source.all_pictures)), Counter[str]()
    stores: dict[str, Kind] = {}
    for part, copies in ((train, 2 if config.data.flip else 1), (heldout, 1)):
        buckets = buckets_of_all(config, part)
        posteriors, contexts = kinds(config, encoders, latent_shape, buckets)
        for kind, (_, group) in zip(posteriors, buckets.groups(), strict=True):
            stores[kind.file] = kind
            records[kind.file] += copies * len(group)
    size += sum(kind.disk_bytes(records[file]) for file, kind in stores.items())
    if contexts is not None:
        captions = {caption for part in (train, heldout) for row in part.pictures for caption in row.captions}
        size += contexts.disk_bytes(1 + len(captions))
    return size
