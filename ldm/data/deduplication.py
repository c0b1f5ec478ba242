"""Copies of pictures leave their folder for another, which is a data set of its own; nothing is deleted.

First the other folder is filled beside its name, whole, with pictures and their rows or .txt files. Then the metadata
files lose these rows, each in one step; last the pictures go. A process that is killed in between loses nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ldm.data.dataset import CaptionedPictures, Row
from ldm.data.duplicates import Pair
from ldm.data.grid import captioned_grid
from ldm.data.rows import BadDataError, count
from ldm.data.sources.folders import FolderStore, Listing, list_folder
from ldm.data.sources.rewriting import file_of, rewrite_table
from ldm.system.files import link_or_copy, put_in_place, temporary_beside

SHOWN = 40  # groups on a contact sheet
ACROSS = 4  # pictures of a group
NAME = 24  # characters of a path there


def movable(groups: Iterable[Sequence[Pair]], pictures: CaptionedPictures) -> list[list[Pair]]:
    """The groups without copies that another row names, such as the second picture of a conditioned model."""
    named = {
        os.path.normpath(cell)
        for row in pictures
        for cell in row.extra.values()
        if isinstance(cell, str) and not str(row.locator).endswith(cell)
    }

    def free(name: str) -> bool:
        parts = name.split("/")
        return named.isdisjoint("/".join(parts[i:]) for i in range(len(parts)))

    left = [[pair for pair in group if free(str(pair.second.locator))] for group in groups]
    return [group for group in left if group]


def check_target(folder: Path, to: Path) -> None:
    """Raise a ValueError unless copies can be moved out of a folder of pictures and into a new one."""
    if not folder.is_dir():
        raise BadDataError(f"{folder}: expected a folder of pictures; shards and Hub data sets are not changed")
    if to.exists():
        raise ValueError(f"--to: {to} is there already, perhaps of an earlier run; name a new folder")
    if to.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--to: {to} lies in {folder}, where its pictures would be found again; name one outside")


def check_store(pictures: CaptionedPictures) -> None:
    """Raise a BadDataError unless the pictures are files of a folder, which can be moved."""
    if not isinstance(pictures[0].store, FolderStore):
        raise BadDataError(f"{pictures.source}: its pictures lie in shards or tables, which are not changed")


def move_copies(folder: Path, names: Collection[str], to: Path) -> None:
    """Move pictures of a folder, with their rows or .txt files, into a new folder.

    Args:
        names: paths of the pictures, relative to the folder.
        to: the new folder; it holds them at the same paths, and is a data set itself.
    Raises:
        ValueError: if it is there, or lies in the folder of the pictures.
    """
    check_target(folder, to)
    listing = list_folder(str(folder))
    texts = [] if listing.metadata else _texts_of(names, listing)
    temporary = temporary_beside(to)
    for name in [*names, *texts]:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(folder / name, temporary / name)
    for table in listing.metadata:
        (temporary / table).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / table, temporary / table)
        _drop(temporary, table, names, keep=True)
    put_in_place(temporary, to)
    for table in listing.metadata:
        _drop(folder, table, names, keep=False)
    for name in [*names, *texts]:
        (folder / name).unlink()


def _texts_of(names: Collection[str], listing: Listing) -> list[str]:
    """The .txt files beside these pictures, of which no other picture is the owner."""
    staying = {os.path.splitext(name)[0] for name in listing.pictures if name not in names}
    stems = {os.path.splitext(name)[0] for name in names} - staying
    return [text for text in listing.texts if os.path.splitext(text)[0] in stems]


def _drop(root: Path, table: str, names: Collection[str], *, keep: bool) -> None:
    """Leave in a metadata file the rows of these pictures (`keep`), or all others; a file without rows goes."""
    folder = os.path.dirname(table)
    chosen = set(names)
    left = rewrite_table(str(root / table), lambda row: row if (file_of(folder, row) in chosen) is keep else None)
    if not left:
        (root / table).unlink()


def contact_sheet(groups: Sequence[Sequence[Pair]], captions: Mapping[str, Sequence[str]]) -> Image.Image:
    """The first groups, a line each: the picture that stays, then its copies with their distance.

    Args:
        captions: by locator; none of a picture that is absent.
    """
    blank = Image.new("RGB", (8, 8), "white")
    across = min(ACROSS, 1 + max(map(len, groups)))
    pictures, words = [], []

    def told(row: Row, head: str) -> str:
        name, size = str(row.locator), "{}x{}".format(*row.size)
        short = name if len(name) <= NAME else f"…{name[1 - NAME :]}"
        return f"{head}: {short} {size}, {next(iter(captions.get(name, ())), 'no caption')}"

    for group in groups[:SHOWN]:
        line = [(group[0].first.image(), told(group[0].first, "stays"))]
        line += [(pair.second.image(), told(pair.second, f"{pair.distance:.1f}")) for pair in group[: across - 1]]
        line += [(blank, "")] * (across - len(line))
        pictures += [picture for picture, _ in line]
        words += [caption for _, caption in line]
    return captioned_grid(pictures, words, columns=across, edge=192)


def report(groups: Sequence[Sequence[Pair]], pictures: int) -> str:
    """All groups, a line each, under a summary."""
    copies = [pair for group in groups for pair in group]
    same = sum(pair.distance == 0 for pair in copies)
    head = (
        f"{count(len(copies), 'extra copy').replace('copys', 'copies')} of {count(len(groups), 'picture')} among "
        f"{pictures:,}: {same:,} of the same thumbnail, {len(copies) - same:,} nearly"
    )
    lines = [
        f"{group[0].first.locator} ({'x'.join(map(str, group[0].first.size))}): "
        + ", ".join(f"{pair.second.locator} ({pair.distance:.1f})" for pair in group)
        for group in groups
    ]
    return "\n".join([head, *lines])
