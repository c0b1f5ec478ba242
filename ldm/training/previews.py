"""The pictures that a run generates on the way: always of the same prompt set, from the same noise at each size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, groupby
from typing import Any

import torch
from PIL import Image

from ldm.data.batches import evenly, load_pixels
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import Row
from ldm.data.grid import captioned_grid, full_edge
from ldm.data.images import Size
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import to_pictures
from ldm.training.config import Config
from ldm.training.masks import draw_mask
from ldm.training.randomness import generator
from ldm.training.sizes import buckets_of, vae_downsampling

AT_ONCE = 16  # pictures
DEFAULT = 8  # pictures in the grid if the config names none


@dataclass(frozen=True)
class Prompt:
    """What one picture of the grid is conditioned on, as far as the model can be.

    Attributes:
        caption: the text under it.
        prompt, class_label, numbers: arguments of LDMPipeline.
        condition: the row that reads the argument `condition`, when a preview needs it.
        picture: the row that reads the argument `image`, which is masked, or shrunk for an upscaler.
        size: arguments `width` and `height`; None is the model's own.
    """

    caption: str
    prompt: str | None = None
    class_label: str | None = None
    condition: Row | None = None
    picture: Row | None = None
    numbers: Mapping[str, float] | None = None
    size: Size | None = None


def build_prompt_set(config: Config, source: ConditionedPictures, text: TextEncoder | None) -> list[Prompt]:
    """The config's prompts, else some captions; without text, classes; for conditioning pictures, some rows.

    Rows have the sizes of their buckets; prompts and classes have those of the training in turn.
    """
    if source.condition_column or config.data.inpaint or config.upscale.factor or source.numbers:
        rows = evenly(source.heldout if len(source.heldout) else source.train, DEFAULT)
        return [prompt_of(config, rows, number) for number in range(len(rows))]
    prompts = unsized_prompts(config, source, text)
    if config.data.buckets:
        sizes = cycle(buckets_of(config, source.train.pictures).sizes)
        prompts = [replace(prompt, size=size) for prompt, size in zip(prompts, sizes, strict=False)]
    return prompts


def unsized_prompts(config: Config, source: ConditionedPictures, text: TextEncoder | None) -> list[Prompt]:
    """Prompts, classes, or nothing in particular."""
    if text:
        return [Prompt(prompt, prompt) for prompt in config.loop.prompts or some_captions(source, text)]
    if source.labels:
        return [Prompt(name, class_label=name) for name in source.labels.names[:AT_ONCE]]
    return [Prompt("")] * DEFAULT


def some_captions(source: ConditionedPictures, text: TextEncoder) -> tuple[str, ...]:
    """Captions of a few training pictures, but for those that are too long for a prompt."""
    captions = [row.captions[0] for row in evenly(source.train, DEFAULT).pictures]
    lengths = text.lengths(captions)
    return tuple(caption for caption, n in zip(captions, lengths, strict=True) if n <= text.tokenizer.model_max_length)


def prompt_of(config: Config, rows: ConditionedPictures, number: int) -> Prompt:
    """All that is known of a row besides its picture."""
    row = rows.pictures[number]
    name = rows.labels.names[rows.class_ids[number]] if rows.labels else None
    prompt = row.captions[0] if config.text.encoder is not None else None
    condition = rows.condition(number) if rows.condition_column else None
    numbers = {column: float(row.extra[column]) for column in rows.numbers.columns} if rows.numbers else None
    said = ", ".join(f"{column} {number:g}" for column, number in (numbers or {}).items())
    caption = ": ".join(words for words in (prompt or name, said) if words)
    picture = row if config.data.inpaint or config.upscale.factor else None
    size = buckets_of(config, rows.pictures).size(number) if config.data.buckets else None
    return Prompt(caption, prompt, name, condition, picture, numbers, size)


def halved(prompts: Sequence[Prompt], config: Config) -> list[Prompt]:
    """The prompts at half the size, which a U-Net generates best that has last learned from halved latents.

    Some stay whole: those whose half no pipeline makes, and those of inpainting, where a mask that is drawn smaller can
    be thinner than a latent.
    """
    step = math.lcm(8, vae_downsampling(config, "ldm"))  # pipelines require eights

    def half(prompt: Prompt) -> Prompt:
        width, height = prompt.size or (config.data.size, config.data.size)
        if width % (2 * step) or height % (2 * step) or prompt.picture is not None:
            return prompt
        return replace(prompt, size=(width // 2, height // 2))

    return [half(prompt) for prompt in prompts]


def generate_grid(
    pipeline: Any, prompts: Sequence[Prompt], config: Config, interrupted: Callable[[], bool]
) -> Image.Image | None:
    """A grid of the prompt set; None if it was interrupted.

    Above it stand the pictures that it is made of: second pictures, or whole ones and what masks leave of them.
    """

    def check(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = interrupted()  # the stock way out: the remaining steps are passed over
        return {}

    pipeline.set_progress_bar_config(desc="preview", leave=False)
    above: list[Image.Image] = []
    below: list[Image.Image] = []
    pictures: list[Image.Image] = []
    for start, part in of_one_size(prompts):
        given: dict[str, Any] = {
            name: [getattr(prompt, name) for prompt in part]
            for name in ("prompt", "class_label", "condition", "numbers")
            if getattr(part[0], name) is not None
        }
        if "condition" in given:
            given["condition"] = [row.image() for row in given["condition"]]
            above += given["condition"]
        if part[0].picture is not None:
            rows = [prompt.picture for prompt in part if prompt.picture is not None]
            wholes, masks = masked_pictures(config, rows, start, part[0].size or config.data.size)
            given |= {"image": wholes, "mask_image": masks}
            above += wholes
            below += [Image.composite(Image.new("RGB", whole.size, "gray"), whole, mask)
                      for whole, mask in zip(wholes, masks, strict=True)]  # fmt: skip
        given = given or {"num_images_per_prompt": len(part)}
        if part[0].size is not None:
            given |= zip(("width", "height"), part[0].size, strict=True)
        output = pipeline(
            **given,
            num_inference_steps=config.preview_steps,
            guidance_scale=config.preview_scale,
            seed=config.seed + start,
            callback_on_step_end=check,
        )
        if interrupted():
            return None
        pictures += output.images
    captions = [prompt.caption for prompt in prompts]
    if not above:
        return captioned_grid(pictures, captions)
    if not below:
        return captioned_grid([*above, *pictures], [*captions, *["generated"] * len(pictures)], columns=len(pictures))
    words = [*captions, *["masked"] * len(below), *["filled in"] * len(pictures)]
    return captioned_grid([*above, *below, *pictures], words, columns=len(pictures))


def upscaled_grid(
    pipeline: Any, prompts: Sequence[Prompt], config: Config, interrupted: Callable[[], bool]
) -> Image.Image | None:
    """Pictures small, upscaled and true, a row each; None if it was interrupted."""
    large = config.data.size
    rows = [prompt.picture for prompt in prompts if prompt.picture is not None]
    small, true = (
        to_pictures(torch.stack([load_pixels(row, edge) for row in rows]))
        for edge in (large // config.upscale.factor, large)
    )
    pipeline.set_progress_bar_config(desc="preview", leave=False)
    upscaled: list[Image.Image] = []
    texts = pipeline.fitting([row.captions[0] if row.captions else "" for row in rows])
    for i, picture in enumerate(small):
        if interrupted():
            return None
        upscaled += pipeline.upscale(
            picture, texts[i], num_inference_steps=config.preview_steps, guidance_scale=config.preview_scale,
            seed=config.seed + i,
        ).images  # fmt: skip
    words = ["small", "upscaled", "true"]
    captions = [f"{word}: {prompt.caption}" for word in words for prompt in prompts]
    return captioned_grid([*small, *upscaled, *true], captions, columns=len(small), edge=full_edge(true))


def of_one_size(prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
    """The prompts in parts that follow each other, of one size and at most AT_ONCE, with the number of the first."""
    start = 0
    for _, same in groupby(prompts, lambda prompt: prompt.size):
        run = list(same)
        for i in range(0, len(run), AT_ONCE):
            yield start + i, run[i : i + AT_ONCE]
        start += len(run)


def masked_pictures(
    config: Config, rows: Sequence[Row], first: int, size: int | Size
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of this size and their masks, white where they are masked; always the same.

    Args:
        first: number of the first one.
    """
    pixels = torch.stack([load_pixels(row, size) for row in rows])
    masks = [draw_mask(generator(config.seed, "preview mask", first + i), size) for i in range(len(rows))]
    return to_pictures(pixels), [Image.fromarray(mask[0].numpy()).convert("L") for mask in masks]
