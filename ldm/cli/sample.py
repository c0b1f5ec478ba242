"""`ldm sample`: prompts in; a picture, a captioned grid, or a folder of pictures out."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.cli.find import TRAIN_ONE, find_by_hash, load
from ldm.cli.lora import add_lora_option, check_lora_engine, load_by_hash, load_loras
from ldm.cli.parser import PICTURES, Command, folder, path, picture_file, place, positive
from ldm.inference.defaults import ENGINES, SAMPLERS, STOCK_GUIDANCE_SCALE, STOCK_STEPS
from ldm.pipelines import import_networks
from ldm.system.checks import DTYPES
from ldm.system.files import check_writable

OUT = Path("samples.png")
#: Options => arguments of the pipeline; only those that were typed are passed on.
SETTINGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "sampler": "sampler",
    "negative_prompt": "negative_prompt",
    "dynamic_thresholding": "dynamic_thresholding",
}
SIZES = {"width": "width", "height": "height"}  # in pixels; options and arguments as well
CHANGES = ("seed", *SETTINGS, *SIZES, "class_label", "numbers")  # of a picture's settings, with --like
#: Options that --like can't obey, since it makes one picture.
NOT_WITH_LIKE = ("each", "images_per_prompt", "columns", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        type=place,
        help="a pipeline folder (RUN/pipeline) or a Hub id; --like finds it in models/ and runs/",
    )
    add("prompts", nargs="*", metavar="PROMPT", help="what to generate; none for a model without text")
    add(
        "--out",
        type=picture_file,
        metavar="FILE",
        help=f"the picture, or a captioned grid of several: {', '.join(PICTURES)} (default: {OUT})",
    )
    add("--each", type=folder, metavar="FOLDER", help="write every picture to a PNG file of its own")
    add(
        "--like",
        type=path,
        metavar="PICTURE",
        help="generate a picture again by the settings in its PNG file; options change them",
    )
    add_lora_option(add)
    add("--upscale", action="store_true", help="make the pictures larger with the upscaler in the model's folder")
    add("--seed", type=int, help="of the first picture; picture i has seed + i (default: 0)")
    add("--images-per-prompt", type=positive, metavar="N", help="pictures of each prompt (default: 1)")
    add(
        "--batch-size",
        type=positive,
        metavar="N",
        help="pictures generated at once, which bounds memory; in a batch of another size a picture may differ by "
        "rounding, 1/255 of a channel (default: 16)",
    )
    add("--columns", type=positive, metavar="N", help="pictures in a row of the grid (default: 4)")
    for edge in SIZES:
        add(f"--{edge}", type=int, metavar="PIXELS", help=f"of the pictures (default: the {edge} of the training)")
    add_settings(parser)
    add = parser.add_argument_group("conditioning").add_argument
    add("--negative-prompt", metavar="PROMPT", help="what guidance moves away from; one, for all pictures")
    add(
        "--class-label",
        nargs="+",
        metavar="CLASS",
        help="the class to generate, or to steer towards; one for all pictures or one each",
    )
    add_number_option(add)
    add("--condition", type=path, metavar="PICTURE", help="the second picture, for a model that is conditioned on one")
    add(
        "--weaker", type=place, metavar="MODEL", help="a weaker model of the same data to move away from (autoguidance)"
    )
    add("--autoguidance-scale", type=float, metavar="W", help="how far, in place of --guidance-scale (default: 2)")
    add("--classifier", type=path, metavar="FOLDER", help="a classifier (RUN/classifier) that steers to --class-label")
    add("--classifier-scale", type=float, metavar="W", help="how strongly it steers (default: 1)")


def add_number_option(add: Callable[..., Any]) -> None:
    """--number, as often as the model has columns; `numbers` is a list of pairs, or None."""
    add(
        "--number",
        dest="numbers",
        action="append",
        type=number,
        metavar="COLUMN=NUMBER",
        help="what the model is conditioned on besides; once for each of its columns",
    )


def number(text: str) -> tuple[str, float]:
    """COLUMN=NUMBER => both."""
    column, _, value = text.rpartition("=")
    try:
        return column, float(value) if column else float("")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected COLUMN=NUMBER, such as size=0.3, got {text[:60]!r}") from None


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates: what computes, steps, sampler and guidance."""
    add = parser.add_argument
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        help="what the networks compute in; auto is bfloat16 where the device is faster in it, else float32, in which "
        "the picture is stock diffusers' to the bit (default: auto)",
    )
    add(
        "--engine",
        choices=ENGINES,
        help="what computes U-Net and VAE decoder; openvino takes a second to start, is then faster on a CPU, and "
        "gives the same picture but for rounding (default: torch)",
    )
    add = parser.add_argument_group(
        "settings",
        "Without any of --steps, --guidance-scale and --guidance-interval the model's own defaults apply, all three\n"
        f"of them. With one of them, the others are those of stock diffusers: {STOCK_STEPS} steps, guidance scale\n"
        f"{STOCK_GUIDANCE_SCALE}, everywhere. Of a student (MODEL/few_steps) they are its own.",
    ).add_argument
    add("--steps", type=int, metavar="N", help="sampling steps")
    add("--sampler", choices=SAMPLERS, help="how the steps are taken (default: the model's scheduler, DPM-Solver++)")
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="classifier-free guidance, how closely to follow the prompt; 1 is off",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where LOW <= t/T < HIGH; 0 1 is everywhere",
    )
    add(
        "--dynamic-thresholding",
        type=float,
        metavar="Q",
        help="clamp predictions at this quantile, such as 0.995, and bring it to 1; for latents within [-1, 1]",
    )


def run(arguments: argparse.Namespace) -> None:
    arguments.numbers = None if arguments.numbers is None else dict(arguments.numbers)
    if arguments.like is None and arguments.model is None:
        raise ValueError(f"model: name a pipeline folder or a Hub id, then the prompts; without a model, {TRAIN_ONE}")
    for made in (arguments.out and arguments.out.parent, arguments.each):
        if made is not None:
            check_writable(made)
    if arguments.classifier_scale is not None and arguments.classifier is None:
        raise ValueError("--classifier-scale: there is no --classifier to scale")
    if arguments.autoguidance_scale is not None and arguments.weaker is None:
        raise ValueError("--autoguidance-scale: there is no --weaker model to move away from")
    check_lora_engine(arguments)
    import_networks()
    if arguments.like is None:
        generate(arguments)
    else:
        generate_again(arguments)


# --- prompts => pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What is generated at once: `count` pictures of each of these prompts and classes, from seeds that count up.

    Attributes:
        places: which of all the prompts and classes.
    """

    places: slice
    count: int
    seed: int


def batches(prompts: int, count: int, seed: int, size: int) -> Iterator[Batch]:
    """`count` pictures of each of so many prompts in batches of at most `size`; picture i of all has seed + i."""
    if count > size:
        for i in range(prompts):
            for done in range(0, count, size):
                yield Batch(slice(i, i + 1), min(size, count - done), seed + i * count + done)
    else:
        for i in range(0, prompts, size // count):
            yield Batch(slice(i, i + size // count), count, seed + i * count)


def generate(arguments: argparse.Namespace) -> None:
    """Generate the prompts into a picture, a grid or a folder."""
    from tqdm import tqdm

    from ldm.data.grid import captioned_grid, full_edge
    from ldm.models.fingerprint import model_sha256
    from ldm.pipelines.inputs import one_each
    from ldm.sharing import png_metadata

    pipeline = load(arguments.model, arguments.dtype or "auto", arguments.engine)
    load_loras(pipeline, arguments.lora, arguments.steps)
    inputs, count = max(1, len(arguments.prompts), len(arguments.class_label or ())), arguments.images_per_prompt or 1
    prompts = one_each("prompts", arguments.prompts or [None], inputs)
    labels = one_each("--class-label", arguments.class_label or [None], inputs)
    typed = {name: getattr(arguments, option) for option, name in {**SETTINGS, **SIZES}.items()}
    settings = conditions(arguments) | {name: value for name, value in typed.items() if value is not None}
    seed, size = arguments.seed or 0, arguments.batch_size or 16
    model = upscaler = None
    if arguments.upscale:
        settings["upscale"] = True
        upscaler = model_sha256(pipeline.upscaler)
    pipeline = pipeline.maker_of(settings)
    if arguments.engine == "openvino":
        pipeline.enable_openvino()
    if arguments.each is not None or inputs * count == 1:  # files that carry their settings, each prompt alone
        model, size = model_sha256(pipeline, adapters=False), min(size, count)
    captions = [prompt or label or "" for prompt, label in zip(prompts, labels, strict=True) for _ in range(count)]
    parts = list(batches(inputs, count, seed, size))
    pipeline.set_progress_bar_config(disable=len(parts) > 1)
    pictures: list[Any] = []
    with tqdm(total=inputs * count, unit="picture", disable=len(parts) == 1) as bar:
        for part in parts:
            given = {**settings, "seed": part.seed}
            for name, values in (("prompt", prompts[part.places]), ("class_label", labels[part.places])):
                if values[0] is not None:
                    given[name] = values if model is None else values[0]
            made: Any = pipeline(**given, num_images_per_prompt=part.count)
            if model is not None:
                png_metadata.stamp(made.images, pipeline, model, upscaler=upscaler, **given)
            if arguments.each is not None:
                for i, picture in enumerate(made.images, part.seed):
                    png_metadata.save(picture, arguments.each / file_name(i, captions[i - seed]))
            pictures += made.images
            bar.update(len(made.images))

    out = arguments.out or (None if arguments.each else OUT)
    if out is not None:
        grid = len(pictures) > 1
        columns, edge = arguments.columns or 4, full_edge(pictures)
        shown = captioned_grid(pictures, captions, columns=columns, edge=edge) if grid else pictures[0]
        png_metadata.save(shown, out)
    where = " and ".join(str(place) for place in (arguments.each, out) if place is not None)
    print(f"{len(pictures)} pictures are in {where}" if len(pictures) > 1 else f"the picture is in {where}{note(out)}")


def note(out: Path | None) -> str:
    """What there is to know about a single picture's file."""
    return "" if out is None or out.suffix.lower() == ".png" else " (its settings are not: only PNG files hold them)"


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """The picture and the classifier that were named, as arguments of the pipeline."""
    from ldm.data.images import decode
    from ldm.models.classifier import NoisyClassifier

    given: dict[str, Any] = {} if arguments.numbers is None else {"numbers": arguments.numbers}
    if arguments.weaker is not None:
        given |= {"weaker": arguments.weaker, "autoguidance_scale": arguments.autoguidance_scale}
    if arguments.condition is not None:
        given["condition"] = decode(arguments.condition.read_bytes())
    if arguments.classifier is not None:
        given["classifier"] = NoisyClassifier.load(arguments.classifier)
        given["classifier_scale"] = 1.0 if arguments.classifier_scale is None else arguments.classifier_scale
    return given


def file_name(seed: int, caption: str | None) -> str:
    """00007-red-heart.png."""
    words = re.sub(r"[^\w]+", "-", caption or "", flags=re.ASCII).strip("-").lower()[:60]
    return f"{seed:05d}-{words}.png" if words else f"{seed:05d}.png"


# --- a picture => the same picture -------------------------------------------------------------------


def generate_again(arguments: argparse.Namespace) -> None:
    """Generate a picture by its own settings, but for those that were typed; report whether it is the same file."""
    from ldm.models.fingerprint import model_sha256
    from ldm.sharing import png_metadata

    for option in NOT_WITH_LIKE:
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: --like makes one picture; leave it out")
    if arguments.prompts:
        raise ValueError(f"prompts: {arguments.like} has its own; leave them out, or leave --like out")
    wanted = png_metadata.read(arguments.like)
    if wanted.noise_level is not None:
        raise ValueError(
            f"{arguments.like}: it was upscaled from a picture that the file does not hold (SHA-256 "
            f"{str(wanted.image)[:12]}…); run `ldm upscale` with that picture"
        )
    if wanted.image:
        raise ValueError(
            f"{arguments.like}: it is an edit of a picture that the file does not hold (SHA-256 {wanted.image[:12]}…), "
            "so it can't be repeated from it alone; run `ldm edit` with that picture"
        )
    if wanted.condition and arguments.condition is None:
        raise ValueError(
            f"{arguments.like}: it was made of another picture, which the file does not hold; "
            "name that with --condition"
        )
    if wanted.classifier and arguments.classifier is None:
        raise ValueError(f"{arguments.like}: it was steered by a classifier; name it with --classifier")
    if wanted.weaker and arguments.weaker is None:
        raise ValueError(f"{arguments.like}: it was guided by a weaker model; name it with --weaker")
    if arguments.dtype is not None:
        raise ValueError(f"--dtype: with --like it is that of {arguments.like}; leave it out")
    engine = arguments.engine or wanted.engine
    if engine == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ValueError(
            f"--engine: {arguments.like} was made with OpenVINO, which is not installed; pip install openvino, or "
            "use --engine torch, which rounds otherwise"
        )
    changes = {name: getattr(arguments, name) for name in CHANGES if getattr(arguments, name) is not None}
    if "class_label" in changes:
        if len(arguments.class_label) > 1:
            raise ValueError("--class-label: --like makes one picture; expected one class")
        (changes["class_label"],) = arguments.class_label
    if "numbers" in changes:
        changes["numbers"] = {**(wanted.numbers or {}), **changes["numbers"]}
    settings = replace(wanted, **changes)
    if settings != wanted:  # another picture, so the others of its batch don't matter
        settings = replace(settings, pictures=1, place=0)
    extra = {name: value for name, value in conditions(arguments).items() if name != "numbers"}
    if "classifier" in extra and arguments.classifier_scale is None:
        extra["classifier_scale"] = wanted.classifier_scale or 1.0
    if "weaker" in extra and extra["autoguidance_scale"] is None and wanted.weaker:
        del extra["autoguidance_scale"]  # the picture's own

    pipeline, model = find_by_hash(arguments.model, wanted.model, wanted.dtype or "float32", engine, wanted.upscaler)
    if arguments.lora:
        load_loras(pipeline, arguments.lora, settings.steps)
    elif wanted.adapters:
        load_by_hash(pipeline, wanted.adapters, arguments.like)
    if engine == "openvino":
        pipeline.enable_openvino()
    given = settings.arguments() | extra | ({"upscale": True} if arguments.upscale else {})
    if "weaker" in extra:
        given.pop("guidance_scale", None)
    upscaler = model_sha256(pipeline.upscaler) if given["upscale"] else None
    made: Any = pipeline(**given)
    png_metadata.stamp(made.images, pipeline, model, upscaler=upscaler, **given)
    picture, out = made.images[settings.place], arguments.out or OUT
    before = arguments.like.read_bytes()  # which --out may be about to replace
    png_metadata.save(picture, out)
    if out.read_bytes() == before:
        print(f"the same picture, byte for byte, is in {out}")
        return
    differences = wanted.differences(png_metadata.of(picture, out))
    print("\n  ".join([f"the picture is in {out}{note(out)}; it is not the same file:", *differences]))


COMMAND = Command(
    "generate pictures from prompts: one picture, a captioned grid, or a folder",
    """
ldm sample runs/demo/pipeline "red heart" --out heart.png --seed 7   (a picture with its settings inside)
ldm sample runs/demo/pipeline "red heart" "pizza" --out grid.png     (a captioned grid)
ldm sample runs/demo/pipeline "red heart" "pizza" --each pictures    (a file for each)
ldm sample models/emoji "red heart" --upscale                        (through the upscaler behind the model)
ldm sample models/emoji/few_steps "red heart" --steps 4              (the student of few steps behind the model)
ldm sample --like heart.png --out again.png                          (the same picture again, byte for byte)
ldm sample --like heart.png --seed 8                                 (the same settings, another seed)
ldm sample models/emoji "pizza, ink style" --lora runs/ink/lora:0.8   (with a LoRA, at 0.8 of its strength)""",
    add_arguments,
    run,
    "[OPTION ...] MODEL [PROMPT ...]\n       ldm sample [OPTION ...] --like PICTURE [MODEL]",
)
