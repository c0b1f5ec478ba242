"""Captioned pictures in a folder: with a metadata file, or with a .txt beside each picture.

The metadata file is that of Hugging Face's imagefolder: `metadata.csv`, `.jsonl` or `.parquet`, in the folder or in
folders below it, with a column `file_name` relative to its own folder. Where there is none, each non-empty line of
`cat.txt` is a caption of `cat.png`. Nothing is dropped silently: a picture without a caption is a problem, and so is a
caption without a picture.

Folders named as splits (`train/` beside `test/`, `validation/`, …) decide which pictures are held out, as in
`datasets`, unless a column `split` does. Rows are counted as editors do: from 1, the header of a csv is row 1.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath

from ldm.data.images import BadPictureError
from ldm.data.rows import (
    SPLITS,
    BadCaptionError,
    BadDataError,
    Finding,
    Found,
    Problem,
    Split,
    Stamp,
    clean,
    file_stamp,
    is_null,
    plain,
    require_columns,
)
from ldm.data.sources.tables import BadRow, read_table

# Names that promise a picture. Those of formats that cannot be read are among them, so that they are reported.
PICTURES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif"}
    | {".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd"}
)
_ENDINGS = tuple(PICTURES)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MAX_FILE_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 20
_NOTES = frozenset(("readme", "license", "licence", "notice", "copying", "credits", "attribution", "authors"))


@dataclass
class Listing:
    """What lies in a folder, as sorted paths relative to it. Hidden files are left out."""

    root: str
    metadata: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)  # links to folders, which are not followed

    def shown(self, name: str) -> str:
        return os.path.join(self.root, name)

    @cached_property
    def split_folders(self) -> dict[str, Split]:
        """The folders that name a split, relative to the root: those that stand beside one of the other split."""
        named: dict[str, Split] = {}
        for folder in {os.path.dirname(name) for name in [*self.pictures, *self.metadata]}:
            for above in PurePosixPath(folder, "x").parents:
                if above.name.lower() in SPLITS:
                    named[str(above)] = SPLITS[above.name.lower()]
        splits: dict[str, set[Split]] = {}
        for name, split in named.items():
            splits.setdefault(os.path.dirname(name), set()).add(split)
        return {name: split for name, split in named.items() if len(splits[os.path.dirname(name)]) == 2}

    def split_of(self, name: str) -> Split | None:
        """The split that the folders above a file name; the highest decides."""
        above = [str(folder) for folder in PurePosixPath(name).parents] if self.split_folders else []
        return next((self.split_folders[folder] for folder in reversed(above) if folder in self.split_folders), None)


def list_folder(root: str) -> Listing:
    """Walk a folder once and sort its files by what they are for."""
    listing = Listing(root)
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        below = os.path.relpath(parent, root)
        listing.strays += [_join(below, name) for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted(files):
            stem, suffix = os.path.splitext(name.lower())
            if name.startswith("."):
                continue
            if name in METADATA:
                listing.metadata.append(_join(below, name))
            elif suffix in PICTURES:
                listing.pictures.append(_join(below, name))
            elif suffix == ".txt" and stem not in _NOTES:
                listing.texts.append(_join(below, name))
            elif suffix == ".tar":
                listing.shards.append(_join(below, name))
            elif suffix in (".parquet", ".arrow"):
                listing.tables.append(_join(below, name))
    return listing


class FolderStore:
    """Files below a folder, read by their path relative to it; nothing outside it can be read."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        parent = PurePosixPath(self.root).parent
        # A snapshot in the Hugging Face cache is a folder of links to ../../blobs.
        allowed = [self.root, str(parent.parent / "blobs")] if parent.name == "snapshots" else [self.root]
        self._allowed = tuple(os.path.join(folder, "") for folder in allowed)
        self._real: dict[str, str] = {}  # folders below the root, without links

    def locate(self, name: object) -> str:
        """A `file_name` cell => the normal path below the folder. Raises BadPictureError if no file is there."""
        if not isinstance(name, str) or not name.strip():
            raise BadPictureError(
                "file_name is empty" if name is None else f"file_name is no name ({str(name)[:40]!r})"
            )
        if os.path.isabs(name):
            raise BadPictureError("file_name is an absolute path; expected one relative to the metadata file")
        self._resolve(name)
        return os.path.normpath(name)

    def read(self, locator: str) -> bytes:
        """The bytes of a file. Raises BadPictureError if it is missing, no file, outside the folder or too large."""
        try:
            with open(self._resolve(locator)[0], "rb") as file:
                return file.read()
        except OSError as error:
            raise BadPictureError(f"picture cannot be read ({error.strerror})") from None

    def stamp(self, locator: str) -> Stamp:
        """What changes when the file does. Raises BadPictureError like `read`."""
        return file_stamp(*self._resolve(locator))

    def holds(self, path: str) -> bool:
        """Whether an absolute path without links lies in the folder."""
        return path.startswith(self._allowed) or os.path.join(path, "") in self._allowed

    def _resolve(self, name: str) -> tuple[str, os.stat_result]:
        """The path of a file without links, and its status."""
        try:
            folder, base = os.path.split(name)
            real = self._real.get(folder)
            if real is None:
                real = self._real[folder] = os.path.realpath(os.path.join(self.root, folder))
            path = real + os.sep + base if base not in ("", ".", "..") else os.path.realpath(os.path.join(real, base))
            status = os.lstat(path) if self.holds(path) else None
            if status is not None and stat.S_ISLNK(status.st_mode):
                path = os.path.realpath(path)
                status = os.stat(path) if self.holds(path) else None
        except FileNotFoundError:
            raise BadPictureError("picture is missing") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise BadPictureError(f"picture cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if status is None:
            raise BadPictureError("path leads out of the data folder")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "special file"
            raise BadPictureError(f"picture is a {kind}; expected a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadPictureError(f"file is too large ({status.st_size / 2**30:.1f} GiB)")
        return path, status


def metadata_rows(listing: Listing, store: FolderStore, caption_columns: Sequence[str]) -> Iterator[Finding]:
    """The rows of every metadata file, then the pictures that none of them names."""
    folders = [os.path.dirname(name) for name in listing.metadata]
    for folder in folders:
        if folders.count(folder) > 1:
            files = " and ".join(name for name in listing.metadata if os.path.dirname(name) == folder)
            raise BadDataError(f"several metadata files in one folder: {listing.root} has {files}; keep one of them")
    claimed: set[str] = set()
    for name in listing.metadata:
        columns: set[str] = set()
        rows = problems = 0
        shown, folder = listing.shown(name), os.path.dirname(name)
        for number, row in read_table(shown, columns):
            rows += 1
            finding, claims = _metadata_row(f"{shown} row {number}", folder, row, store, caption_columns)
            if listing.split_folders and isinstance(finding, Found) and (is_null(finding.split) or not finding.split):
                split = listing.split_of(str(finding.locator)) or listing.split_of(name)
                finding = replace(finding, split=split)
            problems += isinstance(row, BadRow)
            if claims:
                claimed.add(claims)
            if isinstance(row, dict):  # a picture that another column names has a purpose, too
                named = (cell for cell in row.values() if isinstance(cell, str) and cell.lower().endswith(_ENDINGS))
                claimed.update(os.path.normpath(cell) for cell in named)
            yield finding
        if not rows:
            raise BadDataError(f"metadata has no rows: {shown}; expected one a picture")
        if problems < rows:
            require_columns(["file_name"], columns, shown, "rename it to file_name")
            texts = columns - {"file_name", "split"}
            require_columns(caption_columns, texts, shown, "set data.caption_columns")
    for picture in listing.pictures:
        if picture not in claimed:
            yield Problem("picture has no metadata row", listing.shown(picture))
    yield from _strays(listing, store)


def text_rows(listing: Listing, store: FolderStore) -> Iterator[Finding]:
    """A row for each picture with a .txt beside it; then the .txt files without a picture."""
    texts = {os.path.splitext(name)[0]: name for name in listing.texts}
    for picture in listing.pictures:
        text = texts.get(os.path.splitext(picture)[0])
        if text is None:
            yield Problem("picture has no .txt beside it", listing.shown(picture))
            continue
        try:
            store.locate(picture)
            captions = caption_lines(_read_text(store, text), listing.shown(text))
        except BadPictureError as error:
            yield Problem(str(error), listing.shown(picture))
        else:
            yield (
                captions
                if isinstance(captions, Problem)
                else Found(listing.shown(picture), picture, captions, listing.split_of(picture))
            )
    stems = {os.path.splitext(picture)[0] for picture in listing.pictures}
    for stem, text in texts.items():
        if stem not in stems:
            yield Problem("caption has no picture beside it", listing.shown(text))
    yield from _strays(listing, store)


def bare_rows(listing: Listing, store: FolderStore) -> Iterator[Finding]:
    """A row for each picture, whatever else lies there."""
    for picture in listing.pictures:
        try:
            yield Found(listing.shown(picture), store.locate(picture), (), listing.split_of(picture))
        except BadPictureError as error:
            yield Problem(str(error), listing.shown(picture))
    yield from _strays(listing, store)


def caption_lines(data: bytes, where: str) -> list[str] | Problem:
    """The captions in a .txt, one a line, or the first thing that is wrong with them, its row named."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        return Problem("caption is not UTF-8", f"{where} row {row}")
    captions = []
    for row, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        try:
            if line.strip():
                captions.append(clean(line))
        except BadCaptionError as error:
            return Problem(str(error), f"{where} row {row}")
    return captions or Problem("caption is empty", where)


def _metadata_row(
    where: str, folder: str, row: dict[str, object] | BadRow, store: FolderStore, caption_columns: Sequence[str]
) -> tuple[Finding, str | None]:
    """A table's row => its finding, and the picture that it thereby accounts for."""
    name = row.file_name if isinstance(row, BadRow) else row.get("file_name")
    path = _join(folder, name) if isinstance(name, str) and name.strip() and not os.path.isabs(name) else name
    claims = os.path.normpath(path) if isinstance(path, str) else None
    if isinstance(name, str):
        where = f"{where} ({name[:200]})"
    if isinstance(row, BadRow):
        return Problem(row.what, where), claims
    try:
        locator = store.locate(path)
    except BadPictureError as error:
        return Problem(str(error), where), claims
    extra = plain(row, ("file_name", "split", *caption_columns))
    return Found(where, locator, [row.get(name) for name in caption_columns], row.get("split"), extra), claims


def _read_text(store: FolderStore, name: str) -> bytes:
    data = store.read(name)
    if len(data) > MAX_TEXT_BYTES:
        raise BadPictureError(f"caption file is too large ({len(data):,} bytes)")
    return data


def _strays(listing: Listing, store: FolderStore) -> Iterator[Problem]:
    for name in listing.strays:
        if not store.holds(os.path.realpath(listing.shown(name))):
            yield Problem("link leads out of the data folder", listing.shown(name))


def _join(folder: str, name: str) -> str:
    return name if folder in ("", ".") else os.path.join(folder, name)
