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
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.cache import LatentCache, choose_caption, load_pixels
from ldm.data.conditioned import ConditionedPictures
from ldm.evaluation.heldout import HeldOut
from ldm.models.conditioning import Conditioning
from ldm.models.text import TextEncoder
from ldm.models.vae import Posterior, encode
from ldm.training.config import Config, DataConfig
from ldm.training.draws import Draw, draw, generator
from ldm.training.latents import evenly


@dataclass(frozen=True)
class Encoders:
    """The frozen networks; a model that knows no text has no text encoder."""

    vae: Any
    text: TextEncoder | None


@dataclass(frozen=True)
class Batch:
    """What one training step takes.

    Attributes:
        x0: [B,C,h,w] scaled latents.
        conditioning: of the B pictures.
        u: float64 [B] in [0, 1), on the CPU; the timesteps follow from it.
        eps: [B,C,h,w].
    """

    x0: Tensor
    conditioning: Conditioning
    u: Tensor
    eps: Tensor


class Samples(Dataset[dict[str, Any]]):
    """Sample n of a run, for any n >= 0."""

    def __init__(
        self, source: ConditionedPictures, data: DataConfig, chance: Callable[[int], Draw], cache: Cache | None = None
    ) -> None:
        self.source = source
        self.data = data
        self.chance = chance
        self.cache = cache

    def __getitem__(self, n: int) -> dict[str, Any]:
        drawn = self.chance(n)
        row = self.source.pictures[drawn.row]
        caption = choose_caption(row.captions, drawn.caption) if row.captions else ""
        flip = drawn.flip and self.data.flip
        sample: dict[str, Any] = {"u": drawn.u, "eps": drawn.eps, "posterior_noise": drawn.posterior_noise}
        if self.source.labels:
            sample["class"] = self.source.null_class if drawn.caption is None else self.source.class_ids[drawn.row]
        if self.cache is not None:
            return sample | self.cache.look_up(drawn.row, flip, caption)
        load = partial(load_pixels, size=self.data.size, crop=self.data.crop, position=drawn.crop, flip=flip)
        sample |= {"pixels": load(row), "caption": caption}
        if self.source.condition_column:
            sample["condition_pixels"] = load(self.source.condition(drawn.row))
        return sample


@dataclass(frozen=True)
class Cache:
    """What the encoders said of the pictures, and of the second pictures if there are any."""

    pictures: LatentCache
    conditions: LatentCache | None

    @classmethod
    def build(cls, source: ConditionedPictures, encoders: Encoders, data: DataConfig) -> Cache:
        """Encode these pictures, their captions and their second pictures once."""

        @torch.no_grad()
        def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
            posterior = encode(encoders.vae, pixels.to(encoders.vae.device))
            return posterior.mean, posterior.std

        build = partial(
            LatentCache.build,
            encode_pixels=encode_pixels,
            size=data.size,
            flip=data.flip,
            progress=PartialState().is_main_process,
        )
        encode_captions = encoders.text.encode if encoders.text else None
        conditions = None
        if source.condition_column:
            conditions = build([source.condition(i) for i in range(len(source))], encode_captions=None)
        return cls(build(source.pictures, encode_captions=encode_captions), conditions)

    def look_up(self, row: int, flip: bool, caption: str) -> dict[str, Tensor]:
        """The posterior of a picture, the context of a caption, and the latents of a second picture."""
        found = {"mean": self.pictures.mean[row, int(flip)], "std": self.pictures.std[row, int(flip)]}
        if self.pictures.context is not None:
            found["context"] = self.pictures.context[self.pictures.numbers[caption]]
        if self.conditions is not None:
            found["channels"] = self.conditions.mean[row, int(flip)]
        return found


def build_samples(
    config: Config, source: ConditionedPictures, latent_shape: tuple[int, int, int], cache: Cache | None
) -> Samples:
    """The samples of a run on these pictures."""
    chance = partial(
        draw,
        config.seed,
        rows=len(source),
        latent_shape=latent_shape,
        caption_dropout=config.diffusion.caption_dropout,
    )
    return Samples(source, config.data, chance, cache)


def fixed_questions(config: Config, heldout: ConditionedPictures, encoders: Encoders) -> HeldOut | None:
    """The held-out pictures' latents and first captions with their fixed (t, eps); None if there are none to ask."""
    source = evenly(heldout, config.loop.evaluation_pictures)
    if not len(source):
        return None
    cache = Cache.build(source, encoders, replace(config.data, flip=False))
    captions = [row.captions[0] if row.captions else "" for row in source.pictures]
    found = default_collate([cache.look_up(i, False, caption) for i, caption in enumerate(captions)])
    device = encoders.vae.device
    conditioning = Conditioning(
        context=found.get("context"),
        class_labels=torch.from_numpy(source.class_ids) if source.labels else None,
        channels=found.get("channels"),
    )
    rng = generator(config.seed, "held out")
    return HeldOut.fixed(found["mean"].to(device), conditioning.to(device), config.diffusion.timesteps, rng)


def to_batch(collated: dict[str, Any], device: torch.device, encoders: Encoders | None) -> Batch:
    """Collated samples => a batch on the device; VAE and text encoder are needed where there was no cache."""
    here: dict[str, Any] = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "u" else value
        for name, value in collated.items()
    }
    if encoders is not None:
        with torch.no_grad():
            posterior = encode(encoders.vae, here["pixels"])
        if encoders.text:
            here["context"] = encoders.text.encode(here["caption"])
        if "condition_pixels" in here:
            with torch.no_grad():
                here["channels"] = encode(encoders.vae, here["condition_pixels"]).mean
    else:
        posterior = Posterior(here["mean"], here["std"])
    return Batch(
        x0=posterior.sample(here["posterior_noise"]),
        conditioning=Conditioning(here.get("context"), here.get("class"), here.get("channels")),
        u=here["u"],
        eps=here["eps"],
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
    samples: Samples, numbers: list[list[int]], device: torch.device, encoders: Encoders | None
) -> Iterator[Batch]:
    """The batches with these sample numbers, one after the other; samples without a cache need the encoders."""
    loader: DataLoader[dict[str, Any]] = DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=0 if samples.cache is not None else samples.data.workers,
        pin_memory=device.type == "cuda",
    )
    for collated in loader:
        yield to_batch(collated, device, encoders)
