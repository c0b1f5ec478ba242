"""LDMPipeline: prompts in, pictures out.

It *is* diffusers' StableDiffusionPipeline, from which it inherits the sampling, `push_to_hub`, devices and
dtypes. It adds what a person needs who isn't reading the source: arguments are checked before any network
runs, and a picture depends on its own seed, not on the batch it is drawn in. What it saves says
`StableDiffusionPipeline` in model_index.json, so it opens without this package.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from transformers import PreTrainedModel

from ldm.defaults import Defaults
from ldm.models.text import TextEncoder

STOCK_ARGUMENTS = frozenset(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "kwargs"}
PROMPTS_FILE = "prompts.txt"  # beside model_index.json; stock diffusers doesn't look at it
MAX_EDGE = 4096
MAX_PER_PROMPT = 1024


class LDMPipeline(StableDiffusionPipeline):
    """A text-to-image pipeline.

    >>> pipe = LDMPipeline.from_pretrained("runs/demo/pipeline")
    >>> pipe("red heart", seed=7).images[0].save("heart.png")

    Attributes:
        example_prompts: what the model is known to draw, for those who don't know what to ask; may be empty.
        defaults: the steps and the guidance scale that a call which names none is drawn with.
    """

    example_prompts: tuple[str, ...] = ()
    defaults: Defaults = Defaults()

    @classmethod
    def from_components(
        cls,
        vae: Any,
        text: TextEncoder,
        unet: Any,
        scheduler_config: dict[str, Any],
        example_prompts: Sequence[str] = (),
    ) -> LDMPipeline:
        """Put trained parts together; `scheduler_config` comes from `ldm.diffusion.schedule.scheduler_config`."""
        pipeline = cls(
            vae=vae,
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            unet=unet,
            # stock pipelines insist on an offset of 1, which "trailing" timesteps don't use
            scheduler=DPMSolverMultistepScheduler.from_config({**scheduler_config, "steps_offset": 1}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.example_prompts = tuple(example_prompts)
        return pipeline

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> LDMPipeline:
        """Load a pipeline folder or a Hub id.

        Raises:
            FileNotFoundError: if a name that looks like a folder isn't a pipeline's.
            ValueError: for use_safetensors=False; the other format, pickle, can run code.
            OSError: if there is no such Hub id, or its weights aren't safetensors.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors: expected True; other weights are pickles, which can run any code")
        folder = Path(pretrained_model_name_or_path).expanduser()
        is_hub_id = len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists()
        if not is_hub_id and not (folder / "model_index.json").exists():
            hint = f"; did you mean {folder / 'pipeline'}?" if (folder / "pipeline/model_index.json").exists() else ""
            raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no model_index.json{hint}")
        pipeline: LDMPipeline = super().from_pretrained(str(folder), **kwargs)
        if (folder / PROMPTS_FILE).exists():
            pipeline.example_prompts = tuple((folder / PROMPTS_FILE).read_text("utf-8").splitlines())
        pipeline.defaults = Defaults.load(folder)
        return pipeline

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        """The component types that loading accepts without a warning: diffusers' own list knows no encoder but CLIP."""
        return {**super()._get_signature_types(), "text_encoder": (PreTrainedModel,), "vae": (ModelMixin,)}

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save a folder that stock diffusers opens, with safetensors weights."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub: save first, then call pipe.push_to_hub('user/name')")
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization: expected True; pickles can run any code")
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        index = Path(save_directory) / "model_index.json"
        content = {**json.loads(index.read_text("utf-8")), "_class_name": "StableDiffusionPipeline"}
        index.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if self.example_prompts:
            (index.parent / PROMPTS_FILE).write_text("\n".join(self.example_prompts) + "\n", "utf-8")
        if self.defaults != Defaults():
            self.defaults.save(index.parent)

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
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Draw pictures.

        Args:
            prompt: one prompt, or a list.
            height, width: in pixels; by default the size the model was trained at.
            num_inference_steps: evaluations of the U-Net, from 1 to the number of timesteps it was trained on; by
                default the pipeline's `defaults`.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022); up to 1 is off; by default the pipeline's.
            negative_prompt: what guidance steers away from; one for all prompts, or one each.
            num_images_per_prompt: pictures per prompt; they follow each other in the answer.
            generator: one per picture, or a single one: it draws the first picture, and picture i starts from
                its seed + i.
            seed: instead of a generator: one per picture, or one for all (picture i starts from seed + i).
            **kwargs: everything else that StableDiffusionPipeline takes.
        Returns:
            `.images`, a list of PIL pictures (or an array with output_type="np").
        Raises:
            ValueError: names the argument and what it allows.
            TypeError: for an argument that there is not; stock pipelines ignore a misspelled one.
        """
        if unknown := sorted(kwargs.keys() - STOCK_ARGUMENTS):
            raise TypeError(
                f"{unknown[0]}: there is no such argument; expected some of {', '.join(sorted(STOCK_ARGUMENTS))}"
            )
        if (embeds := kwargs.get("prompt_embeds")) is None:
            prompt = check_prompts("prompt", prompt, self.tokenizer)
            if negative_prompt is not None:
                negatives = check_prompts("negative_prompt", negative_prompt, self.tokenizer)
                if len(negatives) not in (1, len(prompt)):
                    raise ValueError(
                        f"negative_prompt: expected 1 or {len(prompt)}, one per prompt, got {len(negatives)}"
                    )
                negative_prompt = negatives * len(prompt) if len(negatives) == 1 else negatives
        if num_inference_steps is None:
            num_inference_steps = self.defaults.num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.defaults.guidance_scale
        most = self.scheduler.config.num_train_timesteps
        check_number("num_inference_steps", num_inference_steps, 1, most, Integral)
        check_number("num_images_per_prompt", num_images_per_prompt, 1, MAX_PER_PROMPT, Integral)
        check_number("guidance_scale", guidance_scale, 0, 100)
        for name in {"eta", "guidance_rescale"} & kwargs.keys():
            check_number(name, kwargs[name], 0, 1)
        prompts = len(embeds) if embeds is not None else len(prompt or ())
        return super().__call__(
            prompt=prompt,
            height=self.edge("height", height),
            width=self.edge("width", width),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=one_generator_each(generator, seed, prompts * num_images_per_prompt),
            **kwargs,
        )

    def to_best_device(self) -> LDMPipeline:
        """The same pipeline on CUDA or Apple's GPU, where there is one."""
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return self.to(best)  # type: ignore[no-any-return]

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


def check_prompts(name: str, prompts: Any, tokenizer: Any) -> list[str]:
    """A text or a list of texts, none of which the tokenizer has to cut => a list of them."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"{name}: expected a text or a list of texts, got {type(prompts).__name__}")
    if not texts:
        raise ValueError(f"{name}: expected at least one text, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected texts, got {type(text).__name__} {text!r}")
        length, most = len(tokenizer(text, verbose=False).input_ids), tokenizer.model_max_length
        if length > most:
            shown = text if len(text) <= 40 else text[:40] + "…"
            raise ValueError(f"{name}: expected at most {most} tokens, got {length} in {shown!r}; use fewer words")
    return list(texts)


def check_number(name: str, value: Any, least: float, most: float, kind: Any = Real) -> None:
    """Raise a ValueError unless `value` is a number, or an Integral one, of the range; NaN is of none."""
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        what = "a whole number" if kind is Integral else "a number"
        raise ValueError(f"{name}: expected {what} from {least} to {most}, got {value!r}")


def one_generator_each(generator: Any, seed: Any, pictures: int) -> list[torch.Generator] | None:
    """A generator of its own for each picture, so that none depends on what is drawn beside it; None for no seed."""
    if seed is not None:
        if generator is not None:
            raise ValueError("seed: give a seed or a generator, not both")
        seeds = seed if isinstance(seed, Sequence) else [seed]
        for value in seeds:
            check_number("seed", value, 0, 2**63 - 1, Integral)
        if seeds is not seed:
            seeds = [int(seed) + i for i in range(pictures)]
        if len(seeds) != pictures:
            raise ValueError(f"seed: expected one for all or one per picture ({pictures}), got {len(seeds)}")
        return [torch.Generator().manual_seed(int(value)) for value in seeds]
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return [generator, *followers(generator, pictures - 1)]
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != pictures:
        raise ValueError(f"generator: expected one for all or one per picture ({pictures}), got {len(generator)}")
    return list(generator)


def followers(first: torch.Generator, count: int) -> list[torch.Generator]:
    """Generators for the pictures after the first: its seed + 1, + 2, …

    One that has been drawn from already counts from a number drawn from it: the next batch is another one.
    """
    seed, device, state = first.initial_seed(), first.device, first.get_state()
    if not torch.equal(state, torch.Generator(device).manual_seed(seed).get_state()):
        copy = torch.Generator(device)
        copy.set_state(state)
        seed = int(torch.randint(2**62, (), generator=copy, device=device))
    return [torch.Generator(device).manual_seed((seed + i) % 2**64) for i in range(1, count + 1)]
