"""Arguments of a pipeline's call, checked before any network runs; errors name the argument and what it allows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import to_pixels, to_rgb, to_size
from ldm.data.labels import Labels
from ldm.data.numbers import Numbers

MAX_CHARACTERS = 20_000  # a limit before the tokenizer's own, which takes time to find out
MAX_PER_PROMPT = 1024
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# what no tokenizer has learned: control characters that are not white space, and surrogates without a partner
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Inputs:
    """What a call asks for, an entry for each prompt; empty lists where the model takes no such condition.

    Attributes:
        batch: number of prompts, classes or conditions.
        images: number of pictures, `num_images_per_prompt` for each of them.
        prompts, negatives: texts.
        class_inputs: numbers of the model's own classes; or standardized numbers, a list each (`ldm.data.numbers`).
        targets: classes that a classifier guides towards.
        conditions: second pictures, as pixels [3,H,W].
        generators: one per picture; None for new noise each time.
    """

    batch: int
    images: int
    prompts: list[str]
    negatives: list[str]
    class_inputs: list[Any]
    targets: list[int]
    conditions: list[Tensor]
    generators: list[torch.Generator] | None


def check_inputs(pipe: Any, height: int, width: int, **given: Any) -> Inputs:
    """Check a call's arguments against their ranges and against the model.

    Args:
        pipe: an LDMPipeline.
        height, width: in pixels, checked before.
        given: the call's arguments, by name.
    Raises:
        ValueError: names the argument and what it allows.
    """
    T = pipe.scheduler.config.num_train_timesteps
    check_number("num_inference_steps", given["num_inference_steps"], 1, T, Integral)
    check_number("num_images_per_prompt", given["num_images_per_prompt"], 1, MAX_PER_PROMPT, Integral)
    for name in ("guidance_scale", "classifier_scale"):
        check_number(name, given[name], 0, 100)
    for name in ("eta", "guidance_rescale"):
        check_number(name, given[name], 0, 1)
    _check_stock(pipe, given)
    embeds = given["prompt_embeds"]
    texts, unwanted, classifier = given["prompt"], given["negative_prompt"], given["classifier"]
    prompts = known_texts("prompt", texts, pipe.tokenizer) if embeds is None else []
    negatives = [] if unwanted is None else known_texts("negative_prompt", unwanted, pipe.tokenizer)
    names = given["class_label"]
    names = list(names) if isinstance(names, list | tuple) else [names]
    targets = [classifier.class_id(name) for name in names] if classifier is not None else []
    class_inputs: list[Any] = known_classes(names if pipe.labels is not None or not targets else [None], pipe.labels)
    class_inputs += known_numbers(given["numbers"], pipe.numbers)
    class_argument = "numbers" if pipe.numbers else "class_label"
    conditions = known_conditions(given["condition"], pipe.condition_channels, height, width)
    lengths = (1 if embeds is None else len(embeds), len(prompts), len(class_inputs), len(targets), len(conditions))
    batch = max(given["sources"], *lengths)
    if given["sources"] not in (1, batch):
        raise ValueError(f"image: expected 1 or {batch}, one for each prompt, got {given['sources']}")
    images = batch * given["num_images_per_prompt"]
    latents = given["latents"]
    if latents is not None and (latents.ndim != 4 or len(latents) != images):
        raise ValueError(f"latents: expected [{images},C,h,w], got {list(latents.shape)}")
    return Inputs(
        batch=batch,
        images=images,
        prompts=one_each("prompt", prompts, batch) if prompts else [],
        negatives=one_each("negative_prompt", negatives, batch) if negatives else [],
        class_inputs=one_each(class_argument, class_inputs, batch) if class_inputs else [],
        targets=one_each("class_label", targets, batch) if targets else [],
        conditions=one_each("condition", conditions, batch) if conditions else [],
        generators=one_generator_each(given["generator"], given["seed"], images),
    )


def _check_stock(pipe: Any, given: dict[str, Any]) -> None:
    """Check the arguments that stock pipelines leave unchecked, or ignore."""
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if given[name] is not None:
            raise ValueError(f"{name}: IP-Adapters run in stock pipelines: StableDiffusionPipeline.from_pipe(pipe)")
    for text, embedded in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
        embeds = given[embedded]
        if embeds is None:
            continue
        if given[text] is not None:
            raise ValueError(f"{text}: give {text} or {embedded}, not both")
        width = pipe.unet.config.cross_attention_dim
        if pipe.tokenizer is None or not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[-1] != width:
            found = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(f"{embedded}: expected a tensor [B,L,{width}] for a model with text, got {found}")
    both = given["prompt_embeds"], given["negative_prompt_embeds"]
    if both[0] is not None and both[1] is not None and both[0].shape != both[1].shape:
        shapes = f"{list(both[0].shape)} and {list(both[1].shape)}"
        raise ValueError(f"negative_prompt_embeds: expected the shape of prompt_embeds, got {shapes}")
    if given["timesteps"] is not None and given["sigmas"] is not None:
        raise ValueError("timesteps: give timesteps or sigmas, not both")
    if given["output_type"] not in OUTPUT_TYPES:
        raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {given['output_type']!r}")
    if given["cross_attention_kwargs"] is not None and not isinstance(given["cross_attention_kwargs"], dict):
        raise ValueError(
            f"cross_attention_kwargs: expected a dict, got {type(given['cross_attention_kwargs']).__name__}"
        )
    names = given["callback_on_step_end_tensor_inputs"]
    if unknown := [name for name in names if name not in pipe._callback_tensor_inputs]:
        allowed = ", ".join(pipe._callback_tensor_inputs)
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected some of {allowed}, got {unknown[0]!r}")
    if given["clip_skip"] is not None:
        kind = type(pipe.text_encoder).__name__
        if not kind.startswith("CLIPText"):
            raise ValueError(f"clip_skip: it skips layers of CLIP, and this model's text encoder is a {kind}")
        check_number("clip_skip", given["clip_skip"], 0, pipe.text_encoder.config.num_hidden_layers - 1, Integral)


def check_known(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError that names the first unknown argument and the nearest known one."""
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else f"; expected some of {', '.join(names)}"
            raise TypeError(f"{name}: there is no such argument{hint}")


def one_each(name: str, values: Sequence[Any], batch: int) -> list[Any]:
    """One value for all prompts, or one each => one each."""
    if len(values) not in (1, batch):
        raise ValueError(f"{name}: expected 1 or {batch}, one for each picture asked for, got {len(values)}")
    return list(values) * batch if len(values) == 1 else list(values)


def check_prompts(name: str, prompts: Any, tokenizer: Any) -> list[str]:
    """A text or a list of texts, none of them longer than the tokenizer's limit => a list of them."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"{name}: expected a text or a list of texts, got {type(prompts).__name__}")
    if not texts:
        raise ValueError(f"{name}: expected at least one text, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected texts, got {type(text).__name__} {text!r}")
        if found := _UNREADABLE.search(text):
            raise ValueError(f"{name}: holds U+{ord(found.group()):04X}, which is no character of a text")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"{name}: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}; use fewer words"
            )
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
    """A generator for each picture, so that no picture depends on its batch; None without a seed."""
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

    A generator that was used before counts from a number of its own, so that the next batch is another one.
    """
    seed, device, state = first.initial_seed(), first.device, first.get_state()
    if not torch.equal(state, torch.Generator(device).manual_seed(seed).get_state()):
        copy = torch.Generator(device)
        copy.set_state(state)
        seed = int(torch.randint(2**62, (), generator=copy, device=device))
    return [torch.Generator(device).manual_seed((seed + i) % 2**64) for i in range(1, count + 1)]


def known_texts(name: str, texts: Any, tokenizer: Any) -> list[str]:
    """The texts, checked; none for a model without text."""
    if tokenizer is not None:
        return check_prompts(name, texts, tokenizer)
    if texts is not None:
        raise ValueError(f"{name}: this model knows no text")
    return []


def known_classes(names: list[Any], labels: Labels | None) -> list[int]:
    """The numbers of these classes, that of the null class for None; none for a model without classes."""
    if labels is None:
        if names != [None]:
            raise ValueError("class_label: this model knows no classes; give it a classifier that does")
        return []
    null_class = len(labels.names)
    return [null_class if name is None else labels.id(name) for name in names]


def known_numbers(numbers: Any, known: Numbers | None) -> list[list[float]]:
    """The vectors of these numbers, that of none for None; no vectors for a model without numbers."""
    if known is None:
        if numbers is not None:
            raise ValueError("numbers: this model is conditioned on none")
        return []
    listed = numbers if isinstance(numbers, list | tuple) else [numbers]
    if not listed or not all(each is None or isinstance(each, Mapping) for each in listed):
        raise ValueError(f"numbers: expected such as {{{known.columns[0]!r}: 0.5}}, or a list of them, got {numbers!r}")
    return [(known.null if each is None else known.vector(each)).tolist() for each in listed]


def known_conditions(pictures: Any, channels: int, height: int, width: int) -> list[Tensor]:
    """Second pictures as pixels [3,height,width], decoded as in training; none for a model that takes none."""
    if not channels:
        if pictures is not None:
            raise ValueError("condition: this model takes no second picture")
        return []
    listed = pictures if isinstance(pictures, list | tuple) else [pictures]
    if not listed or not all(isinstance(picture, Image.Image) for picture in listed):
        kind = type(listed[0]).__name__ if listed else "an empty list"
        raise ValueError(f"condition: this model makes pictures of pictures; expected a PIL picture, got {kind}")
    return [torch.from_numpy(to_pixels(to_size(to_rgb(picture), (width, height)))) for picture in listed]
