"""Training an upscaler: the diffusion task on crops, conditioned on small pictures and their noise level.

`upscale` has its settings. RUN/pipeline is a stock StableDiffusionUpscalePipeline; put into its base's folder as
`upscaler/`, it is found by `pipe(..., upscale=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from ldm.data.cache.latents import LatentCache
from ldm.data.dataset import CaptionedPictures
from ldm.evaluation.validation import CaptionedValidationSet
from ldm.inference.defaults import Defaults
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import fold_scale
from ldm.pipelines.upscale import SCALE, LDMUpscalePipeline
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import encoding_dtype
from ldm.training.export import quiet
from ldm.training.latent_cache import validation_pictures
from ldm.training.previews import upscaled_grid
from ldm.training.samples import LatentSamples
from ldm.training.small_pictures import Base, SmallPictures, build_small_pictures, small_kind
from ldm.training.tasks.diffusion import Diffusion
from ldm.training.upscaling import Crops

CHANNELS = 3  # of the small picture, which follow those of x_t


class Upscaling(Diffusion):
    """An upscaler's U-Net and its average, behind frozen encoders."""

    title = "upscaler"
    pipeline_class = LDMUpscalePipeline

    def __post_init__(self) -> None:
        vae = None if self.encoders is None else self.encoders.vae_outline
        if vae is not None and getattr(vae, "quant_conv", None) is None:
            raise ValueError(
                "vae: stock upscalers scale latents by 0.08333, which is folded into quant convolutions; expected an "
                f"AutoencoderKL that has them, got {type(vae).__name__}"
            )
        super().__post_init__()

    @classmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Diffusion:
        if config.upscale.base is not None:
            Base(config, accelerator.device, encoding_dtype(accelerator))  # refuses a wrong one now
        return super().create(config, accelerator, pictures)

    @cached_property
    def base(self) -> Base | None:
        """The model whose pictures are to be upscaled."""
        config = self.config
        return Base(config, self.accelerator.device, encoding_dtype(self.accelerator)) if config.upscale.base else None

    # --- networks ---------------------------------------------------------------------------------

    @property
    def condition_channels(self) -> int:
        return CHANNELS

    @property
    def classes(self) -> int:
        return self.config.upscale.max_noise_level + 1

    def load_vae(self) -> Any:
        vae = super().load_vae()
        fold_scale(vae, SCALE)
        return vae

    # --- samples ----------------------------------------------------------------------------------

    def latent_samples(self, cache: LatentCache | None = None) -> LatentSamples:
        config, source = self.config, self.source
        assert source is not None
        rows = source.train.pictures
        if cache is None:  # before the first step, when the machine is tried
            small = SmallPictures(rows, config.data.size // config.upscale.factor)
        else:
            small = build_small_pictures(config, rows, self.base)
        crops = Crops(config.seed, config.upscale, small)
        shape = (self.latent_shape[0], crops.edge, crops.edge)
        return replace(LatentSamples.of(config, source.train, shape, cache), crops=crops)

    def validation_sets(self) -> list[CaptionedValidationSet]:
        """The held-out pictures, whole, with shrunk ones at fixed noise levels."""
        found = super().validation_sets()
        if not found:
            return []
        (squares,) = found
        assert self.source is not None
        rows = validation_pictures(self.config, self.source.heldout).pictures
        small = build_small_pictures(self.config, rows, None, "small-heldout")
        levels, channels = Crops(self.config.seed, self.config.upscale, small, "held-out upscale").whole(
            range(len(rows))
        )
        device = self.accelerator.device
        given = {"class_labels": levels.to(device), "channels": channels.to(device)}
        conditioning = replace(squares.true.conditioning, **given)
        return [replace(squares, true=replace(squares.true, conditioning=conditioning))]

    def frozen_facts(self) -> dict[str, str]:
        return super().frozen_facts() | ({"upscale_base": self.base.sha256[:16]} if self.base else {})

    def other_needs(self) -> dict[str, int]:
        assert self.source is not None
        kind = small_kind(self.config, self.base)
        return super().other_needs() | {"small pictures": kind.disk_bytes(len(self.source.train))}

    # --- export, preview --------------------------------------------------------------------------

    @property
    def defaults(self) -> Defaults:
        """Unguided, since the small picture determines most; the previews' steps."""
        return Defaults(self.config.preview_steps, guidance_scale=1.0)

    def weightless_pipeline(self, vae: Any, text: TextEncoder | None) -> LDMUpscalePipeline:
        most = self.config.upscale.max_noise_level
        pipeline = LDMUpscalePipeline.from_components(
            vae, text, self.weightless_unet(), self.scheduler, max_noise_level=most
        )
        pipeline.defaults = self.defaults
        return pipeline

    def preview(self, step: int, interrupted: Callable[[], bool]) -> Image.Image | None:
        """Held-out pictures small, upscaled and true, by RUN/pipeline as it was just saved."""
        if self.exported is None or not self.prompts:
            return None
        with quiet():
            pipeline = LDMUpscalePipeline.from_pretrained(self.exported).to(self.accelerator.device)
        grid = upscaled_grid(pipeline, self.prompts, self.config, interrupted)
        del pipeline
        give_back()
        return grid

    def summary(self) -> str:
        folder = Path(self.config.run) / "pipeline"
        return (
            f"upscaler: done; upscale with it: ldm upscale {folder} PICTURE, or put it behind its base: ldm export "
            f"BASE FOLDER --upscaler {folder}"
        )
