"""From (seed, n) to the tensors of sample n of the U-Net's training, and from samples to batches.

What is random of a sample comes from randomness.py; its latents and context come from the cache, or from the picture
and caption themselves. Both ways give the same batch; without the cache VAE and text encoder run at every step, and
worker processes read pictures meanwhile. Masked pictures, which no cache can know, are encoded at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import default_collate

from ldm.data.batches import choose_caption, load_pixels, pixel_batches
from ldm.data.buckets import in_bucket
from ldm.data.cache.latents import LatentCache
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import CaptionedPictures, Row
from ldm.data.images import Size
from ldm.evaluation.validation import CaptionedValidationSet, ValidationSet, derangement
from ldm.models.conditioning import Conditioning
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import Posterior, encode
from ldm.training.config import Config, DataConfig
from ldm.training.encoders import Encoders
from ldm.training.latent_cache import buckets_of_all, encode_once, validation_pictures
from ldm.training.masks import Masking, mask_channels
from ldm.training.order import Order
from ldm.training.prior import Prior
from ldm.training.randomness import Draw, draw, generator
from ldm.training.sizes import buckets_of
from ldm.training.upscaling import Crops

ON_CPU = ("u", "kept")  # they choose timesteps and rows, for which no step should wait


@dataclass(frozen=True)
class Batch:
    """What one training step takes.

    Attributes:
        x0: [B,C,h,w] scaled latents.
        conditioning: of the B pictures.
        u: float64 [B] in [0, 1), on the CPU; the timesteps follow from it.
        eps: [B,C,h,w].
        kept: bool [B], on the CPU: what is to be learned of these is what the model does (`prior.py`); None is none.
    """

    x0: Tensor
    conditioning: Conditioning
    u: Tensor
    eps: Tensor
    kept: Tensor | None = None

    @classmethod
    def of(cls, encoded: dict[str, Any]) -> Batch:
        """Collated samples from a cache, or encoded here."""
        return cls(
            x0=Posterior(encoded["mean"], encoded["std"]).sample(encoded["posterior_noise"]),
            conditioning=Conditioning(encoded.get("context"), encoded.get("class"), encoded.get("channels")),
            u=encoded["u"],
            eps=encoded["eps"],
            kept=encoded.get("kept"),
        )

    def halved(self) -> Batch:
        """The batch at half the resolution, latents [B,C,h/2,w/2]: each the mean of the four in its place.

        So is the noise, times two: the mean of four values of variance 1 has a variance of 1/4.
        """
        channels = self.conditioning.channels
        if channels is not None:
            masks = channels.shape[1] - self.x0.shape[1]  # channels that stay 0 or 1, with inpainting
            channels = torch.cat([channels[:, :masks, ::2, ::2], avg_pool2d(channels[:, masks:], 2)], dim=1)
        conditioning = replace(self.conditioning, channels=channels)
        return replace(self, x0=avg_pool2d(self.x0, 2), conditioning=conditioning, eps=2 * avg_pool2d(self.eps, 2))


@dataclass(frozen=True)
class LatentSamples:
    """Sample n of a run, for any n >= 0, on the CPU.

    Attributes:
        config: of the run.
        latent_shape: (C, h, w) of a square of data.size; another bucket's has as many channels.
        order: n => which picture sample n shows; it knows their buckets.
        cache: latents and contexts; None to read pictures and captions.
        crops: the crop and the small picture of sample n; None for a model that doesn't upscale.
        prior: which samples show the model's own pictures; None for none.
    """

    source: ConditionedPictures
    config: Config
    latent_shape: tuple[int, int, int]
    order: Order
    cache: LatentCache | None = None
    crops: Crops | None = None
    prior: Prior | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        source: ConditionedPictures,
        latent_shape: tuple[int, int, int],
        cache: LatentCache | None = None,
    ) -> LatentSamples:
        """The samples of a config's run on these pictures."""
        order = Order(config.seed, buckets_of(config, source.pictures), config.loop.batch_size, source.repeats)
        return cls(source, config, latent_shape, order, cache)

    @property
    def data(self) -> DataConfig:
        """The section of the config."""
        return self.config.data

    @property
    def pictures(self) -> CaptionedPictures:
        """The rows that samples show."""
        return self.source.pictures

    def row_of(self, n: int) -> int:
        return self.order(n)

    def draw(self, n: int) -> Draw:
        """Everything random of sample n."""
        row, dropout = self.order(n), self.config.diffusion.caption_dropout
        shape = in_bucket(self.latent_shape, self.data.size, self.order.buckets.size(row))
        return draw(self.config.seed, n, row=row, latent_shape=shape, caption_dropout=dropout)

    def row_facts(self, number: int, row: Row) -> list[Any]:
        label = int(self.source.class_ids[number]) if self.source.labels else None
        return [
            row.captions,
            label,
            self.source.condition(number).content.hex() if self.source.condition_column else "",
            *(row.extra[name] for name in (self.source.numbers.columns if self.source.numbers else ())),
            *([] if self.source.repeats is None else [int(self.source.repeats[number])]),
        ]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, as DataLoader reads them."""
        with self.cache.reading() if self.cache else nullcontext():
            return [self[n] for n in numbers]

    def __getitem__(self, n: int) -> dict[str, Any]:
        drawn = self.draw(n)
        size = self.order.buckets.size(drawn.row)
        row = self.pictures[drawn.row]
        caption = choose_caption(row.captions, drawn.caption) if row.captions else ""
        flip = drawn.flip and self.data.flip
        sample: dict[str, Any] = {"u": drawn.u, "eps": drawn.eps, "posterior_noise": drawn.posterior_noise}
        if self.source.class_inputs is not None:
            sample["class"] = self.source.null_input if drawn.caption is None else self.source.class_inputs[drawn.row]
        load = partial(load_pixels, size=size, crop=self.data.crop, position=drawn.crop, flip=flip)
        pixels = load(row) if self.cache is None or self.data.inpaint else None
        if self.data.inpaint and pixels is not None:
            shape: Any = tuple(drawn.eps.shape)
            sample |= Masking(self.config.seed, size, shape)(n, pixels)
        if self.cache is None:
            sample |= {"pixels": pixels, "caption": caption}
            if self.source.condition_column:
                sample["condition_pixels"] = load(self.source.condition(drawn.row))
        else:
            sample["mean"], sample["std"] = self.cache.posterior(drawn.row, flip)
            if self.cache.contexts is not None:
                sample["context"] = self.cache.context(caption)
            if self.source.condition_column:
                sample["channels"], _ = self.cache.posterior(self.source.condition_number(drawn.row), flip)
        if self.prior is not None:
            sample = self.prior(n, drawn, sample)
        return sample if self.crops is None else self.crops(n, drawn.row, drawn.crop, flip, sample)


def validation_sets(
    config: Config,
    heldout: ConditionedPictures,
    encoders: Encoders,
    latent_shape: tuple[int, int, int],
    device: torch.device,
    timesteps: Sequence[int] = (),
) -> list[CaptionedValidationSet]:
    """The held-out pictures with their first captions at fixed (t, eps), and the same with other captions.

    Args:
        timesteps: those t; without any, one in each quarter.
    Returns:
        A set for each bucket that has some of them; the other captions are those of all. Every rank must call it.
    """
    source = validation_pictures(config, heldout)
    if not len(source):
        return []
    buckets, every = buckets_of(config, source.pictures), buckets_of_all(config, source)
    captions = [row.captions for row in source.pictures]
    prompts = [*(each[0] for each in captions), ""] if encoders.load_text else []
    means, context = encode_once(config, source.all_pictures, every, prompts, encoders, latent_shape, "heldout")
    classes = None if source.class_inputs is None else torch.from_numpy(source.class_inputs).to(device)
    rng = generator(config.seed, "held out")

    def together(numbers: Sequence[int]) -> Tensor:
        return torch.stack([means[number] for number in numbers]).to(device)

    def true(size: Size, group: npt.NDArray[np.int64]) -> ValidationSet:
        part, second = torch.from_numpy(group), None
        if source.condition_column:
            second = together([source.condition_number(number) for number in group.tolist()])
        if config.data.inpaint:
            shape = in_bucket(latent_shape, config.data.size, size)
            second = masked_channels(config, source.pictures.select(group), encoders, size, shape, group.tolist())
        conditioning = Conditioning(
            None if context is None else context[part].to(device), None if classes is None else classes[part], second
        )
        x0 = together(group.tolist())
        if timesteps:
            return ValidationSet.at(x0, conditioning, timesteps, rng)
        return ValidationSet.fixed(x0, conditioning, config.diffusion.timesteps, rng)

    trues = [true(size, group) for size, group in buckets.groups()]
    if context is None:
        return [CaptionedValidationSet(one) for one in trues]
    order, null = derangement(captions, rng), context[-1:].to(device)
    return [
        CaptionedValidationSet(
            one,
            None if order is None else context[order[torch.from_numpy(group)]].to(device),
            null.expand(len(group), -1, -1),
        )
        for one, (_, group) in zip(trues, buckets.groups(), strict=True)
    ]


@torch.no_grad()
def masked_channels(
    config: Config,
    pictures: CaptionedPictures,
    encoders: Encoders,
    size: Size,
    latent_shape: tuple[int, int, int],
    numbers: Sequence[int],
) -> Tensor:
    """What follows x_t for held-out pictures [N,1+C,h,w], each with the mask of its number, on the VAE's device."""
    masking, vae = Masking(config.seed, size, latent_shape, "held-out mask"), encoders.vae
    parts, n = [], 0
    for pixels in pixel_batches(pictures, size, "masking"):
        collated = default_collate([masking(numbers[n + i], one) for i, one in enumerate(pixels)])
        parts.append(with_latents(to_device(collated, vae.device), vae)["channels"])
        n += len(pixels)
    return torch.cat(parts)


def to_device(collated: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Collated samples, with all that a step takes from them but u and kept on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name not in ON_CPU else value
        for name, value in collated.items()
    }


def has_pixels(collated: dict[str, Any]) -> bool:
    """Whether a VAE must encode something of these samples."""
    return "pixels" in collated or "masked_pixels" in collated


@torch.no_grad()
def with_latents(collated: dict[str, Any], vae: Any) -> dict[str, Any]:
    """Collated samples with latents in place of all pixels that they have."""
    rest = dict(collated)
    if "masked_pixels" in rest:
        left = encode(vae, rest.pop("masked_pixels"))
        rest["channels"] = mask_channels(rest.pop("mask"), left, rest.pop("mask_noise"))
    if "pixels" not in rest:  # a cache has them
        return rest
    posterior = encode(vae, rest.pop("pixels"))
    if "condition_pixels" in rest:
        rest["channels"] = encode(vae, rest.pop("condition_pixels")).mean
    return rest | {"mean": posterior.mean, "std": posterior.std}


def with_context(collated: dict[str, Any], text: TextEncoder | None) -> dict[str, Any]:
    """Collated samples with the context of all captions that they have, beside them."""
    return collated | {"context": text.encode(collated["caption"])} if text and "caption" in collated else collated
