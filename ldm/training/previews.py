"""What a run draws of itself on the way: always the same wishes, always from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.data.batches import evenly
from ldm.data.conditioned import ConditionedPictures
from ldm.data.grid import captioned_grid
from ldm.models.text_encoder import TextEncoder
from ldm.training.config import Config
from ldm.training.signals import Noted

DRAWN_AT_ONCE = 16
UNASKED = 8  # pictures in the grid if nobody said which


@dataclass(frozen=True)
class Wish:
    """What one picture of the grid is asked for, as far as the model can be asked.

    Attributes:
        caption: what stands under it.
        prompt, class_label, condition: arguments of LDMPipeline.
    """

    caption: str
    prompt: str | None = None
    class_label: str | None = None
    condition: Image.Image | None = None


def build_wishes(config: Config, source: ConditionedPictures, text: TextEncoder | None) -> list[Wish]:
    """The config's prompts, else some captions; without text, classes; for pictures made of pictures, some rows."""
    if source.condition_column:
        rows = evenly(source.heldout if len(source.heldout) else source.train, UNASKED)
        return [wish_of(config, rows, number) for number in range(len(rows))]
    if text:
        return [Wish(prompt, prompt) for prompt in config.loop.prompts or some_captions(source, text)]
    if source.labels:
        return [Wish(name, class_label=name) for name in source.labels.names[:DRAWN_AT_ONCE]]
    return [Wish("")] * UNASKED


def some_captions(source: ConditionedPictures, text: TextEncoder) -> tuple[str, ...]:
    """Captions of a few training pictures, but for those that are too long to be drawn."""
    said = [row.captions[0] for row in evenly(source.train, UNASKED).pictures]
    lengths = text.lengths(said)
    return tuple(caption for caption, n in zip(said, lengths, strict=True) if n <= text.tokenizer.model_max_length)


def wish_of(config: Config, rows: ConditionedPictures, number: int) -> Wish:
    """To draw a row again from all that is known of it."""
    row = rows.pictures[number]
    name = rows.labels.names[rows.class_ids[number]] if rows.labels else None
    prompt = row.captions[0] if config.text.encoder is not None else None
    return Wish(prompt or name or "", prompt, name, rows.condition(number).image())


def draw_wishes(pipeline: Any, wishes: Sequence[Wish], config: Config, signal: Noted) -> Image.Image | None:
    """A grid of what was wished for; None if a signal came meanwhile."""

    def leave_if_asked(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = bool(signal)  # the stock way out: the steps that are left are passed over
        return {}

    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    pictures: list[Image.Image] = []
    for start in range(0, len(wishes), DRAWN_AT_ONCE):
        part = wishes[start : start + DRAWN_AT_ONCE]
        told: dict[str, Any] = {
            name: [getattr(wish, name) for wish in part]
            for name in ("prompt", "class_label", "condition")
            if getattr(part[0], name) is not None
        }
        drawn = pipeline(
            **(told or {"num_images_per_prompt": len(part)}),
            num_inference_steps=config.loop.num_inference_steps,
            guidance_scale=config.loop.guidance_scale,
            seed=config.seed + start,
            callback_on_step_end=leave_if_asked,
        )
        if signal:
            return None
        pictures += drawn.images
    return captioned_grid(pictures, [wish.caption for wish in wishes])
