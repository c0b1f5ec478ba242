"""LDMPipeline: prompts in, pictures out.

    prompt -> encode_prompt -> context --+
    class_label, numbers -> class_labels +-> UNetDenoiser --+
    condition -> vae.encode -> channels -+                  +-> sampling.sample -> decoding.decode -> pictures
    seed -> noise -> x_T, or image under noise -> x_t ------+

It is a stock StableDiffusionPipeline in what surrounds the loop: loading and saving, LoRA and textual-inversion
loaders, devices, offloading, callbacks. The loop is ours (`ldm.inference.sampling`). With the same words it makes the
same picture as stock diffusers, bit for bit. Beyond that it has arguments for classes, second pictures, guidance by a
classifier or a weaker model, samplers by name, a seed for each picture, and pictures to change (`editing`).
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ldm.diffusion.guidance import NEGATIVE, POSITIVE, ClassifierGuidance, Guidance, class_log_prob
from ldm.diffusion.schedule import prediction_from_config
from ldm.inference import samplers
from ldm.inference.decoding import decode
from ldm.inference.defaults import AUTOGUIDANCE_SCALE, EVERYWHERE, check_sampler
from ldm.inference.openvino import OpenVINO
from ldm.inference.sampling import sample
from ldm.models.classifier import NoisyClassifier
from ldm.models.conditioning import Conditioning, UNetDenoiser
from ldm.models.fingerprint import weights_state
from ldm.pipelines.editing import check_edit
from ldm.pipelines.inputs import Inputs, check_inputs, check_known
from ldm.pipelines.student import StudentDefaults, TaughtPipeline
from ldm.pipelines.weaker import check_weaker, load_weaker
from ldm.system.devices import best_device

MAX_EDGE = 4096


class LDMPipeline(TaughtPipeline):
    """A text-to-image pipeline.

    Examples:
        >>> pipe = LDMPipeline.from_pretrained("runs/demo/pipeline")
        >>> pipe("red heart", seed=7).images[0].save("heart.png")
    """

    _weaker: tuple[Any, Any] | None = None  # what was loaded, and its U-Net

    @property
    def config(self) -> Any:
        """The pipeline's config; AutoPipelines read it before they look for its relatives."""
        _enter_auto_pipelines()
        return super().config

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        guidance_interval: Sequence[float] | None = None,
        class_label: str | Sequence[str | None] | None = None,
        numbers: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        condition: Image.Image | Sequence[Image.Image] | None = None,
        classifier: NoisyClassifier | None = None,
        classifier_scale: float = 1.0,
        weak_unet: Any = None,
        weaker: str | PathLike[str] | None = None,
        autoguidance_scale: float | None = None,
        dynamic_thresholding: float | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        expand: Sequence[int] | None = None,
        upscale: bool = False,
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Generate pictures, or change some.

        The arguments before `seed` are those of StableDiffusionPipeline, in its order and with its meaning. A call that
        names neither steps nor guidance takes the model's `defaults`, as a set, or its student's (`ldm.pipelines
        .student`); else what it leaves out is as in stock diffusers (50 steps, guidance scale 7.5, no interval).

        Args:
            prompt: one prompt, or a list; for a model with text.
            height, width: in pixels; by default the size the model was trained at, or that of `image`, rounded down to
                multiples of the VAE's factor.
            num_inference_steps: sampling steps, from 1 to the number of timesteps of the training.
            timesteps, sigmas: the steps themselves, for schedulers that take them.
            guidance_scale: of classifier-free guidance (Ho & Salimans 2022); up to 1 is off. A distilled model takes it
                as an input, at no cost.
            negative_prompt: what guidance moves away from; one for all prompts, or one each.
            num_images_per_prompt: pictures of each prompt; they follow each other in the result.
            eta: of DDIM, from 0 (no noise) to 1.
            generator: one per picture, or a single one: picture 0 takes it, and picture i starts from its seed + i.
            latents: the noise to start from, or to put on `image`: float [B,C,h,w], before the scheduler scales it.
            prompt_embeds, negative_prompt_embeds: context [B,L,D] in place of prompts.
            output_type: pil, np [B,H,W,3] in [0,1], pt [B,3,H,W] in [0,1], or latent [B,C,h,w].
            guidance_rescale: restores the deviation that guidance changes (Lin et al. 2024); from 0 (off) to 1.
            clip_skip: layers of a CLIP to skip.
            callback_on_step_end: as in stock pipelines; with `upscale` the upscaler's steps follow, numbered on, with
                their latents to read.
            seed: instead of a generator: one per picture, or one for all (picture i starts from seed + i).
            sampler: one of `ldm.inference.defaults.SAMPLERS`; by default the pipeline's scheduler.
            guidance_interval: (low, high), fractions of the T timesteps: guidance where low <= t / T < high, the
                conditional model, at half the cost, elsewhere (Kynkäänniemi et al. 2024).
            class_label: one of `labels.names` for all, or one each; None is no class in particular. With a classifier,
                the class that it guides towards, whether the model itself knows classes or not.
            numbers: {"size": 0.3}, a number for each column that the model is conditioned on, for all or one each; None
                is no numbers.
            condition: the second picture, for all or one each, for a model that takes one.
            classifier: of noisy latents, trained with the model's config by `ldm train classifier`; guides every step
                (Dhariwal & Nichol 2021), beside classifier-free guidance or without it.
            classifier_scale: of that guidance; 0 is off.
            weak_unet: a weaker U-Net of the same shape, such as an early checkpoint's: `guidance_scale` then moves away
                from its prediction (autoguidance, Karras et al. 2024) instead of the negative prompt's.
            weaker: the folder of such a model, whose latents, texts and classes must be this model's; checked once.
            autoguidance_scale: of autoguidance, in place of guidance_scale; 1 is off, 2 the default with `weaker`.
            dynamic_thresholding: the quantile of |x0| that is brought to 1 at each step (Saharia et al. 2022), above 0,
                up to 1; for schedulers that have it. Made for pixels in [-1, 1]: larger latents shrink.
            image: the picture to change, for all or one each: PIL, of any mode; an array [H,W,3] or [B,H,W,3], a tensor
                [3,H,W] or [B,3,H,W], uint8 or in [0,1]; or latents [B,C,h,w].
            mask_image: where it is to be new (white); elsewhere the result has the picture's own pixels, to the bit in
                8 bits, or its own latents. Of the picture's size; a PIL picture, an array or tensor [H,W], or one each.
            strength: how much of `image` is noised away, above 0, up to 1; that part of the steps is taken. By default
                0.8, and 1 with mask_image or expand, as in stock.
            expand: pixels to add to `image` (left, top, right, bottom), multiples of the VAE's factor.
            upscale: hand the pictures on to the pipeline's `upscaler`, with their prompts. The method `upscale` has
                its settings.
        Returns:
            `.images`, a list of PIL pictures or an array, by `output_type`.
        Raises:
            ValueError: names the argument and what it allows.
            TypeError: for an unknown argument, which stock pipelines ignore.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "unknown")}
        check_known(unknown, set(given))
        if (maker := self.maker_of(given)) is not self:
            return maker(**given)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        check_weaker(weaker, weak_unet, autoguidance_scale, guidance_scale, negative_prompt)
        if weaker is not None or autoguidance_scale is not None:
            guidance_scale = AUTOGUIDANCE_SCALE if autoguidance_scale is None else autoguidance_scale
        steps = len(timesteps or sigmas or ()) or num_inference_steps
        settings = self.defaults.resolve(steps, guidance_scale, guidance_interval)
        self._check_distilled(settings.guidance_interval, weak_unet, weaker)
        upscaler = self.upscaler if upscale else None
        if upscaler is not None and output_type == "latent":
            raise ValueError(
                "output_type: an upscaler takes pictures, not latents; expected pil, np or pt with upscale"
            )
        edit = check_edit(
            self, image, mask_image, strength, expand, height, width, steps or settings.num_inference_steps
        )
        if edit is None:
            height, width = self.edge("height", height), self.edge("width", width)
        else:
            height, width = edit.height, edit.width
        inputs = check_inputs(
            self, height, width, prompt=prompt, negative_prompt=negative_prompt, class_label=class_label,
            numbers=numbers, condition=condition, classifier=classifier, classifier_scale=classifier_scale, seed=seed,
            num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
            num_images_per_prompt=num_images_per_prompt, generator=generator, latents=latents, eta=eta,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, timesteps=timesteps,
            sigmas=sigmas, ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds,
            output_type=output_type, cross_attention_kwargs=cross_attention_kwargs, clip_skip=clip_skip,
            guidance_rescale=guidance_rescale, callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            sources=1 if edit is None else len(edit.source),
        )  # fmt: skip
        guided = settings.guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        if not guided and (inputs.negatives or negative_prompt_embeds is not None):
            self._warn_of_no_effect(settings.guidance_scale)
        if upscaler is not None:
            upscaler.check_generated(height, width, inputs.prompts)
        if sampler is not None:
            check_sampler("sampler", sampler)
        scheduler = self.scheduler if sampler is None else samplers.build(sampler, self.scheduler.config)
        if dynamic_thresholding is not None:
            scheduler = samplers.thresholding(scheduler, dynamic_thresholding)
        if weaker is not None:
            weak_unet = self.weaker_unet(weaker)
        if classifier is not None:
            classifier.check_process(scheduler)

        # what stock callbacks and properties read
        contrast = bool(inputs.prompts or inputs.class_inputs or prompt_embeds is not None or weak_unet is not None)
        self._guidance_scale = settings.guidance_scale if contrast else 1.0
        self._guidance_rescale, self._clip_skip = guidance_rescale, clip_skip
        self._cross_attention_kwargs, self._interrupt = cross_attention_kwargs, False

        # prompts, classes, second pictures => conditions of the denoiser
        device = self._execution_device
        positive, negative = self._conditions(
            inputs, num_images_per_prompt, device, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds, clip_skip=clip_skip,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )  # fmt: skip
        dtype = self.unet.dtype if positive.context is None else positive.context.dtype
        stock = self._unet_arguments(inputs.images, device, dtype)

        # noise, and the levels that it goes through
        timestep_list, count = retrieve_timesteps(scheduler, settings.num_inference_steps, device, timesteps, sigmas)
        clean = None
        generators: Sequence[torch.Generator | None] = inputs.generators or [None] * inputs.images
        if edit is not None:
            timestep_list, count = edit.timesteps(scheduler, timestep_list, count)
            if not (self.inpaints and edit.strength == 1):  # there nothing of the picture is to be seen
                clean = edit.latents(self.vae, generators, device).to(dtype)
        self._num_timesteps = len(timestep_list)
        if latents is None:
            edges = (edge // self.vae_scale_factor for edge in (height, width))
            shape = (inputs.images, self.unet.config.out_channels, *edges)
            latents = randn_tensor(shape, generator=inputs.generators, device=device, dtype=dtype)
        noise = latents.to(device)
        x, put_back = noise * scheduler.init_noise_sigma, None  # x_T
        if edit is not None and clean is not None:
            keep = not self.inpaints
            x, put_back = edit.start(clean, noise, scheduler, timestep_list, self.vae, generators, keep=keep)  # x_t
        if edit is not None and self.inpaints:
            channels = edit.channels(self.vae, generators, device, dtype)
            positive, negative = replace(positive, channels=channels), replace(negative, channels=channels)

        conditions = {POSITIVE: positive, NEGATIVE: negative}
        compute = self.unet if self.engine is None else self.engine.unet(self)
        denoiser = UNetDenoiser(compute, conditions, **stock)
        guidance = Guidance(
            self.scheduler.config.num_train_timesteps,
            self._guidance_scale if self.do_classifier_free_guidance else 1.0,
            settings.guidance_interval,
            guidance_rescale,
            _towards(classifier, inputs, num_images_per_prompt, classifier_scale, scheduler, device),
            None if weak_unet is None else UNetDenoiser(weak_unet, conditions, **stock),
        )
        accepted = inspect.signature(scheduler.step).parameters
        chance = {"eta": eta, "generator": inputs.generators}
        with self.progress_bar(total=count) as bar:

            def on_step(i: int, t: Tensor, x: Tensor) -> Tensor | None:
                if put_back is not None:
                    x = put_back(x, i)
                if callback_on_step_end is not None:
                    x = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, x, denoiser)
                    guidance.scale = self._guidance_scale if self.do_classifier_free_guidance else 1.0
                if i == len(timestep_list) - 1 or (i + 1) % scheduler.order == 0:
                    bar.update()
                return None if self.interrupt else x

            x = sample(
                denoiser, x, scheduler, timestep_list, guidance=guidance, on_step=on_step,
                **{name: value for name, value in chance.items() if name in accepted},
            )  # fmt: skip

        images: Any = x
        if output_type != "latent":
            compute = None if self.engine is None else self.engine.decoder(self)
            images = decode(self.vae, x, inputs.generators, compute)
            images = images if edit is None else edit.composite(images)
        images, flagged = self._checked(images, "pil" if upscaler else output_type, device, dtype)
        self.maybe_free_model_hooks()
        if upscaler is not None:
            texts = [text for text in inputs.prompts for _ in range(num_images_per_prompt)] or None
            further: dict[str, Any] = {}
            if callback_on_step_end is not None:
                later = itertools.count(self._num_timesteps)
                asked = {"latents"}.intersection(callback_on_step_end_tensor_inputs)
                further["callback"] = lambda _, t, x: callback_on_step_end(
                    self, next(later), t, dict.fromkeys(asked, x)
                )
            images = upscaler.upscale(
                images, texts, generator=inputs.generators, output_type=output_type, **further
            ).images
        if not return_dict:
            return images, flagged
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flagged)

    def _unet_arguments(self, images: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What else a stock U-Net is given: attention arguments; the guidance scale of a distilled one."""
        given: dict[str, Any] = {}
        if self._cross_attention_kwargs is not None:
            given["cross_attention_kwargs"] = self._cross_attention_kwargs
        if self.unet.config.time_cond_proj_dim is not None:
            scales = torch.tensor(self._guidance_scale - 1).repeat(images)
            embedded = self.get_guidance_scale_embedding(scales, embedding_dim=self.unet.config.time_cond_proj_dim)
            given["timestep_cond"] = embedded.to(device=device, dtype=dtype)
        return given

    def weaker_unet(self, weaker: str | PathLike[str]) -> Any:
        """The U-Net of a weaker model's folder, on this pipeline's device; the last one is kept."""
        key = str(weaker), self.unet.dtype, weights_state(self.unet)
        if self._weaker is None or self._weaker[0] != key:
            self._weaker = (key, load_weaker(self, weaker))
        return self._weaker[1].to(self._execution_device)

    def _warn_of_no_effect(self, scale: float) -> None:
        """Say that a negative prompt is ignored, as in stock diffusers."""
        if self.unet.config.time_cond_proj_dim is not None:
            cause = "since the model is distilled: its guidance evaluates no second prompt; leave it out"
        elif isinstance(self.defaults, StudentDefaults):
            cause = f"since the student was trained for guidance scale {scale:g}; ask the model that it belongs to"
        else:
            cause = f"since there is no guidance at guidance scale {scale:g}; give a guidance_scale above 1"
        warnings.warn(f"negative_prompt: it has no effect {cause}", stacklevel=4)

    def _check_distilled(self, interval: tuple[float, float], weak_unet: Any, weaker: Any) -> None:
        """Raise a ValueError for guidance that a U-Net with the scale as an input can't have: stock ignores it."""
        if self.unet.config.time_cond_proj_dim is None:
            return
        given = {"guidance_interval": interval != EVERYWHERE, "weak_unet": weak_unet is not None}
        for name, wrong in {**given, "weaker": weaker is not None}.items():
            if wrong:
                raise ValueError(f"{name}: the model is distilled, guided by guidance_scale alone; leave {name} out")

    def _call_back(
        self,
        callback: Callable[..., dict[str, Any]],
        names: Sequence[str],
        i: int,
        t: Tensor,
        x: Tensor,
        denoiser: UNetDenoiser,
    ) -> Tensor:
        """Call a stock callback with the tensors that stock's loop has, and take over what it changed."""
        positive, negative = denoiser.conditions[POSITIVE], denoiser.conditions[NEGATIVE]
        tensors = {"latents": x, "negative_prompt_embeds": negative.context, "prompt_embeds": positive.context}
        if "prompt_embeds" in names and positive.context is not None and negative.context is not None:
            tensors["prompt_embeds"] = torch.cat([negative.context, positive.context])
        both = tensors["prompt_embeds"]
        answer = callback(self, i, t, {name: tensors[name] for name in names})
        changed = answer.pop("prompt_embeds", both)
        if changed is not both:
            halves = changed.chunk(2) if self.do_classifier_free_guidance else (None, changed)
            denoiser.replace(
                **{
                    POSITIVE: Conditioning(halves[1], positive.class_labels, positive.channels),
                    NEGATIVE: Conditioning(halves[0], negative.class_labels, negative.channels),
                }
            )
        latents: Tensor = answer.pop("latents", x)
        return latents

    def _checked(self, images: Any, output_type: str, device: Any, dtype: Any) -> tuple[Any, Any]:
        """Pixels or latents => the form that was asked for, past the safety checker if the pipeline has one."""
        flagged = None
        if output_type != "latent":
            images, flagged = self.run_safety_checker(images, device, dtype)
        fine = [True] * len(images) if flagged is None else [not flag for flag in flagged]
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=fine), flagged

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        license: str,
        data: str,
        data_license: str,
        evaluation: str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload what `ldm push` does: weights, their fp16 variant and a model card; returns the address.

        Args:
            repo_id: user/name; it is created if it doesn't exist.
            license, data, data_license: of the weights; what they were trained on, and under which license.
            evaluation: a folder that `ldm evaluate` wrote of this very model, for the card's metrics.
            **kwargs: private, token, commit_message, create_pr.
        Raises:
            ValueError: if the pipeline isn't in float32, or the evaluation is another model's.
        """
        from ldm.sharing import hub  # evaluation, templates: not needed to generate
        from ldm.sharing.model_card import Terms

        terms = Terms(license, data, data_license)
        return hub.push(self, repo_id, terms, evaluation=Path(evaluation) if evaluation else None, **kwargs)

    def to_best_device(self) -> Self:
        """The same pipeline on CUDA or Apple's GPU, where there is one."""
        return self.to(best_device())  # type: ignore[no-any-return]

    def enable_openvino(self) -> Self:
        """Compute U-Net and VAE decoder with OpenVINO from now on, on the CPU: faster, and the same but for rounding.

        Converting a model takes some seconds, once on a machine (`ldm.inference.openvino_cache`). Saved files stay as
        they were.

        Raises:
            ModuleNotFoundError: if it isn't installed: pip install openvino.
            ValueError: for what it can't compute: another device than the CPU, float16, active adapters, FreeU.
        """
        engine = OpenVINO()
        engine.prepare(self)
        self.engine = engine
        return self

    def disable_openvino(self) -> Self:
        """Compute everything with torch again."""
        self.engine = None
        return self

    def edge(self, name: str, pixels: int | None = None) -> int:
        """The height or width to generate: `pixels` if the networks can, by default what they were trained at."""
        if pixels is None:
            size = self.unet.config.sample_size
            return int((size if isinstance(size, int) else size[0 if name == "height" else 1]) * self.vae_scale_factor)
        step = math.lcm(8, self.vae_scale_factor)  # stock pipelines require eights
        smallest = -(-self.least_edge // step) * step
        if not isinstance(pixels, Integral) or pixels % step or not smallest <= pixels <= MAX_EDGE:
            raise ValueError(f"{name}: expected a multiple of {step} from {smallest} to {MAX_EDGE}, got {pixels!r}")
        return int(pixels)

    def check_edges(self, name: str, height: int, width: int) -> None:
        """Raise a ValueError unless the networks can generate this size, which a picture has."""
        if not all(self.least_edge <= pixels <= MAX_EDGE for pixels in (height, width)):
            raise ValueError(
                f"{name}: expected edges from {self.least_edge} to {MAX_EDGE} pixels, got {width} x {height}"
            )

    @property
    def least_edge(self) -> int:
        """Pixels along an edge that leave one value at the U-Net's deepest level."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))


def _towards(
    classifier: NoisyClassifier | None, inputs: Inputs, copies: int, scale: float, scheduler: Any, device: torch.device
) -> ClassifierGuidance | None:
    """Guidance towards each picture's class; None without a classifier, or at scale 0."""
    if classifier is None or not scale:
        return None
    classifier = classifier.to(device)
    ids = torch.tensor(inputs.targets, device=device).repeat_interleave(copies)
    prediction = prediction_from_config(scheduler.config)
    return ClassifierGuidance(prediction, classifier.schedule, class_log_prob(classifier, ids), scale)


def _enter_auto_pipelines() -> None:
    """Enter LDMPipeline into the tables in which AutoPipelineForImage2Image.from_pipe and its siblings search by class.

    Only once their module is loaded: it imports every pipeline of diffusers, a seventh of the time to a first picture.
    """
    tables = sys.modules.get("diffusers.pipelines.auto_pipeline")
    if tables is None or "ldm" in tables.AUTO_TEXT2IMAGE_PIPELINES_MAPPING:
        return
    tables.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["ldm"] = tables.StableDiffusionImg2ImgPipeline
    tables.AUTO_INPAINT_PIPELINES_MAPPING["ldm"] = tables.StableDiffusionInpaintPipeline
    tables.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["ldm"] = LDMPipeline
