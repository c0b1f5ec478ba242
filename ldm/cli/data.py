"""`ldm data openmoji | emoji | scenes | check | caption | dedupe | cache`: make a data set, check and complete one."""

from __future__ import annotations

import argparse
import sys

from ldm.cli import caption, dedupe
from ldm.cli.parser import Command, add_commands, path, place


def add_openmoji(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=place, metavar="FOLDER", help="the folder to make")
    add("--size", type=int, default=64, help="edge of the pictures in pixels (default: 64)")
    add(
        "--subset",
        choices=("all", "demo"),
        default="all",
        help="all 3,939 drawings, or the hundreds of the demo (default: all)",
    )
    add(
        "--condition",
        choices=("outline", "colors"),
        help="also render a second picture of each, for data.condition_column: its lines, or its fills",
    )


def run_openmoji(arguments: argparse.Namespace) -> None:
    from ldm.data.emoji.openmoji import build

    out = arguments.out
    made = build(out, arguments.size, arguments.subset, arguments.condition)
    print(f"{made} pictures with captions are in {out} (CC BY-SA 4.0, see {out}/ATTRIBUTION.md)")


def add_emoji(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=place, metavar="FOLDER", help="the folder to make")
    add("--size", type=int, default=256, help="edge in pixels (default: 256); a training shrinks them to its data.size")
    add(
        "--style",
        type=style,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another designer's emoji: an unpacked icon package (npm pack @iconify-json/noto); may be repeated",
    )


def style(text: str) -> tuple[str, str]:
    """NAME=FOLDER => both."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, such as noto=icons/noto, got {text!r}")
    return name, str(place(folder))


def run_emoji(arguments: argparse.Namespace) -> None:
    from ldm.data.emoji.compositions import build

    out = arguments.out
    made = build(out, dict(arguments.style), arguments.size)
    print(f"{made} pictures with captions are in {out} (authors and licenses: {out}/ATTRIBUTION.md)")


def add_scenes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=place, metavar="FOLDER", help="the folder to make")
    add("--size", type=int, default=64, help="edge of a drawing in pixels; a pair is twice as long (default: 64)")
    add("--drawings", type=int, metavar="N", help="take only so many drawings, at least 8 (default: all)")


def run_scenes(arguments: argparse.Namespace) -> None:
    from ldm.data.emoji.scenes import build

    out = arguments.out
    made = build(out, arguments.size, arguments.drawings)
    print(f"{made} pictures with captions are in {out} (CC BY-SA 4.0, see {out}/ATTRIBUTION.md)")


def add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=place, help="a captioned folder, WebDataset shards, or a Hub data set")
    add("--image-column", default="image", help="where a Hub data set has its pictures (default: image)")
    add("--size", type=int, default=64, help="edge in pixels to train at (default: 64); smaller pictures are named")
    add("--caption-columns", nargs="+", default=["text"], metavar="COLUMN", help="the captions (default: text)")
    add("--label-column", metavar="COLUMN", help="the classes")
    add("--condition-column", metavar="COLUMN", help="the paths of second pictures")
    add("--number-columns", nargs="+", default=[], metavar="COLUMN", help="the numbers")
    add("--repeats-column", metavar="COLUMN", help="how often an epoch shows a picture")


def run_check(arguments: argparse.Namespace) -> None:
    from ldm.data.conditioned import ConditionedPictures
    from ldm.data.dataset import read_captioned, require_training
    from ldm.data.rows import count

    pictures = read_captioned(
        arguments.source, image_column=arguments.image_column, caption_columns=arguments.caption_columns
    )
    require_training(pictures)
    ConditionedPictures.read(
        pictures,
        arguments.label_column,
        arguments.condition_column,
        number_columns=arguments.number_columns,
        repeats_column=arguments.repeats_column,
    )
    for warning in pictures.unfit(arguments.size):
        print(f"warning: {warning}")
    captions = {caption for row in pictures for caption in row.captions}
    print(
        f"{arguments.source} is fine: {count(len(pictures), 'picture')}, {count(len(captions), 'different caption')}, "
        f"{count(len(pictures.heldout), 'picture')} held out"
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, help="RUN/cache, or the folder that data.cache names")


def run_cache(arguments: argparse.Namespace) -> None:
    from ldm.data.cache.store import SUFFIX, DamagedError, Kind, Store
    from ldm.data.rows import count
    from ldm.system.files import gib

    stores = sorted(arguments.folder.glob(f"*{SUFFIX}"))
    if not stores:
        raise ValueError(
            f"{arguments.folder} holds no cache; expected RUN/cache of a run, or what its data.cache names"
        )
    broken = 0
    for file in stores:
        size = gib(file.stat().st_size)
        try:
            store = Store(file, Kind.of(file))
            bad = sum(1 for _ in store.damaged(progress=True))
            facts = ", ".join(f"{key} {value}" for key, value in store.kind.what.items())
            state = f"{count(bad, 'record')} damaged" if bad else "all whole"
            print(f"{file.stem}: {count(len(store), 'record')}, {size}, {state}; {facts}")
        except DamagedError as damage:
            bad = 1
            print(f"{file.stem}: {size}; {damage}")
        broken += bool(bad)
    if broken:
        sys.exit("error: the next run that uses this cache encodes anew what is damaged")


COMMANDS = {
    "openmoji": Command(
        "render the OpenMoji drawings into a captioned folder",
        "ldm data openmoji data/openmoji --size 64",
        add_openmoji,
        run_openmoji,
    ),
    "emoji": Command(
        "render nouns x colors x styles x people: OpenMoji, other designers' emoji, recolored drawings, outlines",
        """
ldm data emoji data/emoji                              (OpenMoji alone, offline)
ldm data emoji data/emoji --style noto=icons/noto      (with another style; `make data-emoji` fetches three)""",
        add_emoji,
        run_emoji,
    ),
    "scenes": Command(
        "render wide and tall pictures: two OpenMoji drawings beside or above each other, for data.buckets",
        "ldm data scenes data/scenes --size 64",
        add_scenes,
        run_scenes,
    ),
    "check": Command(
        "report every problem of a data set, by file and row; exit status 1 if there is any",
        "ldm data check my_pictures",
        add_check,
        run_check,
    ),
    "caption": caption.COMMAND,
    "dedupe": dedupe.COMMAND,
    "cache": Command(
        "list what a cache of latents holds and check every record; exit status 1 if any is damaged",
        "ldm data cache runs/demo/cache",
        add_cache,
        run_cache,
    ),
}
COMMAND = Command(
    "make and check data sets",
    """
ldm data openmoji data/openmoji-demo --subset demo   (some hundreds of drawings with captions, offline)
ldm data check my_pictures                           (every problem at once, by file and row)
ldm data cache runs/demo/cache                       (what a run has encoded)""",
    lambda parser: add_commands(parser, COMMANDS),
)
