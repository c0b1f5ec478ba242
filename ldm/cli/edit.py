"""`ldm edit`: a picture and a prompt in; the picture changed, repainted where a mask says so, or continued."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.find import load
from ldm.cli.lora import add_lora_option, check_lora_engine, load_loras
from ldm.cli.parser import PICTURES, Command, folder, path, picture_file, place, positive
from ldm.cli.sample import SETTINGS, add_number_option, add_settings, batches, file_name, note
from ldm.pipelines import import_networks
from ldm.system.files import check_writable

OUT = Path("edited.png")
SIDES = ("left", "top", "right", "bottom")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", type=place, help="a pipeline folder (RUN/pipeline) or a Hub id")
    add("picture", metavar="PICTURE", type=path, help="the picture to change")
    add("prompt", nargs="?", metavar="PROMPT", help="what the result shows; none for a model without text")
    add(
        "--strength",
        type=float,
        metavar="S",
        help="how much of the picture is noised away, above 0, up to 1 (default: 0.8; 1 with --mask or --expand)",
    )
    add("--mask", type=path, metavar="PICTURE", help="where it is to be new (white); the rest keeps its pixels")
    add(
        "--expand", type=sides, metavar="SIDE=N,...", help="pixels to add at left, top, right, bottom: left=32,right=32"
    )
    add("--variations", type=positive, metavar="N", help="pictures to generate, each with the next seed (default: 1)")
    add(
        "--edge",
        type=positive,
        metavar="N",
        help="pixels of the shorter edge that the picture is resized to (default: what the model was trained at; with "
        "--expand as it is, if the larger canvas fits)",
    )
    add(
        "--out",
        type=picture_file,
        metavar="FILE",
        help=f"the picture, or a captioned grid of several after the source: {', '.join(PICTURES)} (default: {OUT})",
    )
    add("--each", type=folder, metavar="FOLDER", help="write every picture to a PNG file of its own")
    add("--seed", type=int, default=0, help="of the first picture (default: 0)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures generated at once (default: 16)")
    add("--negative-prompt", metavar="PROMPT", help="what guidance moves away from; one, for all pictures")
    add("--class-label", metavar="CLASS", help="for a model of classes")
    add_number_option(add)
    add_lora_option(add)
    add_settings(parser)


def sides(text: str) -> tuple[int, ...]:
    """left=32,right=32 => (32, 0, 32, 0)."""
    found: dict[str, int] = {}
    for part in text.split(","):
        side, _, pixels = part.strip().partition("=")
        if side not in SIDES or side in found or not pixels.isdecimal() or len(pixels) > 5:
            raise argparse.ArgumentTypeError(f"expected pixels by side, such as left=32,right=32, got {text[:60]!r}")
        found[side] = int(pixels)
    return tuple(found.get(side, 0) for side in SIDES)


def run(arguments: argparse.Namespace) -> None:
    picture, mask = read_picture(arguments.picture, hint="; the order is MODEL PICTURE PROMPT"), None
    if arguments.mask is not None:
        mask = read_picture(arguments.mask, "black")
        if mask.size != picture.size:
            wanted, found = ("{} x {}".format(*one.size) for one in (picture, mask))
            raise ValueError(f"{arguments.mask}: expected the size of {arguments.picture}, {wanted}, got {found}")
    if arguments.out is not None:
        for source in (arguments.picture, arguments.mask):
            if source is not None and arguments.out.resolve() == source.resolve():
                raise ValueError(f"--out {arguments.out}: is what the result is made of; name another file")
    for made in (arguments.out and arguments.out.parent, arguments.each):
        if made is not None:
            check_writable(made)
    check_lora_engine(arguments)
    import_networks()
    edit(arguments, picture, mask)


def read_picture(file: Path, background: str = "white", hint: str = "") -> Any:
    """A picture file => upright RGB. Raises a ValueError, with the hint if there is no such file."""
    from ldm.data.images import BadPictureError, decode

    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: expected a picture, got {found}{hint}")
    try:
        return decode(file.read_bytes(), background)
    except BadPictureError as error:
        raise ValueError(f"{file}: {error}") from None


def edit(arguments: argparse.Namespace, picture: Any, mask: Any) -> None:
    """Change the picture, and write what becomes of it."""
    from PIL import Image
    from tqdm import tqdm

    from ldm.data.grid import captioned_grid, full_edge
    from ldm.models.fingerprint import model_sha256
    from ldm.models.vae import downsampling
    from ldm.pipelines.editing import default_strength
    from ldm.sharing import png_metadata

    pipeline = load(arguments.model, arguments.dtype or "auto", arguments.engine)
    load_loras(pipeline, arguments.lora, arguments.steps)
    if arguments.engine == "openvino":
        pipeline.enable_openvino()
    if arguments.prompt is None and pipeline.tokenizer is not None:
        raise ValueError("PROMPT: this model generates from text; describe the result")
    if pipeline.inpaints and arguments.mask is None and arguments.expand is None:
        raise ValueError("--mask: this model fills in masked parts; give --mask PICTURE or --expand SIDE=N")
    size = result_size(arguments, picture.size, pipeline, downsampling(pipeline.vae))
    pipeline.check_edges("--edge" if arguments.edge else str(arguments.picture), size[1], size[0])  # before resizing
    if size != picture.size:
        before, after = ("{} x {}".format(*one) for one in (picture.size, size))
        print(f"{arguments.picture}: resized from {before} to {after}; --edge chooses another size")
    source = picture.resize(size, Image.Resampling.LANCZOS)
    source_mask = None if mask is None else mask.resize(size, Image.Resampling.LANCZOS)

    typed = {name: getattr(arguments, option) for option, name in SETTINGS.items()}
    typed |= {"prompt": arguments.prompt, "class_label": arguments.class_label, "expand": arguments.expand}
    typed["numbers"] = dict(arguments.numbers) if arguments.numbers else None
    settings = {name: value for name, value in typed.items() if value is not None}
    settings["strength"] = arguments.strength
    if arguments.strength is None:
        settings["strength"] = default_strength(arguments.mask, arguments.expand)
    model, count = model_sha256(pipeline, adapters=False), arguments.variations or 1
    parts = list(batches(1, count, arguments.seed, arguments.batch_size))
    pipeline.set_progress_bar_config(disable=len(parts) > 1)
    pictures: list[Any] = []
    for part in tqdm(parts, unit="batch", disable=len(parts) == 1):
        given = {**settings, "seed": part.seed}
        made = pipeline(**given, image=source, mask_image=source_mask, num_images_per_prompt=part.count).images
        png_metadata.stamp(made, pipeline, model, **given, image=picture, mask_image=mask)
        pictures += made
    if arguments.each is not None:
        for i, one in enumerate(pictures, arguments.seed):
            png_metadata.save(one, arguments.each / file_name(i, arguments.prompt or arguments.class_label))
    out = arguments.out or (None if arguments.each else OUT)
    if out is not None:
        captions = [arguments.picture.name, *(f"seed {arguments.seed + i}" for i in range(count))]
        grid = [source, *pictures]
        shown = captioned_grid(grid, captions, edge=full_edge(pictures)) if count > 1 else pictures[0]
        png_metadata.save(shown, out)
    where = " and ".join(str(place) for place in (arguments.each, out) if place is not None)
    print(f"{count} pictures are in {where}" if count > 1 else f"the picture is in {where}{note(out)}")


def result_size(arguments: argparse.Namespace, size: tuple[int, int], pipeline: Any, factor: int) -> tuple[int, int]:
    """The size that a picture is resized to: the training's, or as it is where the expanded canvas is no larger."""
    trained = min(pipeline.edge("height"), pipeline.edge("width"))
    if arguments.edge is None and arguments.expand is not None and not any(side % factor for side in size):
        left, top, right, bottom = arguments.expand
        if min(size[0] + left + right, size[1] + top + bottom) <= trained:
            return size
    return fitted(size, arguments.edge or trained, factor)


def fitted(size: tuple[int, int], edge: int, factor: int) -> tuple[int, int]:
    """A size whose shorter side is `edge`, nearest to the same shape in multiples of `factor`."""
    width, height = (max(1, round(side * edge / min(size) / factor)) * factor for side in size)
    return width, height


COMMAND = Command(
    "change a picture: as a whole, where a mask is white, or beyond its edges",
    """
ldm edit runs/demo/pipeline cat.png "smiling face" --strength 0.6          (image-to-image)
ldm edit runs/demo/pipeline cat.png "smiling face" --variations 8          (a grid of eight seeds)
ldm edit runs/demo/pipeline cat.png "sunglasses" --mask mask.png           (new where the mask is white)
ldm edit runs/demo/pipeline cat.png "cat face" --expand left=32,right=32   (a larger picture)""",
    add_arguments,
    run,
    "[OPTION ...] MODEL PICTURE [PROMPT]",
)
