"""`ldm sample`: prompts in; a picture, a grid or a folder of pictures out. Single pictures carry their recipe."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from ldm.inference.defaults import ENGINES
from ldm.pipelines import import_networks
from ldm.system.devices import DTYPES

EXAMPLE = """ldm sample runs/demo/pipeline "red heart" --out heart.png --seed 7   (a picture with its recipe inside)
  ldm sample runs/demo/pipeline "red heart" "pizza" --out grid.png     (a captioned grid)
  ldm sample runs/demo/pipeline "red heart" "pizza" --each drawn       (a file for each)
  ldm sample --like heart.png runs/demo/pipeline --out again.png       (the same picture again)"""
MODELS = ("models/*/model_index.json", "runs/*/pipeline/model_index.json")  # where --like looks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm sample`."""
    add = parser.add_argument
    add("model", nargs="?", help="a pipeline folder (RUN/pipeline) or a Hub id; --like finds it in models/ and runs/")
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; nothing if the model knows no text")
    add("--out", type=Path, help="PNG file to write: the picture, or a grid of several (default: samples.png)")
    add("--each", type=Path, metavar="FOLDER", help="write every picture into a file of its own")
    add("--like", type=Path, metavar="PICTURE", help="draw a picture again by the recipe that it carries")
    add("--steps", type=int, help="network evaluations per picture (default: the pipeline's, or 20)")
    add("--guidance-scale", type=float,
        help="how strictly to follow the prompt; 1 is off (default: the pipeline's, or 3)")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guide only where LOW <= t/T < HIGH, for less time (default: the pipeline's, or 0 1)")  # fmt: skip
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="what the networks compute in; auto is bfloat16 where the device is faster in it, else float32, in which "
        "stock diffusers draws the same to the bit (default: auto; with --like, the recipe's)")  # fmt: skip
    add("--engine", choices=ENGINES,
        help="what computes U-Net and VAE decoder; openvino takes a second to start, is then faster on a CPU, and "
        "draws the same but for rounding (default: torch; with --like, the recipe's)")  # fmt: skip
    add("--negative-prompt", help="what to steer away from")
    add("--classifier", help="a classifier's folder (RUN/classifier) that steers towards --class-label")
    add("--class-label", nargs="+", metavar="CLASS",
        help="the class to draw, or to steer towards; one for all pictures or one each")  # fmt: skip
    add("--condition", type=Path, metavar="FILE", help="the picture to make pictures of")
    add("--classifier-scale", type=float, default=1.0, help="how strongly the classifier steers (default: 1)")
    add("--images-per-prompt", type=int, default=1, help="pictures of each prompt (default: 1)")
    add("--seed", type=int, default=0, help="of the first picture; the others count on (default: 0)")
    add("--columns", type=int, default=4, help="pictures in a row (default: 4)")


def run(arguments: argparse.Namespace) -> None:
    """Draw."""
    if arguments.model is None and arguments.like is None:
        raise ValueError("prompts: name a pipeline folder and what to draw, or a picture to draw again with --like")
    import_networks()
    if arguments.like is None:
        draw(arguments)
    else:
        draw_again(arguments)


def draw(arguments: argparse.Namespace) -> None:
    """Draw the prompts into a picture, a grid or a folder."""
    from ldm.data.grid import captioned_grid
    from ldm.data.images import decode
    from ldm.models.classifier import NoisyClassifier
    from ldm.models.fingerprint import model_sha256
    from ldm.pipelines.inputs import one_each
    from ldm.sharing import png_metadata as recipe

    pipeline = load(arguments.model, arguments.dtype, arguments.engine)
    if arguments.engine == "openvino":
        pipeline.enable_openvino()
    prompts, labels, count = arguments.prompts or [None], arguments.class_label or [None], arguments.images_per_prompt
    asks = max(len(prompts), len(labels))
    prompts, labels = one_each("prompts", prompts, asks), one_each("--class-label", labels, asks)
    told: dict[str, Any] = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "guidance_interval": arguments.guidance_interval,
        "negative_prompt": arguments.negative_prompt,
        "condition": decode(arguments.condition.read_bytes()) if arguments.condition else None,
        "classifier": NoisyClassifier.load(arguments.classifier) if arguments.classifier else None,
        "classifier_scale": arguments.classifier_scale,
    }
    out = arguments.out or (None if arguments.each else Path("samples.png"))
    words = [prompt or label or "" for prompt, label in zip(prompts, labels, strict=True)]
    captions = [word for word in words for _ in range(max(1, count))]
    pictures: list[Any] = []
    if arguments.each or len(captions) == 1:
        model = model_sha256(pipeline)
        for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
            asked = {**told, "prompt": prompt, "class_label": label, "seed": arguments.seed + i * count}
            drawn: Any = pipeline(**asked, num_images_per_prompt=count)
            recipe.stamp(drawn.images, pipeline, model, **asked)
            pictures += drawn.images
    else:
        asked = {**told, "prompt": arguments.prompts or None, "class_label": arguments.class_label}
        drawn = pipeline(**asked, num_images_per_prompt=count, seed=arguments.seed)
        pictures = drawn.images
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        if arguments.each:
            recipe.save(picture, arguments.each / file_name(arguments.seed + i, caption))
    if out is not None and len(pictures) == 1:
        recipe.save(pictures[0], out)
    elif out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        captioned_grid(pictures, captions, columns=arguments.columns).save(out)
    where = " and ".join(str(place) for place in (arguments.each, out) if place is not None)
    print(f"{len(pictures)} pictures are in {where}" if len(pictures) > 1 else f"the picture is in {where}")


def draw_again(arguments: argparse.Namespace) -> None:
    """Draw a picture by its recipe, and say whether it is the same and, if not, why."""
    from ldm.models.classifier import NoisyClassifier
    from ldm.sharing import png_metadata as recipe

    if arguments.prompts:
        raise ValueError("prompts: with --like the picture's recipe says what to draw; leave them out")
    wanted = recipe.read(arguments.like)
    if wanted.condition:
        raise ValueError(f"{arguments.like}: it was made of another picture, which its recipe doesn't hold")
    if bool(wanted.classifier) != bool(arguments.classifier):
        use = "was steered by a classifier; name it" if wanted.classifier else "was drawn without one; leave it out"
        raise ValueError(f"--classifier: {arguments.like} {use}")
    if arguments.dtype != "auto":
        raise ValueError("--dtype: with --like the picture's recipe says it; leave it out")
    engine = arguments.engine or wanted.engine
    if engine == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ValueError(
            f"--engine: {arguments.like} was drawn with OpenVINO, which isn't installed; pip install openvino, or draw "
            "it with --engine torch, which rounds otherwise"
        )
    pipeline, model = find(arguments.model, wanted.model, wanted.dtype or "float32", engine)
    if engine == "openvino":
        pipeline.enable_openvino()
    steering: dict[str, Any] = {}
    if wanted.classifier:
        classifier = NoisyClassifier.load(arguments.classifier)
        steering = {"classifier": classifier, "classifier_scale": wanted.classifier_scale}
    asked = wanted.arguments()
    drawn: Any = pipeline(**asked, **steering)
    told = {key: value for key, value in asked.items() if key not in ("width", "height", "num_images_per_prompt")}
    recipe.stamp(drawn.images, pipeline, model, **told, **steering)
    out = arguments.out or Path("samples.png")
    before = arguments.like.read_bytes()  # which --out may be about to replace
    recipe.save(drawn.images[wanted.place], out)
    if out.read_bytes() == before:
        print(f"the same picture, byte for byte, is in {out}")
        return
    again = recipe.read(out)
    then, now = (
        {"model": r.model, "scheduler": r.scheduler, "engine": r.engine or "torch", "classifier": r.classifier,
         "drawn_with": r.drawn_with} for r in (wanted, again)
    )  # fmt: skip
    reasons = [f"{name}: {then[name]} then, {now[name]} now" for name in then if then[name] != now[name]]
    reasons = reasons or ["another machine rounds otherwise"]
    print(f"drawn again in {out}, but not the same file\n  " + "\n  ".join(reasons))


def load(folder: str, dtype: str, engine: str | None) -> Any:
    """The pipeline on the best device for an engine, in a dtype of this name or, for auto, in the one that suits it."""
    import torch

    from ldm import LDMPipeline
    from ldm.system import devices

    device = torch.device("cpu") if engine == "openvino" else devices.best_device()
    kind = devices.best_dtype(device) if dtype == "auto" else devices.dtype(dtype)
    return LDMPipeline.from_pretrained(folder, dtype=kind).to(device)


def find(named: str | None, sha256: str, dtype: str, engine: str | None) -> tuple[Any, str]:
    """The pipeline that was named, or the one of this hash among models/ and runs/; and its hash.

    Args:
        dtype: of the networks' weights, on which the hash depends.
        engine: what it is going to be drawn with.
    Raises:
        ValueError: if none was named and none of them has it.
    """
    from ldm.models.fingerprint import model_sha256

    folders = [str(path.parent) for pattern in MODELS for path in sorted(Path().glob(pattern))]
    for folder in [named] if named else folders:
        pipeline = load(folder, dtype, engine)
        found = model_sha256(pipeline)
        if found == sha256:
            return pipeline, found
        if named:
            print(f"warning: {named} isn't the model that drew it (SHA-256 {found[:12]}…, "
                  f"not {sha256[:12]}…), so it will draw another picture", file=sys.stderr)  # fmt: skip
            return pipeline, found
    tried = ", ".join(folders) or "there are no models"
    raise ValueError(f"model: none in models/ and runs/ has the SHA-256 {sha256[:12]}… ({tried}); name the folder")


def file_name(seed: int, caption: str | None) -> str:
    """00007-red-heart.png."""
    words = re.sub(r"[^\w]+", "-", caption or "", flags=re.ASCII).strip("-").lower()[:60]
    return f"{seed:05d}-{words}.png" if words else f"{seed:05d}.png"
