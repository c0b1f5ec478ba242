"""From (seed, n) to the tensors of sample n of the U-Net's training, and from samples to batches.

What is random of a sample comes from randomness.py; its latents and context come from the cache, or from the picture
and caption themselves. Both ways give the same batch; without the cache VAE and text encoder run at every step, and
worker processes read pictures meanwhile. Masked pictures, which no cache can know, are encoded at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import default_collate

from ldm.data.batches import choose_caption, load_pixels, pixel_batches
from ldm.data.cache.latents import LatentCache
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import CaptionedPictures, Row
from ldm.evaluation.validation import CaptionedValidationSet, ValidationSet
from ldm.models.conditioning import Conditioning
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import Posterior, encode
from ldm.training.config import Config, DataConfig
from ldm.training.encoders import Encoders
from ldm.training.latent_cache import encode_once, validation_pictures
from ldm.training.masks import Masking, mask_channels
from ldm.training.randomness import Draw, draw, generator
from ldm.training.upscaling import Crops


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

    @classmethod
    def of(cls, encoded: dict[str, Any]) -> Batch:
        """Collated samples from a cache, or encoded here."""
        return cls(
            x0=Posterior(encoded["mean"], encoded["std"]).sample(encoded["posterior_noise"]),
            conditioning=Conditioning(encoded.get("context"), encoded.get("class"), encoded.get("channels")),
            u=encoded["u"],
            eps=encoded["eps"],
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
        draw: n => everything random of sample n.
        cache: latents and contexts; None to read pictures and captions.
        masking: what is masked of sample n; None without inpainting.
        crops: the crop and the small picture of sample n; None for a model that doesn't upscale.
    """

    source: ConditionedPictures
    data: DataConfig
    draw: Callable[[int], Draw]
    cache: LatentCache | None = None
    masking: Masking | None = None
    crops: Crops | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        source: ConditionedPictures,
        latent_shape: tuple[int, int, int],
        cache: LatentCache | None = None,
    ) -> LatentSamples:
        """The samples of a config's run on these pictures."""
        dropout = config.diffusion.caption_dropout
        chance = partial(draw, config.seed, rows=len(source), latent_shape=latent_shape, caption_dropout=dropout)
        masking = Masking(config.seed, config.data.size, latent_shape) if config.data.inpaint else None
        return cls(source, config.data, chance, cache, masking)

    @property
    def pictures(self) -> CaptionedPictures:
        """The rows that samples show."""
        return self.source.pictures

    def row_facts(self, number: int, row: Row) -> list[Any]:
        label = int(self.source.class_ids[number]) if self.source.labels else None
        return [
            row.captions,
            label,
            self.source.condition(number).content.hex() if self.source.condition_column else "",
            *(row.extra[name] for name in (self.source.numbers.columns if self.source.numbers else ())),
        ]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, as DataLoader reads them."""
        with self.cache.reading() if self.cache else nullcontext():
            return [self[n] for n in numbers]

    def __getitem__(self, n: int) -> dict[str, Any]:
        drawn = self.draw(n)
        row = self.pictures[drawn.row]
        caption = choose_caption(row.captions, drawn.caption) if row.captions else ""
        flip = drawn.flip and self.data.flip
        sample: dict[str, Any] = {"u": drawn.u, "eps": drawn.eps, "posterior_noise": drawn.posterior_noise}
        if self.source.class_inputs is not None:
            sample["class"] = self.source.null_input if drawn.caption is None else self.source.class_inputs[drawn.row]
        load = partial(load_pixels, size=self.data.size, crop=self.data.crop, position=drawn.crop, flip=flip)
        pixels = load(row) if self.cache is None or self.masking else None
        if self.masking and pixels is not None:
            sample |= self.masking(n, pixels)
        if self.cache is None:
            sample |= {"pixels": pixels, "caption": caption}
            if self.source.condition_column:
                sample["condition_pixels"] = load(self.source.condition(drawn.row))
            return self.cropped(n, drawn, flip, sample)
        sample["mean"], sample["std"] = self.cache.posterior(drawn.row, flip)
        if self.cache.contexts is not None:
            sample["context"] = self.cache.context(caption)
        if self.source.condition_column:
            sample["channels"], _ = self.cache.posterior(self.source.condition_number(drawn.row), flip)
        return self.cropped(n, drawn, flip, sample)

    def cropped(self, n: int, drawn: Draw, flip: bool, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample as an upscaler takes it; any other model's as it is."""
        return sample if self.crops is None else self.crops(n, drawn.row, drawn.crop, flip, sample)


def validation_set(
    config: Config,
    heldout: ConditionedPictures,
    encoders: Encoders,
    latent_shape: tuple[int, int, int],
    device: torch.device,
    timesteps: Sequence[int] = (),
) -> CaptionedValidationSet | None:
    """The held-out pictures with their first captions at fixed (t, eps), and the same with other captions.

    Args:
        timesteps: those t; without any, one in each quarter.
    Returns:
        None if no pictures are held out. Every rank must call it.
    """
    source = validation_pictures(config, heldout)
    if not len(source):
        return None
    captions = [row.captions for row in source.pictures]
    prompts = [*(each[0] for each in captions), ""] if encoders.load_text else []
    encoded, context = encode_once(config, source.all_pictures, prompts, encoders, latent_shape, "heldout")
    x0, second = encoded.to(device).split(len(source)) if source.condition_column else (encoded.to(device), None)
    if config.data.inpaint:
        second = masked_channels(config, source.pictures, encoders, latent_shape)
    classes = None if source.class_inputs is None else torch.from_numpy(source.class_inputs).to(device)
    rng = generator(config.seed, "held out")
    conditioning = Conditioning(None if context is None else context[:-1].to(device), classes, second)
    if timesteps:
        true = ValidationSet.at(x0, conditioning, timesteps, rng)
    else:
        true = ValidationSet.fixed(x0, conditioning, config.diffusion.timesteps, rng)
    if context is None:
        return CaptionedValidationSet(true)
    return CaptionedValidationSet.of(true, captions, context[-1:].to(device), rng)


@torch.no_grad()
def masked_channels(
    config: Config, pictures: CaptionedPictures, encoders: Encoders, latent_shape: tuple[int, int, int]
) -> Tensor:
    """What follows x_t for held-out pictures [N,1+C,h,w], each with a mask of its own, on the VAE's device."""
    masking, vae = Masking(config.seed, config.data.size, latent_shape, "held-out mask"), encoders.vae
    parts, n = [], 0
    for pixels in pixel_batches(pictures, config.data.size, "masking"):
        collated = default_collate([masking(n + i, one) for i, one in enumerate(pixels)])
        parts.append(with_latents(to_device(collated, vae.device), vae)["channels"])
        n += len(pixels)
    return torch.cat(parts)


def to_device(collated: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Collated samples, with all that a step takes from them but u on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "u" else value
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
