"""`ldm walk`: two prompts or two seeds in; the pictures between them out, as a strip, an animation or a film."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.find import load
from ldm.cli.lora import add_lora_option, check_lora_engine, load_loras
from ldm.cli.parser import PICTURES, Command, path, place, positive
from ldm.cli.sample import SETTINGS, add_number_option, add_settings
from ldm.data.animation import MOTION, check_motion, save_motion, strip
from ldm.pipelines import import_networks
from ldm.system.files import check_writable

OUT = Path("walk.gif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", type=place, help="a pipeline folder (RUN/pipeline) or a Hub id")
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="one for each end, or one for all pictures; none for a model without text",
    )
    add("--frames", type=positive, default=16, metavar="N", help="pictures, both ends included (default: 16)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="one, or two to walk between (default: 0)")
    add(
        "--out",
        type=walk_file,
        default=OUT,
        metavar="FILE",
        help=f"an animation (.gif), a film (.mp4), or a strip: {', '.join(PICTURES)} (default: {OUT})",
    )
    add("--fps", type=positive, default=8, metavar="N", help="pictures a second (default: 8)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures generated at once (default: 16)")
    add("--negative-prompt", metavar="PROMPT", help="what guidance moves away from; one, for all pictures")
    add("--class-label", metavar="CLASS", help="for a model of classes")
    add_number_option(add)
    add_lora_option(add)
    add_settings(parser)


def walk_file(text: str) -> Path:
    """A file to write; its suffix names the format."""
    found = path(text)
    if found.suffix.lower() not in (*MOTION, *PICTURES) or found.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a file that ends in {', '.join((*MOTION, *PICTURES))}")
    return found


def run(arguments: argparse.Namespace) -> None:
    check_motion(arguments.out)
    check_writable(arguments.out.parent)
    check_lora_engine(arguments)
    import_networks()
    from tqdm import tqdm

    from ldm.pipelines.walks import walk
    from ldm.sharing import png_metadata

    pipeline = load(arguments.model, arguments.dtype or "auto", arguments.engine)
    load_loras(pipeline, arguments.lora, arguments.steps)
    if arguments.engine == "openvino":
        pipeline.enable_openvino()
    pipeline.set_progress_bar_config(disable=True)
    typed = {name: getattr(arguments, option) for option, name in SETTINGS.items()}
    typed |= {"class_label": arguments.class_label, "numbers": dict(arguments.numbers) if arguments.numbers else None}
    with tqdm(total=arguments.frames, unit="picture") as bar:
        pictures = walk(
            pipeline,
            arguments.prompts,
            arguments.seeds,
            arguments.frames,
            batch_size=arguments.batch_size,
            on_batch=bar.update,
            **{name: value for name, value in typed.items() if value is not None},
        )
    if arguments.out.suffix.lower() in MOTION:
        save_motion(pictures, arguments.out, arguments.fps)
    else:
        png_metadata.save(strip(pictures), arguments.out)
    print(f"{len(pictures)} pictures are in {arguments.out}")


COMMAND = Command(
    "generate the pictures between two prompts or two seeds: a strip, a GIF or a film",
    """
ldm walk runs/demo/pipeline "red heart" "pizza" --out walk.gif                   (from prompt to prompt)
ldm walk runs/demo/pipeline "rocket" --seeds 1 2 --frames 9 --out walk.png       (from seed to seed, as a strip)
ldm walk runs/demo/pipeline "red heart" "pizza" --frames 60 --fps 24 --out walk.mp4""",
    add_arguments,
    run,
    "[OPTION ...] MODEL [PROMPT [PROMPT]]",
)
