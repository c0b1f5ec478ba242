"""LDMPipeline: prompts in, pictures out.

It *is* diffusers' StableDiffusionPipeline, from which it inherits the sampling, `push_to_hub`, devices and
dtypes. It adds what a person needs who isn't reading the source: arguments are checked before any network
runs, and a picture depends on its own seed, not on the batch it is drawn in. And it draws what stock pipelines
have no arguments for: a class, or a picture made of another one. What it saves names a stock pipeline in
model_index.json, so it opens without this package.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel

from ldm.data.labels import Labels
from ldm.inference.decoding import GuidanceInterval, NullContext, decoded_in_slices, text_kept
from ldm.inference.defaults import EVERYWHERE, Defaults, check_interval
from ldm.inference.openvino import OpenVINO, drawn_by
from ldm.inference.steering import ClassifierSteering, steered
from ldm.models.classifier import NoisyClassifier
from ldm.models.conditioning import Conditioning, tell
from ldm.models.loading import load_networks, loading
from ldm.models.safety import check_model_folder, read_json
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import encode
from ldm.pipelines.inputs import (
    check_known,
    check_number,
    known_classes,
    known_conditions,
    known_texts,
    one_each,
    one_generator_each,
)
from ldm.pipelines.loading import check_options, find_pipeline, forget_calls, forget_loading, read_prompts
from ldm.system.devices import best_device

STOCK_ARGUMENTS = frozenset(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "kwargs"}
# beside model_index.json; stock diffusers doesn't look at them
PROMPTS_FILE, LABELS_FILE = "prompts.txt", "labels.json"
MAX_EDGE = 4096
MAX_PER_PROMPT = 1024


class LDMPipeline(StableDiffusionPipeline):
    """A text-to-image pipeline.

    >>> pipe = LDMPipeline.from_pretrained("runs/demo/pipeline")
    >>> pipe("red heart", seed=7).images[0].save("heart.png")

    Attributes:
        example_prompts: what the model is known to draw, for those who don't know what to ask; may be empty.
        labels: the classes it can be asked for, None if it knows none.
        defaults: the steps and the guidance, its scale and interval, that a call which names none is drawn with.
        engine: what computes U-Net and VAE decoder; None is torch.
    """

    example_prompts: tuple[str, ...] = ()
    labels: Labels | None = None
    defaults: Defaults = Defaults()
    engine: OpenVINO | None = None

    @classmethod
    def from_components(
        cls,
        vae: Any,
        text: TextEncoder | None,
        unet: Any,
        scheduler_config: dict[str, Any],
    ) -> LDMPipeline:
        """Put trained parts together; `scheduler_config` comes from `ldm.diffusion.schedule.scheduler_config`."""
        return cls(
            vae=vae,
            text_encoder=text.model if text else None,
            tokenizer=text.tokenizer if text else None,
            unet=unet,
            # stock pipelines insist on an offset of 1, which "trailing" timesteps don't use
            scheduler=DPMSolverMultistepScheduler.from_config({**scheduler_config, "steps_offset": 1}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> LDMPipeline:
        """Load a pipeline folder or a Hub id.

        Raises:
            FileNotFoundError: if a name that looks like a folder isn't a pipeline's.
            ValueError: for use_safetensors=False, since the other format, pickle, can run code; for an argument that
                asks for a stranger's code; for a folder that holds more than data (`ldm.models.safety`), or weights
                of other networks than its configs'.
            OSError: if there is no such Hub id, or its weights aren't safetensors.
        """
        check_options(kwargs)
        folder = find_pipeline(pretrained_model_name_or_path, **kwargs)
        check_model_folder(folder)
        index = read_json(folder / "model_index.json")
        for part in ("text_encoder", "tokenizer"):
            if index.get(part) == [None, None]:
                kwargs.setdefault(part, None)  # diffusers wants to be told that a model knows no text
        wanted = {name: value for name, value in index.items() if name not in kwargs}
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        kwargs |= load_networks(folder, wanted, kwargs.get("variant"), dtype)
        with loading(folder):
            pipeline: LDMPipeline = super().from_pretrained(str(folder), **{**kwargs, "local_files_only": True})
        pipeline.example_prompts = read_prompts(folder / PROMPTS_FILE)
        if (folder / LABELS_FILE).exists():
            pipeline.labels = Labels.load(folder / LABELS_FILE)
        pipeline.defaults = Defaults.load(folder)
        return pipeline

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        """The component types that loading accepts without a warning: diffusers' own list knows no encoder but CLIP."""
        return {**super()._get_signature_types(), "text_encoder": (PreTrainedModel,), "vae": (ModelMixin,)}

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save a folder that stock diffusers opens, with safetensors weights."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub: save first, then call pipe.push_to_hub('user/name', license=…)")
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization: expected True; pickles can run any code")
        forget_calls(self.tokenizer)
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        self._make_stock(Path(save_directory))

    def save_without_networks(self, folder: Path) -> None:
        """Save all of a pipeline's folder but the networks' own folders, which are saved before it.

        So networks can be saved one after the other, and large ones needn't be in memory together.
        """
        forget_calls(self.tokenizer)
        for name in ("scheduler", "tokenizer"):
            part = getattr(self, name)
            if part is not None:
                part.save_pretrained(folder / name)
        self.save_config(folder)
        self._make_stock(folder)

    def _make_stock(self, folder: Path) -> None:
        """Let a saved folder say the stock pipeline's class and not where it came from; add what stock doesn't know."""
        forget_loading(folder)
        index = folder / "model_index.json"
        stock = "StableDiffusionInstructPix2PixPipeline" if self.condition_channels else "StableDiffusionPipeline"
        content = {**json.loads(index.read_text("utf-8")), "_class_name": stock}
        index.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if self.example_prompts:
            (folder / PROMPTS_FILE).write_text("\n".join(self.example_prompts) + "\n", "utf-8")
        if self.labels:
            self.labels.save(folder / LABELS_FILE)
        if self.defaults != Defaults():
            self.defaults.save(folder)

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
            repo_id: user/name; it is made if it isn't there.
            license, data, data_license: of the weights; what they were trained on, and under which license.
            evaluation: a folder that `ldm evaluate` wrote of this very model, for the card's figures.
            **kwargs: private, token, commit_message, create_pr.
        Raises:
            ValueError: if the pipeline isn't in float32, or the evaluation is another model's.
        """
        from ldm.sharing import hub
        from ldm.sharing.model_card import Terms

        terms = Terms(license, data, data_license)
        return hub.push(self, repo_id, terms, evaluation=Path(evaluation) if evaluation else None, **kwargs)

    @property
    def condition_channels(self) -> int:
        """Channels of the latents of a second picture, which follow those of x_t; 0 if the model takes none."""
        return int(self.unet.config.in_channels - self.unet.config.out_channels)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        seed: int | Sequence[int] | None = None,
        class_label: str | Sequence[str | None] | None = None,
        condition: Image.Image | Sequence[Image.Image] | None = None,
        classifier: NoisyClassifier | None = None,
        classifier_scale: float = 1.0,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Draw pictures.

        Args:
            prompt: one prompt, or a list; for a model that knows text.
            height, width: in pixels; by default the size the model was trained at.
            num_inference_steps: evaluations of the U-Net, from 1 to the number of timesteps it was trained on; by
                default the pipeline's `defaults`.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022); up to 1 is off; by default the pipeline's.
            guidance_interval: (low, high), fractions of the T timesteps: guidance where low <= t / T < high, the
                conditional model, at half the cost, where not (Kynkäänniemi et al. 2024); (0, 1) is everywhere; by
                default the pipeline's.
            negative_prompt: what guidance steers away from; one for all prompts, or one each.
            num_images_per_prompt: pictures per prompt; they follow each other in the answer.
            generator: one per picture, or a single one: it draws the first picture, and picture i starts from
                its seed + i.
            seed: instead of a generator: one per picture, or one for all (picture i starts from seed + i).
            class_label: one of `labels.names` for all, or one each; None is no class in particular. With a classifier,
                the class that it steers towards, whether the model itself knows classes or not.
            condition: the picture to make a picture of, for all or one each, for a model that takes one.
            classifier: of noisy latents, trained with the model's config by train/train_classifier.py; steers every
                step (Dhariwal & Nichol 2021), beside classifier-free guidance or without it.
            classifier_scale: how strongly it does; 0 is off.
            **kwargs: everything else that StableDiffusionPipeline takes.
        Returns:
            `.images`, a list of PIL pictures (or an array with output_type="np").
        Raises:
            ValueError: names the argument and what it allows.
            TypeError: for an argument that there is not; stock pipelines ignore a misspelled one.
        """
        check_known(kwargs, STOCK_ARGUMENTS)
        if num_inference_steps is None:
            num_inference_steps = self.defaults.num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.defaults.guidance_scale
        if guidance_interval is None:
            guidance_interval = self.defaults.guidance_interval
        T = self.scheduler.config.num_train_timesteps
        check_number("num_inference_steps", num_inference_steps, 1, T, Integral)
        check_number("num_images_per_prompt", num_images_per_prompt, 1, MAX_PER_PROMPT, Integral)
        check_number("guidance_scale", guidance_scale, 0, 100)
        interval = check_interval("guidance_interval", guidance_interval)
        check_number("classifier_scale", classifier_scale, 0, 100)
        for name in {"eta", "guidance_rescale"} & kwargs.keys():
            check_number(name, kwargs[name], 0, 1)
        height, width = self.edge("height", height), self.edge("width", width)

        embeds = kwargs.get("prompt_embeds")
        prompts = known_texts("prompt", prompt, self.tokenizer) if embeds is None else []
        negatives = [] if negative_prompt is None else known_texts("negative_prompt", negative_prompt, self.tokenizer)
        names: list[Any] = list(class_label) if isinstance(class_label, list | tuple) else [class_label]
        goals = [classifier.class_id(name) for name in names] if classifier is not None else []
        ids = known_classes(names if self.labels is not None or not goals else [None], self.labels)
        pixels = known_conditions(condition, self.condition_channels, height, width)
        asked = max(1 if embeds is None else len(embeds), len(prompts), len(ids), len(goals), len(pixels))
        if prompts:
            kwargs["prompt"] = one_each("prompt", prompts, asked)
        elif embeds is None:  # stock pipelines want a context even where nobody looks at it
            kwargs |= {"prompt_embeds": torch.zeros(asked, 1, 1), "negative_prompt_embeds": torch.zeros(asked, 1, 1)}
        if negatives:
            kwargs["negative_prompt"] = one_each("negative_prompt", negatives, asked)
        pictures = asked * num_images_per_prompt
        generators = one_generator_each(generator, seed, pictures)

        conditioning = Conditioning()
        if ids:
            each = torch.tensor(one_each("class_label", ids, asked), device=self.device)
            conditioning = replace(conditioning, class_labels=each.repeat_interleave(num_images_per_prompt))
        if pixels:
            each = torch.stack(one_each("condition", pixels, asked))
            channels = encode(self.vae, each.to(self.device)).mean.repeat_interleave(num_images_per_prompt, 0)
            conditioning = replace(conditioning, channels=channels)
            # as many channels as the answer has, which isn't what stock pipelines count
            kwargs.setdefault("latents", randn_tensor(channels.shape, generators, self.device, self.unet.dtype))
        knows_conditions = self.tokenizer is not None or self.labels is not None
        before, after = [tell(self.unet, conditioning)], []
        if interval != EVERYWHERE:
            guidance = GuidanceInterval(pictures, T, interval)
            before, after = [*before, guidance.before], [guidance.after]
        if classifier is not None:
            each = torch.tensor(one_each("class_label", goals, asked)).repeat_interleave(num_images_per_prompt)
            steering = ClassifierSteering.of(classifier.to(self.device), each, classifier_scale, self.scheduler)
            after += [steering] if classifier_scale else []
        with (
            drawn_by(self.engine, self),
            steered(self.unet, before=before, after=after),
            text_kept(self.unet),
            decoded_in_slices(self.vae, pictures, height, width),
        ):
            return super().__call__(
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale if knows_conditions else 1.0,  # else there is nothing to steer towards
                num_images_per_prompt=num_images_per_prompt,
                generator=generators,
                **kwargs,
            )

    def encode_prompt(self, prompt: Any, device: Any, *arguments: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As the stock pipeline's, with the same answer; the null context is kept from one call to the next."""
        stock = super().encode_prompt
        told = inspect.signature(stock).bind(prompt, device, *arguments, **kwargs).arguments
        others = ("negative_prompt", "negative_prompt_embeds", "lora_scale")
        if (
            prompt is not None
            and told["do_classifier_free_guidance"]
            and all(told.get(each) is None for each in others)
        ):
            empty = [""] * (1 if isinstance(prompt, str) else len(prompt))
            told["negative_prompt_embeds"] = self._null_context.of(
                self.text_encoder, self.tokenizer, len(empty), lambda: stock(empty, device, 1, False)[0]
            )
        return stock(**told)

    @cached_property
    def _null_context(self) -> NullContext:
        return NullContext()

    def to_best_device(self) -> LDMPipeline:
        """The same pipeline on CUDA or Apple's GPU, where there is one."""
        return self.to(best_device())  # type: ignore[no-any-return]

    def enable_openvino(self) -> LDMPipeline:
        """Let OpenVINO compute U-Net and VAE decoder from now on, on the CPU: faster, and the same but for rounding.

        The first time for a model takes some seconds, which is said (`openvino_cache`). Saved files stay as they were.

        Raises:
            ModuleNotFoundError: if it isn't installed: pip install openvino.
            ValueError: if it can't draw with this pipeline: another device than the CPU, float16.
        """
        engine = OpenVINO()
        engine.prepare(self)
        self.engine = engine
        return self

    def disable_openvino(self) -> LDMPipeline:
        """Let torch compute everything again."""
        self.engine = None
        return self

    def edge(self, name: str, pixels: int | None = None) -> int:
        """The height or width to draw: `pixels` if the networks can draw them, by default what they were trained at."""
        if pixels is None:
            size = self.unet.config.sample_size
            return int((size if isinstance(size, int) else size[0 if name == "height" else 1]) * self.vae_scale_factor)
        step = math.lcm(8, self.vae_scale_factor)  # stock pipelines want eights
        deepest = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        smallest = -(-deepest // step) * step
        if not isinstance(pixels, Integral) or pixels % step or not smallest <= pixels <= MAX_EDGE:
            raise ValueError(f"{name}: expected a multiple of {step} from {smallest} to {MAX_EDGE}, got {pixels!r}")
        return int(pixels)
