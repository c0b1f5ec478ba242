"""How a picture was drawn, inside the picture: a PNG text chunk named "ldm" that holds JSON.

A picture drawn in a batch may differ by rounding from the same one drawn alone, so a recipe also says with how many
others of the same prompt it was drawn, and in which place: who draws the whole batch again gets the same bytes, on the
same machine with the same versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.inference.defaults import ENGINES, EVERYWHERE

KEY = "ldm"
TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict": dict, "list": list}


@dataclass(frozen=True)
class Recipe:
    """All that a picture depends on.

    Attributes:
        model: `model_sha256` of the pipeline.
        seed: of this picture.
        steps: evaluations of the U-Net.
        guidance_scale: of classifier-free guidance; 1 is off.
        width, height: in pixels.
        scheduler: its class.
        guidance_interval: low and high, fractions of the timesteps; None is everywhere.
        dtype: what the networks computed in; None is float32.
        engine: what computed U-Net and VAE decoder; None is torch.
        prompt, negative_prompt, class_label: what the model was told.
        pictures, place: it was the place-th (from 0) of so many, drawn at once from seeds that follow each other.
        condition: the SHA-256 of the picture that it was made of.
        classifier: the fingerprint of the classifier that steered it, by `classifier_scale`.
        drawn_with: versions and device.
    """

    model: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str
    guidance_interval: list[float] | None = None
    dtype: str | None = None
    engine: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: str | None = None
    pictures: int = 1
    place: int = 0
    condition: str | None = None
    classifier: str | None = None
    classifier_scale: float | None = None
    drawn_with: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of ASCII, which every reader of PNG files reads; what wasn't said is left out."""
        told = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(told, sort_keys=True)

    def arguments(self) -> dict[str, Any]:
        """What draws the whole batch again, for LDMPipeline."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "class_label": self.class_label,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": EVERYWHERE if self.guidance_interval is None else tuple(self.guidance_interval),
            "num_images_per_prompt": self.pictures,
            "seed": self.seed - self.place,
            "width": self.width,
            "height": self.height,
        }


def stamp(
    pictures: Sequence[Image.Image],
    pipeline: Any,
    model: str,
    *,
    seed: int,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    condition: Image.Image | None = None,
    classifier: Any = None,
    classifier_scale: float | None = None,
    **told: str | None,
) -> None:
    """Put its recipe into each picture of one call's answer, as `info`; what saves PNG files may keep it (`save` does).

    Args:
        pictures: the answer, of one prompt.
        pipeline: an LDMPipeline.
        model: its `model_sha256`.
        seed: of the first.
        told: prompt, negative_prompt and class_label; like the others, as they were handed to the pipeline.
    """
    import diffusers
    import torch

    from ldm.models.fingerprint import fingerprint
    from ldm.version import __version__

    defaults = pipeline.defaults
    interval = tuple(defaults.guidance_interval if guidance_interval is None else guidance_interval)
    dtype = str(pipeline.unet.dtype).removeprefix("torch.")
    for place, picture in enumerate(pictures):
        recipe = Recipe(
            model=model,
            seed=seed + place,
            steps=int(defaults.num_inference_steps if num_inference_steps is None else num_inference_steps),
            guidance_scale=float(defaults.guidance_scale if guidance_scale is None else guidance_scale),
            guidance_interval=None if interval == EVERYWHERE else [float(end) for end in interval],
            dtype=None if dtype == "float32" else dtype,
            engine=None if pipeline.engine is None else pipeline.engine.name,
            width=picture.width,
            height=picture.height,
            scheduler=type(pipeline.scheduler).__name__,
            pictures=len(pictures),
            place=place,
            condition=None if condition is None else picture_sha256(condition),
            classifier=None if classifier is None else fingerprint(classifier.network),
            classifier_scale=None if classifier is None else classifier_scale,
            drawn_with={
                "ldm": __version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "device": str(pipeline.device.type),
                **({} if pipeline.engine is None else {pipeline.engine.name: pipeline.engine.version}),
            },
            **told,
        )
        picture.info[KEY] = recipe.to_json()


def picture_sha256(picture: Image.Image) -> str:
    """The SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.convert("RGB").tobytes()).hexdigest()


def save(picture: Image.Image, path: Path) -> None:
    """Write a stamped picture as PNG, its recipe with it."""
    info = PngInfo()
    info.add_text(KEY, picture.info[KEY])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG", pnginfo=info)


def read(path: Path) -> Recipe:
    """The recipe that a picture carries.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a picture, or carries none, or one that can't be: names file and key.
    """
    try:
        with Image.open(path) as picture:
            text = picture.info.get(KEY)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # Pillow's, for what isn't a picture
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(text, str):
        raise ValueError(f"{path}: it carries no recipe; expected a PNG file drawn by `ldm sample` or app.py")
    try:
        said = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its recipe isn't JSON: {error}") from None
    return checked(said, path)


def checked(said: Any, path: Path) -> Recipe:
    """A recipe of anybody's JSON."""
    kinds = {f.name: f for f in dataclasses.fields(Recipe)}
    required = [name for name, f in kinds.items() if f.default is f.default_factory is dataclasses.MISSING]
    if not isinstance(said, dict) or not said.keys() <= kinds.keys() or not said.keys() >= set(required):
        raise ValueError(f"{path}: its recipe: expected an object with {', '.join(required)}, got {str(said)[:200]}")
    for name, value in said.items():
        kind = str(kinds[name].type)
        types = next(types for start, types in TYPES.items() if kind.startswith(start))
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(f"{path}: its recipe: {name}: expected {kind}, got {value!r}")
    recipe = Recipe(**said)
    if recipe.engine not in (None, *ENGINES):
        raise ValueError(f"{path}: its recipe: engine: expected {' or '.join(ENGINES)}, got {recipe.engine!r}")
    if not 0 <= recipe.place < recipe.pictures or recipe.seed < recipe.place:
        raise ValueError(f"{path}: its recipe: place: expected one of {recipe.pictures} pictures, got {recipe.place}")
    return recipe
