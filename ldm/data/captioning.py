"""A folder of pictures of which some have no caption yet, and where new captions go.

In a folder with metadata files a caption fills the empty cell of its row, or comes in a new row of the nearest file
above; elsewhere it becomes the .txt beside its picture. Captions that are there stay, unless
`ldm data caption --overwrite` replaces them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ldm.data.images import BadPictureError, decode
from ldm.data.rows import BadCaptionError, BadDataError, Problem, captions_of, count, is_null
from ldm.data.sources.folders import PICTURES, FolderStore, Listing, caption_lines, list_folder
from ldm.data.sources.rewriting import file_of, rewrite_table
from ldm.data.sources.tables import BadRow, read_table
from ldm.system.files import write_in_place

#: What cameras, scanners and downloads put before a number.
_COUNTERS = re.compile(
    r"(?i)\b(screen ?shot .*\bat|img|image|dsc[nf]?|dscf|pxl|mvimg|pict?|picture|photo|scan|screenshot|untitled|"
    r"download|frame|file|copy|wp|gopr|p)\b"
)


@dataclass(frozen=True)
class CaptionFolder:
    """Pictures of a folder with the captions that they have.

    Attributes:
        folder: their folder.
        column: of the captions, in metadata files.
        captions: by path relative to the folder; none for those that have none yet.
    """

    folder: Path
    column: str
    captions: dict[str, tuple[str, ...]]
    listing: Listing
    store: FolderStore
    claimed: frozenset[str]  # pictures that have a row

    @classmethod
    def read(cls, folder: Path, column: str = "text") -> CaptionFolder:
        """List the pictures and their captions.

        Raises:
            BadDataError: if it is no folder of pictures; listing the rows that can't be read.
        """
        if not folder.is_dir():
            raise BadDataError(f"{folder}: expected a folder of pictures; shards and Hub data sets are not changed")
        listing, store = list_folder(str(folder)), FolderStore(str(folder))
        if not listing.pictures:
            raise BadDataError(f"{folder}: no pictures in it; expected files such as cat.png or photos/cat.jpg")
        problems: list[Problem] = []
        captions: dict[str, tuple[str, ...]] = {}
        seconds: set[str] = set()
        for table in listing.metadata:
            here = os.path.dirname(table)
            for number, row in read_table(listing.shown(table), set()):
                where = f"{listing.shown(table)} row {number}"
                try:
                    if isinstance(row, BadRow):
                        raise BadCaptionError(row.what)
                    name = store.locate(os.path.join(here, str(row["file_name"])) if row.get("file_name") else None)
                    captions[name] = captions.get(name, ()) + _captions(row.get(column))
                except (BadPictureError, BadCaptionError) as error:
                    problems.append(Problem(str(error), where))
                else:
                    others = (cell for key, cell in row.items() if key != "file_name" and isinstance(cell, str))
                    seconds.update(os.path.normpath(cell) for cell in others if cell.lower().endswith(tuple(PICTURES)))
        claimed = frozenset(captions)
        texts = {} if listing.metadata else {os.path.splitext(name)[0]: name for name in listing.texts}
        for picture in listing.pictures:
            if picture in captions or picture in seconds:
                continue
            text = texts.get(os.path.splitext(picture)[0])
            found = caption_lines(store.read(text), listing.shown(text)) if text else []
            if isinstance(found, Problem) and found.what != "caption is empty":
                problems.append(found)
            captions[picture] = () if isinstance(found, Problem) else tuple(found)
        if problems:
            raise BadDataError.listing(problems, str(folder), "Correct them first.")
        return cls(folder, column, captions, listing, store, claimed)

    def without(self) -> list[str]:
        """The pictures that have no caption."""
        return [name for name, captions in self.captions.items() if not captions]

    def image(self, name: str) -> Image.Image:
        """A picture, upright, mode RGB. Raises BadDataError, naming the file, if it can't be decoded."""
        try:
            return decode(self.store.read(name))
        except BadPictureError as error:
            raise BadDataError(f"{error}: {self.listing.shown(name)}") from None

    def write(self, captions: Mapping[str, str]) -> list[Path]:
        """Write a caption for each of these pictures, in place of those that they have.

        Returns:
            The metadata files that changed, or the .txt files.
        """
        if not self.listing.metadata:
            files = [(self.folder / name).with_suffix(".txt") for name in captions]
            for file, caption in zip(files, captions.values(), strict=True):
                write_in_place(file, f"{caption}\n".encode())
            return files
        tables = {os.path.dirname(table): table for table in self.listing.metadata}
        added: dict[str, list[dict[str, Any]]] = {}
        for name in [name for name in captions if name not in self.claimed]:
            above = (str(folder) for folder in PurePosixPath(name).parents)
            home = next((each for each in ("" if a == "." else a for a in above) if each in tables), "")
            tables.setdefault(home, "metadata.jsonl")
            row = {"file_name": os.path.relpath(name, home or "."), self.column: captions[name]}
            added.setdefault(home, []).append(row)
        changed = []
        for folder, table in tables.items():
            path = self.folder / table
            if not path.exists():
                write_in_place(path, b"")
            filled = 0

            def fill(row: dict[str, Any], folder: str = folder) -> dict[str, Any]:
                nonlocal filled
                caption = captions.get(file_of(folder, row) or "")
                filled += caption is not None
                return row if caption is None else {**row, self.column: caption}

            rewrite_table(str(path), fill, added.get(folder, ()))
            changed += [path] * bool(filled or added.get(folder))
        return changed


def _captions(cell: object) -> tuple[str, ...]:
    """The captions in a cell; none where it is empty. Raises BadCaptionError for one that can't be used."""
    if is_null(cell) or cell == [] or (isinstance(cell, str) and not cell.strip()):
        return ()
    return captions_of([cell])


def captions_from_names(folder: CaptionFolder, names: list[str]) -> dict[str, str]:
    """What the files are called, or their folders where a file's name is a number; pictures without words get none.

    `animals/red_panda-02.jpg` => "red panda", `cats/IMG_1234.jpg` => "cats".

    Raises:
        BadDataError: if no picture has words in either.
    """
    captions: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        found = next((words for part in (path.stem, *path.parts[-2::-1]) if (words := words_of(part))), None)
        if found is not None:
            captions[name] = found
    if not captions:
        some = ", ".join(names[:3]) + ", …" * (len(names) > 3)
        raise BadDataError(
            f"{folder.folder}: {count(len(names), 'picture')} without captions ({some}), none with words in its name "
            "or its folders'; rename them, caption them by hand, or name a captioning model in --from"
        )
    return captions


def words_of(name: str) -> str:
    """The words of a name: without counters, hashes and what a camera writes; "" where there are none."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|[_.\-+()\[\]{},\s]+", " ", name)
    kept = [word for word in _COUNTERS.sub(" ", text).split() if not _is_code(word)]
    return " ".join(kept) if any(len(word) > 1 or not word.isascii() for word in kept) else ""


def _is_code(word: str) -> bool:
    """Whether it is a number, a size such as 64x64, or a hash."""
    if re.fullmatch(r"(?i)\d+|\d+x\d+|[a-z]{0,4}\d{3,}", word):
        return True
    return len(word) >= 8 and re.fullmatch(r"(?i)[0-9a-f]+", word) is not None and any(c.isdigit() for c in word)
