"""`ldm upscale`: small pictures in, large ones out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.edit import read_picture
from ldm.cli.parser import PICTURES, Command, path, place, positive
from ldm.inference.defaults import SAMPLERS
from ldm.pipelines import import_networks
from ldm.system.checks import DTYPES
from ldm.system.files import check_writable

OUT = Path("upscaled")
#: Options => arguments of the pipeline; only those that were typed are passed on.
SETTINGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "sampler": "sampler",
    "negative_prompt": "negative_prompt",
    "noise_level": "noise_level",
    "tile": "tile",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        type=place,
        help="an upscaler (RUN/pipeline), or a pipeline that has one in its folder upscaler/; a folder or a Hub id",
    )
    add("pictures", metavar="PICTURE", nargs="*", type=path, help="pictures, and folders of pictures")
    add(
        "--out",
        type=path,
        metavar="PLACE",
        help=f"a folder, or for one picture a file: {', '.join(PICTURES)} (default: {OUT}/)",
    )
    add("--prompt", help="what the pictures show (default: the prompt in a PNG file of `ldm sample`)")
    add("--negative-prompt", metavar="PROMPT", help="what guidance moves away from; one, for all pictures")
    add(
        "--noise-level",
        type=int,
        metavar="N",
        help="of the noise that a small picture is put under: more gives details less bound to it (default: 20)",
    )
    add("--steps", type=int, metavar="N", help="sampling steps (default: the model's)")
    add("--guidance-scale", type=float, metavar="W", help="how closely to follow the prompt; 1 is off")
    add("--sampler", choices=SAMPLERS, help="how the steps are taken (default: the model's scheduler)")
    add("--seed", type=int, default=0, help="of the first picture; picture i has seed + i (default: 0)")
    add("--batch-size", type=positive, default=8, metavar="N", help="pictures upscaled at once (default: 8)")
    add(
        "--tile",
        type=positive,
        metavar="N",
        help="pixels of a small picture's edge that the network sees at once; larger ones are cut into overlapping "
        "tiles (default: what it was trained at)",
    )
    add("--dtype", choices=("auto", *DTYPES), help="what the networks compute in (default: auto)")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.pictures:
        if Path(arguments.model).suffix.lower() in PICTURES:
            raise ValueError(f"model: {arguments.model} is a picture; the order is: ldm upscale MODEL PICTURE ...")
        raise ValueError(f"pictures: name what to make larger: ldm upscale {arguments.model} PICTURE ...")
    files = picture_files(arguments.pictures)
    pictures = read_pictures(files)
    outs = places(files, arguments.out or OUT)
    check_writable(outs[0].parent)
    import_networks()
    upscale(arguments, files, pictures, outs)


def picture_files(named: list[Path]) -> list[Path]:
    """The files that were named, and the picture files in the folders that were."""
    found: list[Path] = []
    for one in named:
        if one.is_dir():
            inside = sorted(file for file in one.iterdir() if file.suffix.lower() in PICTURES)
            if not inside:
                raise ValueError(f"{one}: expected pictures in the folder ({', '.join(PICTURES)}), it has none")
            found += inside
        else:
            found.append(one)
    return found


def read_pictures(files: list[Path]) -> list[Any]:
    """The pictures in these files. Raises a ValueError that names all that can't be read."""
    pictures, faults = [], []
    for file in files:
        try:
            pictures.append(read_picture(file, hint="; the order is MODEL PICTURE ..."))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return pictures


def places(files: list[Path], out: Path) -> list[Path]:
    """Where the large picture of each file is written.

    Raises:
        ValueError: if two would be one file, or one would replace a picture that it is made of.
    """
    if len(files) == 1 and out.suffix and out.suffix.lower() not in PICTURES and not out.exists():
        raise ValueError(f"--out {out}: expected a folder, or a file that ends in {', '.join(PICTURES)}")
    if out.suffix.lower() in PICTURES and not out.is_dir():
        if len(files) > 1:
            raise ValueError(f"--out {out}: is one picture, and there are {len(files)} to upscale; name a folder")
        outs = [out]
    else:
        outs = [out / f"{file.stem}.png" for file in files]
    sources = {file.resolve() for file in files}
    written: dict[Path, Path] = {}
    for file, large in zip(files, outs, strict=True):
        if large.resolve() in sources:
            raise ValueError(f"--out {out}: {large} is one of the pictures to upscale; name another place")
        if large in written:
            raise ValueError(f"--out {out}: {written[large]} and {file} would both be {large.name}; upscale them apart")
        written[large] = file
    return outs


def upscale(arguments: argparse.Namespace, files: list[Path], pictures: list[Any], outs: list[Path]) -> None:
    """Upscale the pictures, and write each with its settings."""
    from ldm.cli.find import load_upscaler
    from ldm.models.fingerprint import model_sha256
    from ldm.sharing import png_metadata

    pipeline = load_upscaler(arguments.model, arguments.dtype or "auto")
    for file, picture in zip(files, pictures, strict=True):
        try:
            pipeline.check_edges(picture.height, picture.width)
        except ValueError as error:
            raise ValueError(f"{file}: {str(error).removeprefix('image: ')}") from None
    typed = {name: getattr(arguments, option) for option, name in SETTINGS.items()}
    settings = {name: value for name, value in typed.items() if value is not None}
    if arguments.prompt is not None and pipeline.tokenizer is None:
        raise ValueError("--prompt: this model knows no text; leave it out")
    prompts = [prompt_of(file) if arguments.prompt is None else arguments.prompt for file in files]
    model = model_sha256(pipeline, adapters=False)
    used = pipeline.resolve(arguments.steps, arguments.guidance_scale)
    recorded: dict[str, Any] = {
        **{name: value for name, value in settings.items() if name != "tile"},
        "num_inference_steps": used.num_inference_steps,
        "guidance_scale": used.guidance_scale,
        "noise_level": settings.get("noise_level", pipeline.noise_level),
    }
    made = pipeline.upscale(pictures, prompts, batch_size=arguments.batch_size, seed=arguments.seed, **settings).images
    for i, (large, small, out) in enumerate(zip(made, pictures, outs, strict=True)):
        given: dict[str, Any] = {"prompt": prompts[i]} if pipeline.tokenizer is not None and prompts[i] else {}
        png_metadata.stamp([large], pipeline, model, seed=arguments.seed + i, image=small, **given, **recorded)
        png_metadata.save(large, out)
    sizes = "{} x {} => {} x {}".format(*pictures[0].size, *made[0].size)
    where = outs[0] if len(outs) == 1 else outs[0].parent
    print(f"{len(made)} pictures are in {where}" if len(made) > 1 else f"the picture is in {where} ({sizes})")


def prompt_of(file: Path) -> str:
    """The prompt in a picture's file; "" without one."""
    from ldm.sharing import png_metadata

    try:
        return png_metadata.read(file).prompt or ""
    except ValueError:
        return ""


COMMAND = Command(
    "make pictures larger with an upscaler",
    """
ldm upscale runs/upscale/pipeline small.png --out large.png
ldm upscale models/demo pictures/ --out large/ --noise-level 60    (the upscaler in models/demo/upscaler)
ldm upscale runs/upscale/pipeline heart.png --prompt "red heart" --seed 7""",
    add_arguments,
    run,
    "[OPTION ...] MODEL PICTURE [PICTURE ...]",
)
