"""LDMUpscalePipeline: small pictures in, large ones out.

    small picture => noised to noise_level => channels that follow x_t, and noise_level as class ---+
    prompt => encode_prompt => context -------------------------------------------------------------+-> denoiser
    noise => x_T => sampling.sample => x_0, the large picture's latents => vae.decode => large picture

It is a stock StableDiffusionUpscalePipeline in what surrounds the loop, and with the same words it makes the same
picture, bit for bit (cascades: Ho et al. 2022; on latents: Rombach et al. 2022, section 4.4). The latents of the large
picture have the small one's height and width. A picture larger than the network's own size is cut into overlapping
tiles, whose predictions are fused at every step (`ldm.inference.tiling`).

The stock class sets its VAE's `scaling_factor` to 0.08333 without a look at its weights; `from_components` folds this
factor into the weights, so that it is right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionUpscalePipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from ldm.diffusion.guidance import NEGATIVE, POSITIVE, Guidance
from ldm.inference import samplers
from ldm.inference.colors import with_colors_of
from ldm.inference.decoding import decode
from ldm.inference.defaults import Defaults, check_sampler
from ldm.inference.sampling import sample
from ldm.inference.tiling import TiledDenoiser, corners
from ldm.models.conditioning import Conditioning, UNetDenoiser
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import fold_scale
from ldm.pipelines.editing import pictures_of
from ldm.pipelines.inputs import (
    OUTPUT_TYPES,
    check_known,
    check_number,
    check_prompts,
    known_texts,
    one_each,
    one_generator_each,
)
from ldm.pipelines.loading import UPSCALER, Saved

SCALE = 0.08333  # of latents, which the stock class forces
MAX_EDGE = 1024  # pixels of a small picture
#: What a stock upscaler does with a call that doesn't name them.
STOCK_STEPS, STOCK_GUIDANCE_SCALE, NOISE_LEVEL = 75, 9.0, 20
AT_ONCE = 8  # pictures, or tiles, that the U-Net is given together


class LDMUpscalePipeline(Saved, StableDiffusionUpscalePipeline):
    """An upscaler.

    Examples:
        >>> pipe = LDMUpscalePipeline.from_pretrained("runs/upscale/pipeline")
        >>> pipe("red heart", image=Image.open("heart.png"), seed=7).images[0].save("large.png")
    """

    engine: None = None  # it computes with torch alone
    noise_level = NOISE_LEVEL  # of a call that names none

    @classmethod
    def from_components(
        cls,
        vae: Any,
        text: TextEncoder | None,
        unet: Any,
        scheduler_config: dict[str, Any],
        *,
        max_noise_level: int,
    ) -> Self:
        """Put trained parts together.

        Args:
            vae: whose scaling factor is folded, in place, unless its weights are on the meta device and it has been.
            scheduler_config: comes from `ldm.diffusion.schedule.scheduler_config`.
            max_noise_level: the highest that the U-Net has learned.
        """
        if vae.config.scaling_factor != SCALE:
            fold_scale(vae, SCALE)
        return cls(
            vae=vae,
            text_encoder=text.model if text else None,
            tokenizer=text.tokenizer if text else None,
            unet=unet,
            low_res_scheduler=low_resolution_scheduler(),
            scheduler=DPMSolverMultistepScheduler.from_config({**scheduler_config, "steps_offset": 1}),
            max_noise_level=max_noise_level,
        )

    @classmethod
    def check_kind(cls, folder: Path, index: Mapping[str, Any]) -> None:
        if index.get("_class_name") != UPSCALER:
            raise ValueError(f"{folder}: it is no upscaler but a {index.get('_class_name')}; load it with LDMPipeline")

    @property
    def stock_class(self) -> str:
        return UPSCALER

    @property
    def factor(self) -> int:
        """How many times as large, along an edge, its pictures are."""
        return int(self.vae_scale_factor)

    @property
    def tile(self) -> int:
        """Pixels along an edge of a small picture that the network sees at once: of those it was trained for."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else min(size))

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_level: int = NOISE_LEVEL,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        keep_colors: bool = False,
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Upscale pictures of one size, all at once; `upscale` takes any number of any sizes.

        The arguments before `seed` are those of StableDiffusionUpscalePipeline, in its order and with its meaning, but
        `num_images_per_prompt`, which repeats each picture beside itself with noise of its own. A call that names
        neither steps nor guidance takes the model's `defaults`; else what it leaves out is as in stock diffusers.

        Args:
            prompt: what the pictures show, one for all or one each; by default the empty prompt.
            image: the small pictures: PIL, of any mode; an array [H,W,3] or [B,H,W,3], a tensor [3,H,W] or [B,3,H,W],
                uint8 or in [0,1]; or a list. Edges that aren't multiples of the factor are continued, then cut off.
            noise_level: of the noise that the small picture is put under, from 0 to `config.max_noise_level`: more
                gives details that are less bound to it.
            generator, seed: as in LDMPipeline.
            tile: pixels along an edge of a small picture that the network is given at once; larger pictures are cut
                into overlapping tiles. By default its own size.
            overlap: pixels that neighboring tiles share; by default a quarter of a tile.
            keep_colors: give the large picture the small one's colors (`ldm.inference.colors`).
        Returns:
            `.images`, a list of PIL pictures or an array, by `output_type`.
        Raises:
            ValueError: names the argument and what it allows.
            TypeError: for an unknown argument.
        """
        check_known(unknown, set(inspect.signature(LDMUpscalePipeline.__call__).parameters) - {"self", "unknown"})
        settings = self.resolve(num_inference_steps, guidance_scale)
        tile, overlap = self._check(
            settings, noise_level, num_images_per_prompt, eta, output_type, callback_steps, tile, overlap
        )
        if sampler is not None:
            check_sampler("sampler", sampler)
        scheduler = self.scheduler if sampler is None else samplers.build(sampler, self.scheduler.config)
        pixels, (height, width) = self._pixels(image)
        pixels = pixels.repeat_interleave(num_images_per_prompt, 0)
        prompts, negatives = self._texts(prompt, negative_prompt, prompt_embeds, len(pixels) // num_images_per_prompt)
        generators = one_generator_each(generator, seed, len(pixels))

        # prompts => context
        device = self._execution_device
        has_text = bool(prompts) or prompt_embeds is not None
        contrast = settings.guidance_scale > 1 and has_text
        context = null = None
        if has_text:
            context, null = self.encode_prompt(
                prompts or None, device, num_images_per_prompt, contrast, negatives or None,
                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                lora_scale=(cross_attention_kwargs or {}).get("scale"), clip_skip=clip_skip,
            )  # fmt: skip
            if len(context) != len(pixels):
                raise ValueError(f"prompt_embeds: expected {len(pixels)}, one a picture, got {len(context)}")
        dtype = self.unet.dtype if context is None else context.dtype

        # small pictures, noised; then x_T
        scheduler.set_timesteps(settings.num_inference_steps, device=device)
        pixels = pixels.to(device=device, dtype=dtype)
        level = torch.tensor([noise_level], dtype=torch.long, device=device)
        noise = randn_tensor(pixels.shape, generator=generators, device=device, dtype=dtype)
        low = self.low_res_scheduler.add_noise(pixels, noise, level)  # [B,3,h,w]
        shape = (len(low), self.vae.config.latent_channels, *low.shape[-2:])
        if latents is None:
            latents = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents: expected {list(shape)}, got {list(latents.shape)}")
        x = latents.to(device) * scheduler.init_noise_sigma

        levels = level.repeat(len(low))
        conditions = {POSITIVE: Conditioning(context, levels, low), NEGATIVE: Conditioning(null, levels, low)}
        stock = {} if cross_attention_kwargs is None else {"cross_attention_kwargs": cross_attention_kwargs}
        tiles = corners(low.shape[-2], low.shape[-1], tile, overlap)
        denoiser: Any = UNetDenoiser(self.unet, conditions, **stock)
        if len(tiles) > 1:
            at_once = max(1, AT_ONCE // len(low))
            if not contrast:
                conditions.pop(NEGATIVE)
            denoiser = TiledDenoiser(self.unet, conditions, tiles, tile, overlap, at_once, **stock)
        guidance = Guidance(
            scheduler.config.num_train_timesteps, settings.guidance_scale if contrast else 1.0,
            settings.guidance_interval,
        )  # fmt: skip
        accepted = inspect.signature(scheduler.step).parameters
        chance = {"eta": eta, "generator": generators}
        with self.progress_bar(total=settings.num_inference_steps) as bar:

            def on_step(i: int, t: Tensor, x: Tensor) -> Tensor:
                if i == len(scheduler.timesteps) - 1 or (i + 1) % scheduler.order == 0:
                    bar.update()
                    if callback is not None and i % callback_steps == 0:
                        callback(i // scheduler.order, int(t), x)
                return x

            x = sample(
                denoiser, x, scheduler, scheduler.timesteps, guidance=guidance, on_step=on_step,
                **{name: value for name, value in chance.items() if name in accepted},
            )  # fmt: skip

        images: Any = x[..., :height, :width]  # without what continued its edges
        flagged = None
        if output_type != "latent":
            images = self._decoded(images, tiled=len(tiles) > 1)
            if keep_colors:
                images = with_colors_of(pixels[..., :height, :width].to(images), images)
            images, flagged, _ = self.run_safety_checker(images, device, dtype)
        fine = [True] * len(images) if flagged is None else [not flag for flag in flagged]
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=fine)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def upscale(
        self,
        images: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        batch_size: int = AT_ONCE,
        generator: Any = None,
        seed: int | Sequence[int] | None = None,
        output_type: str = "pil",
        **settings: Any,
    ) -> StableDiffusionPipelineOutput:
        """Upscale any number of pictures of any sizes, a few at a time.

        Args:
            images: as `image` of a call.
            prompt: one for all or one each.
            batch_size: pictures at once, which bounds memory.
            output_type: "pil"; "np" and "pt" for pictures of one size.
            settings: other arguments of a call; `keep_colors` is on unless it is named.
        Returns:
            `.images`, in the order of the small ones.
        """
        settings.setdefault("keep_colors", True)
        check_number("batch_size", batch_size, 1, 1024, Integral)
        listed = list_of(images)
        prompts = one_each("prompt", [prompt] if prompt is None or isinstance(prompt, str) else prompt, len(listed))
        generators = one_generator_each(generator, seed, len(listed))
        sizes: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(listed):
            sizes.setdefault(_size(picture), []).append(i)
        if output_type != "pil" and len(sizes) > 1:
            raise ValueError(f"output_type: pictures of {len(sizes)} sizes are no array; expected pil")
        for height, width in sizes:
            self.check_edges(height, width)
        parts = [some[i : i + batch_size] for some in sizes.values() for i in range(0, len(some), batch_size)]
        made: dict[int, Any] = {}
        bar_of_steps = dict(getattr(self, "_progress_bar_config", {}))
        if len(parts) > 1:
            self.set_progress_bar_config(**{**bar_of_steps, "disable": True})
        try:
            silent = len(parts) == 1 or bool(bar_of_steps.get("disable"))
            for part in tqdm(parts, desc="upscaling", unit="batch", disable=silent):
                given: dict[str, Any] = {"prompt": [prompts[i] or "" for i in part]} if self.tokenizer else {}
                output: Any = self(
                    image=[listed[i] for i in part], output_type=output_type, **given,
                    generator=None if generators is None else [generators[i] for i in part], **settings,
                )  # fmt: skip
                made |= dict(zip(part, output.images, strict=True))
        finally:
            self._progress_bar_config = bar_of_steps
        found: Any = [made[i] for i in range(len(listed))]
        if output_type != "pil":
            found = torch.stack(found) if isinstance(found[0], Tensor) else np.stack(found)
        return StableDiffusionPipelineOutput(images=found, nsfw_content_detected=None)

    def resolve(self, num_inference_steps: int | None, guidance_scale: float | None) -> Defaults:
        """The settings of a call: the model's if it names none, else the named ones beside those of the stock class."""
        if num_inference_steps is None and guidance_scale is None:
            return self.defaults
        return Defaults(
            STOCK_STEPS if num_inference_steps is None else num_inference_steps,
            STOCK_GUIDANCE_SCALE if guidance_scale is None else guidance_scale,
        )

    def check_edges(self, height: int, width: int) -> None:
        """Raise a ValueError unless a small picture of this size can be upscaled."""
        least = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if not all(least <= edge <= MAX_EDGE for edge in (height, width)):
            raise ValueError(f"image: expected edges from {least} to {MAX_EDGE} pixels, got {width} x {height}")

    def check_generated(self, height: int, width: int, prompts: Sequence[str]) -> None:
        """Raise a ValueError, naming `upscale`, unless it takes pictures of this size with these prompts."""
        try:
            self.check_edges(height, width)
            if self.tokenizer is not None and prompts:
                check_prompts("prompt", prompts, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"upscale: {str(error).partition(': ')[2]}") from None

    def fitting(self, captions: Sequence[str]) -> list[str]:
        """Captions as prompts: "" for those that are too long, for the small picture determines most."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return [""] * len(captions)
        lengths = [len(tokenizer(caption, verbose=False).input_ids) for caption in captions]
        return [c if n <= tokenizer.model_max_length else "" for c, n in zip(captions, lengths, strict=True)]

    # --- arguments ------------------------------------------------------------------------------------

    def _check(
        self, settings: Defaults, noise_level: Any, copies: Any, eta: Any, output_type: Any, callback_steps: Any,
        tile: Any, overlap: Any,
    ) -> tuple[int, int]:  # fmt: skip
        """Check what doesn't depend on pictures and prompts; returns the edge of a tile and the overlap."""
        T = self.scheduler.config.num_train_timesteps
        check_number("num_inference_steps", settings.num_inference_steps, 1, T, Integral)
        check_number("guidance_scale", settings.guidance_scale, 0, 100)
        check_number("noise_level", noise_level, 0, self.config.max_noise_level, Integral)
        check_number("num_images_per_prompt", copies, 1, 1024, Integral)
        check_number("eta", eta, 0, 1)
        check_number("callback_steps", callback_steps, 1, T, Integral)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        least = 2 ** (len(self.unet.config.block_out_channels) - 1)
        tile = self.tile if tile is None else tile
        check_number("tile", tile, 2 * least, MAX_EDGE, Integral)
        if tile % least:
            raise ValueError(f"tile: expected a multiple of {least}, got {tile}")
        overlap = tile // 4 if overlap is None else overlap
        check_number("overlap", overlap, 0, tile // 2, Integral)
        return int(tile), int(overlap)

    def _pixels(self, image: Any) -> tuple[Tensor, tuple[int, int]]:
        """Pictures of one size => pixels [B,3,h,w] in [-1,1] with edges that are multiples, and their own edges."""
        listed = list_of(image)
        if len({isinstance(picture, Image.Image) for picture in listed}) > 1:
            raise ValueError("image: expected pictures of one kind, got 8-bit ones and floats")
        sizes = {_size(picture) for picture in listed}
        if len(sizes) > 1:
            found = " and ".join(f"{w} x {h}" for h, w in sorted(sizes)[:2])
            raise ValueError(f"image: expected pictures of one size, got {found}; pipe.upscale takes any sizes")
        ((height, width),) = sizes
        self.check_edges(height, width)
        step = self.factor  # stock shrinks pictures to multiples of it
        continued: list[Any] = [_continued(picture, -width % step, -height % step) for picture in listed]
        if isinstance(continued[0], Tensor):
            return self.image_processor.preprocess(torch.cat(continued)), (height, width)
        return self.image_processor.preprocess(continued), (height, width)

    def _texts(self, prompt: Any, negative: Any, embeds: Any, pictures: int) -> tuple[list[str], list[str]]:
        """A prompt and a negative prompt for each of the pictures; none where context is given, or for no text."""
        if embeds is not None:
            if prompt is not None:
                raise ValueError("prompt: give prompt or prompt_embeds, not both")
            return [], []
        if prompt is None and self.tokenizer is not None:
            prompt = ""
        prompts = known_texts("prompt", prompt, self.tokenizer)
        negatives = [] if negative is None else known_texts("negative_prompt", negative, self.tokenizer)
        return (
            one_each("prompt", prompts, pictures) if prompts else [],
            one_each("negative_prompt", negatives, pictures) if negatives else [],
        )

    def _decoded(self, latents: Tensor, *, tiled: bool) -> Tensor:
        """Latents => pixels; those of a tiled picture in the VAE's own tiles, unless they fit into one."""
        was_tiling = self.vae.use_tiling
        if tiled:
            self.vae.enable_tiling()
        try:
            return decode(self.vae, latents.to(next(self.vae.post_quant_conv.parameters()).dtype))
        finally:
            self.vae.use_tiling = was_tiling


def low_resolution_scheduler() -> DDPMScheduler:
    """The process that small pictures are noised by, in training and in the pipeline (Ho & Salimans's linear betas)."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def list_of(images: Any) -> list[Any]:
    """Pictures of any kind => RGB pictures, or tensors [1,3,H,W] in [0,1]. Raises ValueError, naming `image`."""
    if images is None:
        raise ValueError("image: name the pictures to upscale")
    listed = list(images) if isinstance(images, list | tuple) else [images]
    if not listed:
        raise ValueError("image: expected at least one picture, got an empty list")
    return [picture for one in listed for picture in pictures_of(one)]


def _size(picture: Any) -> tuple[int, int]:
    """Height and width."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return int(picture.shape[-2]), int(picture.shape[-1])


def _continued(picture: Any, right: int, bottom: int) -> Any:
    """A picture with its last columns and rows repeated so many times."""
    if not right and not bottom:
        return picture
    if isinstance(picture, Image.Image):
        return Image.fromarray(np.pad(np.asarray(picture), ((0, bottom), (0, right), (0, 0)), mode="edge"))
    return pad(picture, (0, right, 0, bottom), mode="replicate")
