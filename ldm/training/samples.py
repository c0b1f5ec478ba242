"""From (seed, n) to the tensors of training sample n, and from samples to batches.

A sample is drawn (draws.py), looked up (the cache, or the picture itself) and batched. Both ways give the
same batch for the same draw; without the cache VAE and text encoder run at every step, and pictures are read by
worker processes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.cache import LatentCache, choose_caption, load_pixels
from ldm.data.captioned import CaptionedPictures
from ldm.evaluation.heldout import HeldOut
from ldm.models.text import TextEncoder
from ldm.models.vae import Posterior, encode
from ldm.training.config import Config, DataConfig
from ldm.training.draws import Draw, draw, generator
from ldm.training.latents import evenly
from ldm.training.signals import ignore_in_worker


@dataclass(frozen=True)
class Batch:
    """What one training step takes.

    Attributes:
        x0: [B,C,h,w] scaled latents.
        context: [B,L,D].
        t: int64 [B], on the CPU.
        eps: [B,C,h,w].
    """

    x0: Tensor
    context: Tensor
    t: Tensor
    eps: Tensor


class Samples(Dataset[dict[str, Any]]):
    """Sample n of a run, for any n >= 0."""

    def __init__(
        self,
        pictures: CaptionedPictures,
        data: DataConfig,
        chance: Callable[[int], Draw],
        cache: LatentCache | None = None,
    ) -> None:
        self.pictures = pictures
        self.data = data
        self.chance = chance
        self.cache = cache

    def __getitem__(self, n: int) -> dict[str, Any]:
        drawn = self.chance(n)
        row = self.pictures[drawn.row]
        caption = choose_caption(row.captions, drawn.caption)
        flip = drawn.flip and self.data.flip
        sample: dict[str, Any] = {"t": drawn.t, "eps": drawn.eps, "posterior_noise": drawn.posterior_noise}
        if self.cache is None:
            sample["pixels"] = load_pixels(row, self.data.size, self.data.crop, drawn.crop, flip)
            sample["caption"] = caption
        else:
            sample["mean"] = self.cache.mean[drawn.row, int(flip)]
            sample["std"] = self.cache.std[drawn.row, int(flip)]
            sample["context"] = self.cache.context[self.cache.numbers[caption]]
        return sample


def build_cache(pictures: CaptionedPictures, vae: Any, text: TextEncoder, data: DataConfig) -> LatentCache:
    """Encode these pictures and their captions once."""

    @torch.no_grad()
    def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = encode(vae, pixels.to(vae.device))
        return posterior.mean, posterior.std

    progress = PartialState().is_main_process
    return LatentCache.build(pictures, encode_pixels, text.encode, size=data.size, flip=data.flip, progress=progress)


def build_samples(
    config: Config, pictures: CaptionedPictures, latent_shape: tuple[int, int, int], cache: LatentCache | None
) -> Samples:
    """The samples of a run on these pictures."""
    chance = partial(
        draw,
        config.seed,
        rows=len(pictures),
        timesteps=config.diffusion.timesteps,
        latent_shape=latent_shape,
        caption_dropout=config.diffusion.caption_dropout,
    )
    return Samples(pictures, config.data, chance, cache)


def fixed_questions(config: Config, heldout: CaptionedPictures, vae: Any, text: TextEncoder) -> HeldOut | None:
    """The held-out pictures' latents and first captions with their fixed (t, eps); None if there are none to ask."""
    rows = evenly(heldout, config.loop.evaluation_pictures)
    if not len(rows):
        return None
    cache = build_cache(rows, vae, text, replace(config.data, flip=False))
    context = torch.stack([cache.context[cache.numbers[row.captions[0]]] for row in rows])
    rng = generator(config.seed, "held out")
    return HeldOut.fixed(cache.mean[:, 0].to(vae.device), context.to(vae.device), config.diffusion.timesteps, rng)


def to_batch(collated: dict[str, Any], device: torch.device, encoders: tuple[Any, TextEncoder] | None) -> Batch:
    """Collated samples => a batch on the device; VAE and text encoder are needed where there was no cache."""
    if encoders is not None:
        vae, text = encoders
        with torch.no_grad():
            posterior = encode(vae, collated["pixels"].to(device, non_blocking=True))
        context = text.encode(collated["caption"])
    else:
        posterior = Posterior(
            collated["mean"].to(device, non_blocking=True), collated["std"].to(device, non_blocking=True)
        )
        context = collated["context"].to(device, non_blocking=True)
    return Batch(
        x0=posterior.sample(collated["posterior_noise"].to(device, non_blocking=True)),
        context=context,
        t=collated["t"],
        eps=collated["eps"].to(device, non_blocking=True),
    )


def numbers_of(
    first_step: int, steps: int, batch_size: int, accumulation: int, rank: int, processes: int
) -> list[list[int]]:
    """The sample numbers of each batch of one process, in order.

    Step s covers samples s*B ... s*B + B - 1 whatever the number of processes; rank r takes every part of it
    that follows rank r - 1's.

    Raises:
        ValueError: if the global batch can't be shared evenly.
    """
    shares = accumulation * processes
    if batch_size % shares:
        raise ValueError(
            f"loop.batch_size: {batch_size} can't be shared by {processes} processes with {accumulation} accumulated "
            f"batches each; make it a multiple of {shares}"
        )
    share = batch_size // shares
    return [
        list(range(start, start + share))
        for step in range(first_step, steps)
        for micro in range(accumulation)
        for start in [step * batch_size + (micro * processes + rank) * share]
    ]


def batches(
    samples: Samples, numbers: list[list[int]], device: torch.device, encoders: tuple[Any, TextEncoder] | None
) -> Iterator[Batch]:
    """The batches with these sample numbers, one after the other; samples without a cache need (VAE, text encoder)."""
    loader: DataLoader[dict[str, Any]] = DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=0 if samples.cache is not None else samples.data.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_in_worker,
    )
    for collated in loader:
        yield to_batch(collated, device, encoders)
