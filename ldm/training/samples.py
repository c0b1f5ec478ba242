"""From (seed, n) to the tensors of training sample n, and from samples to batches.

A sample is drawn (draws.py), looked up (the cache, or the picture itself) and batched. Both ways give the
same batch for the same draw; without the cache VAE and text encoder run at every step, and pictures are read by
worker processes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from ldm.data.batches import BATCH, choose_caption, evenly, load_pixels, pixel_batches
from ldm.data.cache.latents import LatentCache
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import Row
from ldm.evaluation.validation import CaptionedValidationSet, ValidationSet
from ldm.models.conditioning import Conditioning
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import Posterior, encode
from ldm.training.config import Config, DataConfig
from ldm.training.encoders import Encoders
from ldm.training.randomness import Draw, draw, generator
from ldm.training.signals import ignore_in_worker


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

    def halved(self) -> Batch:
        """The batch at half the resolution, latents [B,C,h/2,w/2]: each the mean of the four in its place.

        So is the noise, times two: the mean of four values of variance 1 has a variance of 1/4.
        """
        channels = self.conditioning.channels
        conditioning = replace(self.conditioning, channels=None if channels is None else avg_pool2d(channels, 2))
        return replace(self, x0=avg_pool2d(self.x0, 2), conditioning=conditioning, eps=2 * avg_pool2d(self.eps, 2))


class Samples(Dataset[dict[str, Any]]):
    """Sample n of a run, for any n >= 0."""

    def __init__(
        self,
        source: ConditionedPictures,
        data: DataConfig,
        chance: Callable[[int], Draw],
        cache: LatentCache | None = None,
    ) -> None:
        self.source = source
        self.data = data
        self.chance = chance
        self.cache = cache

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, as DataLoader reads them."""
        with self.cache.reading() if self.cache else nullcontext():
            return [self[n] for n in numbers]

    def __getitem__(self, n: int) -> dict[str, Any]:
        drawn = self.chance(n)
        row = self.source.pictures[drawn.row]
        caption = choose_caption(row.captions, drawn.caption) if row.captions else ""
        flip = drawn.flip and self.data.flip
        sample: dict[str, Any] = {"u": drawn.u, "eps": drawn.eps, "posterior_noise": drawn.posterior_noise}
        if self.source.labels:
            sample["class"] = self.source.null_class if drawn.caption is None else self.source.class_ids[drawn.row]
        if self.cache is None:
            load = partial(load_pixels, size=self.data.size, crop=self.data.crop, position=drawn.crop, flip=flip)
            sample |= {"pixels": load(row), "caption": caption}
            if self.source.condition_column:
                sample["condition_pixels"] = load(self.source.condition(drawn.row))
            return sample
        sample["mean"], sample["std"] = self.cache.posterior(drawn.row, flip)
        if self.cache.contexts is not None:
            sample["context"] = self.cache.context(caption)
        if self.source.condition_column:
            sample["channels"], _ = self.cache.posterior(self.source.condition_number(drawn.row), flip)
        return sample


def build_samples(
    config: Config, source: ConditionedPictures, latent_shape: tuple[int, int, int], cache: LatentCache | None
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


@torch.no_grad()
def fixed_questions(config: Config, heldout: ConditionedPictures, encoders: Encoders) -> CaptionedValidationSet | None:
    """The held-out pictures with their first captions at fixed (t, eps), and the same with other captions.

    None if there are no held-out pictures to ask about.
    """
    source = evenly(heldout, config.loop.evaluation_pictures)
    if not len(source):
        return None

    def latents(rows: Sequence[Row]) -> Tensor:
        vae = encoders.vae
        return torch.cat([encode(vae, pixels).mean for pixels in pixel_batches(rows, config.data.size, "asking")])

    context = channels = class_labels = None
    x0 = latents(source.pictures)
    if source.condition_column:
        channels = latents([source.condition(i) for i in range(len(source))])
    if source.labels:
        class_labels = torch.from_numpy(source.class_ids).to(x0.device)
    text = encoders.text
    if text:
        first = [row.captions[0] for row in source.pictures]
        context = torch.cat([text.encode(first[i : i + BATCH]) for i in range(0, len(first), BATCH)])
    rng = generator(config.seed, "held out")
    conditioning = Conditioning(context, class_labels, channels)
    true = ValidationSet.fixed(x0, conditioning, config.diffusion.timesteps, rng)
    if text is None:
        return CaptionedValidationSet(true)
    return CaptionedValidationSet.of(true, [row.captions for row in source.pictures], text.encode([""]), rng)


def to_device(collated: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Collated samples, with all that a step takes from them but u on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "u" else value
        for name, value in collated.items()
    }


@torch.no_grad()
def with_latents(collated: dict[str, Any], vae: Any) -> dict[str, Any]:
    """What a cache would have known of the pictures, in place of their pixels."""
    rest = dict(collated)
    posterior = encode(vae, rest.pop("pixels"))
    if "condition_pixels" in rest:
        rest["channels"] = encode(vae, rest.pop("condition_pixels")).mean
    return rest | {"mean": posterior.mean, "std": posterior.std}


def with_context(collated: dict[str, Any], text: TextEncoder | None) -> dict[str, Any]:
    """What a cache would have known of the captions, beside them."""
    return collated | {"context": text.encode(collated["caption"])} if text else collated


def to_batch(encoded: dict[str, Any]) -> Batch:
    """Collated samples from a cache, or encoded here => what a step takes."""
    return Batch(
        x0=Posterior(encoded["mean"], encoded["std"]).sample(encoded["posterior_noise"]),
        conditioning=Conditioning(encoded.get("context"), encoded.get("class"), encoded.get("channels")),
        u=encoded["u"],
        eps=encoded["eps"],
    )


def numbers_of(
    first_step: int, steps: int, batch_size: int, accumulation: int, rank: int, processes: int
) -> list[range]:
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
        range(start, start + share)
        for step in range(first_step, steps)
        for micro in range(accumulation)
        for start in [step * batch_size + (micro * processes + rank) * share]
    ]


def batches(
    samples: Samples, numbers: Sequence[Sequence[int]], device: torch.device, encoders: Encoders | None = None
) -> Iterator[Batch]:
    """The batches with these sample numbers, one after the other; samples without a cache are encoded here."""
    for collated in collated_batches(samples, numbers, device):
        if samples.cache is None:
            assert encoders is not None, "samples without a cache need encoders"
            collated = with_context(with_latents(collated, encoders.vae), encoders.text)
        yield to_batch(collated)


def few_batches(
    samples: Samples, numbers: Sequence[Sequence[int]], device: torch.device, encoders: Encoders
) -> list[Batch]:
    """The batches with these sample numbers, of samples without a cache: first all pictures are encoded, then all
    captions, so that the encoders need not be in memory together."""
    collated = [with_latents(batch, encoders.vae) for batch in collated_batches(samples, numbers, device)]
    return [to_batch(with_context(batch, encoders.text)) for batch in collated]


def collated_batches(
    samples: Samples, numbers: Sequence[Sequence[int]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """The samples of each batch, collated, on the device; read by worker processes if the config says so and there is
    no cache."""
    loader: DataLoader[dict[str, Any]] = DataLoader(
        samples,
        batch_sampler=cast(Any, numbers),  # whose stubs want lists, of which a long run's would be 250 MB
        num_workers=0 if samples.cache is not None else samples.data.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_in_worker,
    )
    for collated in loader:
        yield to_device(collated, device)
