"""`ldm data dedupe`: pictures that a folder holds more than once, and a folder for the extra copies."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.parser import Command, path, picture_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=path, help="a folder of pictures")
    add(
        "--apply",
        action="store_true",
        help="move the extra copies with their captions; without it nothing changes",
    )
    add("--column", default="text", help="of the captions, in metadata files (default: text)")
    add("--to", type=path, metavar="FOLDER", help="where they go (default: FOLDER-duplicates, beside it)")
    add("--sheet", type=picture_file, metavar="FILE", help="the groups side by side (default: FOLDER-duplicates.png)")
    add(
        "--distance",
        type=distance,
        default=2.0,
        metavar="LEVELS",
        help="largest root mean square difference of thumbnails, of 255 levels (default: 2: a picture saved anew as a "
        "JPEG stays below it, most often)",
    )


def distance(text: str) -> float:
    """A number of levels from 0 to 255."""
    try:
        levels = float(text)
    except ValueError:
        levels = -1
    if not 0 <= levels <= 255:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 255, got {text[:20]!r}")
    return levels


def run(arguments: argparse.Namespace) -> None:
    from ldm.data.captioning import CaptionFolder
    from ldm.data.dataset import read_captioned
    from ldm.data.deduplication import (
        SHOWN,
        check_store,
        check_target,
        contact_sheet,
        movable,
        move_copies,
        report,
    )
    from ldm.data.duplicates import groups
    from ldm.data.rows import count

    folder: Path = arguments.folder
    beside = folder.resolve()
    to = arguments.to or beside.with_name(f"{beside.name}-duplicates")
    sheet = arguments.sheet or beside.with_name(f"{beside.name}-duplicates.png")
    if arguments.apply:
        check_target(folder, to)
    pictures = read_captioned(folder, caption_columns=(), holdout=0, on_bad="skip")
    if arguments.apply:
        check_store(pictures)
    captions = CaptionFolder.read(folder, arguments.column).captions if folder.is_dir() else {}
    captioned = [bool(captions.get(str(row.locator))) for row in pictures]
    found = movable(groups(pictures, arguments.distance, captioned), pictures)
    if not found:
        print(f"{folder}: {count(len(pictures), 'picture')}, none of them twice")
        return
    print(report(found, len(pictures)))
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(found, captions).save(sheet)
    first = f" (the first {SHOWN} groups of {len(found):,})" if len(found) > SHOWN else ""
    print(f"side by side: {sheet}{first}")
    names = [str(pair.second.locator) for group in found for pair in group]
    if not arguments.apply:
        print(f"nothing is changed; --apply moves {count(len(names), 'picture')} to {to}")
        return
    move_copies(folder, names, to)
    print(f"moved {count(len(names), 'picture')} to {to}, captions included")


COMMAND = Command(
    "find pictures that are there twice; with --apply, move the extra copies to another folder",
    """
ldm data dedupe my_pictures             (which ones, and a contact sheet)
ldm data dedupe my_pictures --apply     (the largest with a caption stays, the others go to my_pictures-duplicates)""",
    add_arguments,
    run,
)
