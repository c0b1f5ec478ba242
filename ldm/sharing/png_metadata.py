"""How a picture was generated, inside the picture: a PNG text chunk named "ldm" that holds JSON.

A picture of a batch may differ by rounding from the same one generated alone. So its settings also name the size of
the batch of its prompt, and its place there: the whole batch, generated again on the same machine with the same
versions, has the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.inference.defaults import AUTOGUIDANCE_SCALE, ENGINES, EVERYWHERE, check_sampler

KEY = "ldm"
FORMATS: dict[str, dict[str, Any]] = {  # suffix => arguments of Pillow's save
    ".png": {},
    ".jpg": {"quality": 95},
    ".jpeg": {"quality": 95},
    ".webp": {"lossless": True},
}
USUAL = {
    "sampler": "the pipeline's",
    "guidance_interval": "everywhere",
    "dtype": "float32",
    "engine": "torch",
    "adapters": "none",
}  # what None means
ADAPTER: dict[str, Any] = {"name": str, "sha256": str, "scale": (int, float, type(None))}
TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict": dict, "list": list}


@dataclass(frozen=True)
class Settings:
    """All that a picture depends on.

    Attributes:
        model: `model_sha256` of the pipeline without adapters.
        seed: of this picture.
        steps: sampling steps.
        guidance_scale: of classifier-free guidance; 1 is off.
        width, height: in pixels.
        scheduler: the class of the sampler.
        sampler: its name, if the call named one; None is the pipeline's own.
        guidance_interval: low and high, fractions of the timesteps; None is everywhere.
        dtype: what the networks computed in; None is float32.
        engine: what computed U-Net and VAE decoder; None is torch.
        prompt, negative_prompt, class_label, numbers: what the model was conditioned on.
        pictures, place: size of the batch and place in it, from 0; seeds count up along the batch.
        condition: the SHA-256 of the second picture that the model was conditioned on.
        image, mask: the SHA-256 of the picture that was changed, and of the mask; `strength` and `expand` (left, top,
            right, bottom) beside them.
        noise_level: of an upscaler, for a picture that was upscaled; `image` is the small one then.
        upscaler: `model_sha256` of the upscaler that a generated picture went through; width and height are the small
            one's then.
        classifier: the fingerprint of the classifier that steered it, by `classifier_scale`.
        weaker: the fingerprint of the U-Net that autoguidance moved away from; `guidance_scale` is its scale then.
        dynamic_thresholding: its quantile.
        adapters: the LoRAs beside the model: name, sha256 (`ldm.models.lora.Adapter`) and scale of each.
        drawn_with: versions and device.
    """

    model: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str
    sampler: str | None = None
    guidance_interval: list[float] | None = None
    dtype: str | None = None
    engine: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: str | None = None
    numbers: dict[str, float] | None = None
    pictures: int = 1
    place: int = 0
    condition: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    expand: list[int] | None = None
    noise_level: int | None = None
    upscaler: str | None = None
    classifier: str | None = None
    classifier_scale: float | None = None
    weaker: str | None = None
    dynamic_thresholding: float | None = None
    adapters: list[dict[str, Any]] | None = None
    drawn_with: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of ASCII, which every reader of PNG files reads, without what is None."""
        set_ones = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return json.dumps(set_ones, sort_keys=True)

    def differences(self, now: Settings) -> list[str]:
        """In which settings another picture differs from this one, a line each."""
        lines = []
        for name in (f.name for f in dataclasses.fields(self)):
            old, new = getattr(self, name), getattr(now, name)
            if name not in ("pictures", "place") and old != new:
                usual = USUAL.get(name)
                lines.append(f"{name}: {usual if old is None else old} then, {usual if new is None else new} now")
        return lines or ["the same settings, so another machine rounds otherwise"]

    def arguments(self) -> dict[str, Any]:
        """The arguments with which an LDMPipeline generates the whole batch again."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "class_label": self.class_label,
            "numbers": self.numbers,
            "num_inference_steps": self.steps,
            "autoguidance_scale" if self.weaker else "guidance_scale": self.guidance_scale,
            "dynamic_thresholding": self.dynamic_thresholding,
            "sampler": self.sampler,
            "guidance_interval": EVERYWHERE if self.guidance_interval is None else tuple(self.guidance_interval),
            "num_images_per_prompt": self.pictures,
            "seed": self.seed - self.place,
            "width": self.width,
            "height": self.height,
            "upscale": self.upscaler is not None,
        }


def stamp(
    pictures: Sequence[Image.Image],
    pipeline: Any,
    model: str,
    *,
    seed: int,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    class_label: str | None = None,
    numbers: Mapping[str, float] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    sampler: str | None = None,
    condition: Image.Image | None = None,
    image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    strength: float | None = None,
    expand: Sequence[int] | None = None,
    noise_level: int | None = None,
    upscaler: str | None = None,
    classifier: Any = None,
    classifier_scale: float | None = None,
    weaker: Any = None,
    autoguidance_scale: float | None = None,
    dynamic_thresholding: float | None = None,
    **_: Any,
) -> None:
    """Put its settings into each picture of one call's result, as `info`, which `save` writes into PNG files.

    Args:
        pictures: of one prompt.
        pipeline: the LDMPipeline.
        model: its `model_sha256` without adapters.
        seed: of the first picture.
        upscaler: `model_sha256` of the pipeline's upscaler, if the pictures went through it.
        others: the arguments of the call; what it left out is recorded as the pipeline resolves it.
    """
    import diffusers
    import torch

    from ldm.inference import samplers
    from ldm.models.fingerprint import fingerprint
    from ldm.models.lora import active_adapters
    from ldm.version import __version__

    if weaker is not None:
        guidance_scale = AUTOGUIDANCE_SCALE if autoguidance_scale is None else autoguidance_scale
    used = pipeline.defaults.resolve(num_inference_steps, guidance_scale, guidance_interval)
    interval = used.guidance_interval
    scheduler = pipeline.scheduler if sampler is None else samplers.build(sampler, pipeline.scheduler.config)
    dtype = str(pipeline.unet.dtype).removeprefix("torch.")
    factor = 1 if upscaler is None else pipeline.upscaler.factor
    adapters = [{name: getattr(one, name) for name in ADAPTER} for one in active_adapters(pipeline)]
    for place, picture in enumerate(pictures):
        settings = Settings(
            model=model,
            seed=seed + place,
            steps=int(used.num_inference_steps),
            guidance_scale=float(used.guidance_scale),
            guidance_interval=None if interval == EVERYWHERE else [float(end) for end in interval],
            dtype=None if dtype == "float32" else dtype,
            engine=None if pipeline.engine is None else pipeline.engine.name,
            width=picture.width // factor,
            height=picture.height // factor,
            scheduler=type(scheduler).__name__,
            sampler=sampler,
            pictures=len(pictures),
            place=place,
            condition=None if condition is None else picture_sha256(condition),
            image=None if image is None else picture_sha256(image),
            mask=None if mask_image is None else picture_sha256(mask_image),
            strength=strength,
            expand=None if expand is None else list(expand),
            noise_level=noise_level,
            upscaler=upscaler,
            classifier=None if classifier is None else fingerprint(classifier.network),
            classifier_scale=None if classifier is None else classifier_scale,
            weaker=None if weaker is None else fingerprint(pipeline.weaker_unet(weaker)),
            dynamic_thresholding=dynamic_thresholding,
            adapters=adapters or None,
            drawn_with={
                "ldm": __version__,
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "device": str(pipeline.device.type),
                **({} if pipeline.engine is None else {pipeline.engine.name: pipeline.engine.version}),
            },
            prompt=prompt,
            negative_prompt=negative_prompt,
            class_label=class_label,
            numbers=None if numbers is None else {name: float(number) for name, number in numbers.items()},
        )
        picture.info[KEY] = settings.to_json()


def picture_sha256(picture: Image.Image) -> str:
    """The SHA-256 of a picture's size and pixels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.convert("RGB").tobytes()).hexdigest()


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix; a PNG file holds the settings of a stamped one."""
    options = dict(FORMATS[path.suffix.lower()])
    if path.suffix.lower() == ".png" and KEY in picture.info:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(KEY, picture.info[KEY])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def read(path: Path) -> Settings:
    """The settings in a picture file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a picture, holds no settings, or impossible ones: names file and key.
    """
    try:
        with Image.open(path) as picture:
            return of(picture, path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except OSError as error:  # Pillow's, for what isn't a picture
        raise ValueError(f"{path}: {error}") from None


def of(picture: Image.Image, path: Path) -> Settings:
    """The settings of a picture, checked: they may be anybody's JSON; `path` is for the errors."""
    text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path}: it holds no settings; expected a PNG file made by `ldm sample` or `ldm app`")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its settings are not JSON: {error}") from None
    kinds = {f.name: f for f in dataclasses.fields(Settings)}
    required = [name for name, f in kinds.items() if f.default is f.default_factory is dataclasses.MISSING]
    if not isinstance(found, dict) or not found.keys() <= kinds.keys() or not found.keys() >= set(required):
        raise ValueError(f"{path}: its settings: expected an object with {', '.join(required)}, got {str(found)[:200]}")
    for name, value in found.items():
        kind = str(kinds[name].type)
        types = next(types for start, types in TYPES.items() if kind.startswith(start))
        if not isinstance(value, types) or isinstance(value, bool):
            raise ValueError(f"{path}: its settings: {name}: expected {kind}, got {value!r}")
    for name, number in found.get("numbers", {}).items():
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise ValueError(
                f"{path}: its settings: numbers: expected a number for {name[:40]}, got {str(number)[:40]}"
            )
    for one in found.get("adapters", ()):
        if (
            not isinstance(one, dict)
            or one.keys() != ADAPTER.keys()
            or not all(isinstance(one[name], kind) for name, kind in ADAPTER.items())
        ):
            raise ValueError(f"{path}: its settings: adapters: expected name, sha256 and scale, got {str(one)[:200]}")
    settings = Settings(**found)
    if settings.sampler is not None:
        check_sampler(f"{path}: its settings: sampler", settings.sampler)
    if settings.engine not in (None, *ENGINES):
        raise ValueError(f"{path}: its settings: engine: expected {' or '.join(ENGINES)}, got {settings.engine!r}")
    if not 0 <= settings.place < settings.pictures or settings.seed < settings.place:
        raise ValueError(
            f"{path}: its settings: place: expected one of {settings.pictures} pictures, got {settings.place}"
        )
    return settings
