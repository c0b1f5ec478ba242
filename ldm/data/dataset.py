"""Captioned pictures from wherever they are, checked before the first step.

    rows = read_captioned("pictures")            # a folder, shards/{000..003}.tar, or owner/name on the Hub
    row = rows.train[0]
    row.captions, row.where, row.image()         # ("red heart",), "pictures/metadata.jsonl row 1 (a.png)", RGB

Every row and every picture is looked at first, and everything that is wrong is told at once, by file and row.
Rows of the same picture become one row with several captions. The split is that of the `split` column where a row
has one; otherwise the hash of the first caption decides, so that it stays as it is when the data grow.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from ldm.data.checks import Drafts, gather, without_broken
from ldm.data.images import BadPictureError, decode
from ldm.data.rows import BadDataError, Finding, Problem, Split, Stamp, Store, count, split_of
from ldm.data.sources import folders, shards
from ldm.data.sources import hub as hub_sets

__all__ = [
    "BadDataError",
    "CaptionedPictures",
    "Problem",
    "Row",
    "Split",
    "read_captioned",
    "require_training",
    "split_of",
]

OnBad: TypeAlias = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Row:
    """One picture and what is said of it.

    Attributes:
        captions: one or more, of which each epoch draws one; none where they were not asked for.
        where: file and row, for reports.
        split: "train" or "heldout".
        extra: the plain values of the row's other columns.
        locator: where in the store the picture lies; the same picture has the same locator.
        content: 16 bytes, the hash of the picture file; empty if it was not looked at (check=False).
        size: width and height in pixels, upright; (0, 0) if it was not looked at.
    """

    captions: tuple[str, ...]
    where: str
    split: Split
    extra: dict[str, Any]
    locator: Any
    store: Store = field(repr=False)
    background: str = field(repr=False)
    content: bytes = field(repr=False)
    size: tuple[int, int]

    def read(self) -> bytes:
        """The picture file. Raises BadDataError, naming the row, if it is gone."""
        try:
            return self.store.read(self.locator)
        except BadPictureError as error:
            raise BadDataError(f"{error}: {self.where}") from None

    def stamp(self) -> Stamp | None:
        """What tells without reading it whether the picture has changed. Raises BadDataError if it is gone."""
        try:
            return self.store.stamp(self.locator)
        except BadPictureError as error:
            raise BadDataError(f"{error}: {self.where}") from None

    def image(self, data: bytes | None = None) -> Image.Image:
        """The picture, upright, mode RGB; `data` is the file, where it has been read already.

        Raises BadDataError, naming the row, if it is broken.
        """
        try:
            return decode(self.read() if data is None else data, self.background)
        except BadPictureError as error:
            raise BadDataError(f"{error}: {self.where}") from None


class CaptionedPictures(Sequence[Row]):
    """Rows that have been checked. Slices, `train`, `heldout` and `select` are views of the same rows.

    A row is made when it is asked for. All of them lie in two arrays, about 180 bytes a picture, so that the workers
    of a DataLoader share them; a list of a million small objects would be copied into each, page by page.

    Attributes:
        source: what was read, as it was given.
        skipped: what is wrong with the rows that were left out (on_bad="skip").
    """

    def __init__(self, source: str, store: Store, background: str, packed: _Packed, skipped: Sequence[Problem]) -> None:
        self.source = source
        self.skipped = tuple(skipped)
        self._store, self._background, self._packed = store, background, packed
        self._index: npt.NDArray[np.int64] = np.arange(len(packed.heldout))

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> CaptionedPictures: ...
    def __getitem__(self, key: int | slice) -> Row | CaptionedPictures:
        if isinstance(key, slice):
            return self._view(self._index[key])
        return self._packed.row(int(self._index[key]), self._store, self._background)

    def __repr__(self) -> str:
        heldout = int(self._packed.heldout[self._index].sum())
        return f"CaptionedPictures({self.source!r}: {len(self) - heldout:,} train, {heldout:,} heldout)"

    @property
    def train(self) -> CaptionedPictures:
        """The rows to train on."""
        return self._view(self._index[~self._packed.heldout[self._index]])

    @property
    def heldout(self) -> CaptionedPictures:
        """The rows that are kept out of training."""
        return self._view(self._index[self._packed.heldout[self._index]])

    def select(self, indices: Iterable[int]) -> CaptionedPictures:
        """The rows at these places, in this order."""
        return self._view(self._index[np.fromiter(indices, np.int64)])

    def _view(self, index: npt.NDArray[np.int64]) -> CaptionedPictures:
        view = CaptionedPictures(self.source, self._store, self._background, self._packed, self.skipped)
        view._index = index
        return view


def require_training(pictures: CaptionedPictures) -> None:
    """Raise BadDataError, naming data.holdout, if every picture is held out.

    A picture is held out by its `split` column or by the hash of its first caption, so pictures that share one caption
    are held out together.
    """
    if len(pictures.train):
        return
    first = {row.captions[0] for row in pictures if row.captions}
    shared = f", captioned {first.pop()[:40]!r}," if len(first) == 1 else ""
    raise BadDataError(
        f"no pictures to train on: all {count(len(pictures), 'picture')} of {pictures.source}{shared} are held out; "
        "lower data.holdout (data.holdout=0 holds none out), or add a column `split` that says train"
    )


def read_captioned(
    source: str | Path,
    *,
    image_column: str = "image",
    caption_columns: Sequence[str] = ("text",),
    on_bad: OnBad = "error",
    holdout: float = 0.05,
    hub_config: str | None = None,
    hub_split: str = "train",
    background: str = "white",
    progress: bool = True,
    check: bool = True,
    facts: Path | None = None,
) -> CaptionedPictures:
    """Read and check captioned pictures.

    Args:
        source: a folder with `metadata.csv`, `.jsonl` or `.parquet`, or with a `.txt` beside each picture; WebDataset
            shards, as a tar file, a pattern (`shards/{000..003}.tar`, `shards/*.tar`) or a folder that holds
            nothing else; a data set on the Hugging Face Hub (`owner/name`) or a folder saved by `datasets`.
        image_column: the picture column of a Hub data set.
        caption_columns: columns (keys of the .json, in shards) that hold captions, each a text or a list of texts.
            With none of them, pictures are read without captions, and need none.
        on_bad: "error" raises on rows that cannot be used, "skip" leaves them out and lists them on stderr.
        holdout: share of the captions to keep out of training, in [0, 1), where no column `split` says which.
        hub_config, hub_split: which part of a Hub data set.
        background: color behind transparent pixels.
        progress: show progress bars.
        check: decode every picture now; without it, a broken one raises when it is read.
        facts: a folder in which what is known of the pictures is remembered, so that the next start decodes only those
            that are new or have changed. All ranks of a run name the same one, and share the work.
    Returns:
        At least one row.
    Raises:
        BadDataError: listing all rows that cannot be used, or saying in a line why the source cannot be.
        ValueError: for an argument outside its range.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}; expected 'error' or 'skip'")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; expected a share in [0, 1)")
    if isinstance(caption_columns, str):
        raise ValueError(f"caption_columns is {caption_columns!r}; expected a list of column names")
    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise ValueError(f"background is {background!r}; expected a color, such as 'white' or '#808080'") from None
    shown = os.fspath(source)
    store, findings = _open(source, image_column, caption_columns, hub_config, hub_split, progress)
    problems: list[Problem] = []
    rows = gather(findings, problems, bool(caption_columns))
    if check:
        rows = without_broken(rows, store, facts, progress, problems)
    if problems and on_bad == "error":
        raise BadDataError.listing(problems, shown)
    if not rows:
        raise BadDataError.listing(problems, shown) if problems else BadDataError(f"no pictures found: {shown}")
    if problems:
        told = f"left out {count(len(problems), 'problem')} of {shown}, {count(len(rows), 'picture')} remain:"
        print("\n  ".join([told, *map(str, problems)]), file=sys.stderr)
    return CaptionedPictures(shown, store, background, _Packed.of(rows, holdout), problems)


def _open(
    source: str | Path,
    image_column: str,
    caption_columns: Sequence[str],
    hub_config: str | None,
    hub_split: str,
    progress: bool,
) -> tuple[Store, Iterator[Finding]]:
    """Tell what kind of source this is."""
    path = os.fspath(source)
    if os.path.isdir(path):
        listing = folders.list_folder(path)
        if not hub_sets.is_saved(path):
            store = folders.FolderStore(path)
            if listing.metadata:
                return store, folders.metadata_rows(listing, store, caption_columns)
            if listing.pictures or listing.texts:
                rows = folders.text_rows if caption_columns else folders.bare_rows
                return store, rows(listing, store)
            if listing.shards:
                paths = [listing.shown(name) for name in listing.shards]
                return shards.ShardStore(paths), shards.shard_rows(paths, caption_columns, progress)
            if not listing.tables:
                raise BadDataError(
                    f"no pictures found: {path}; expected pictures with metadata.csv, .jsonl or .parquet, "
                    "pictures with a .txt beside each, or .tar shards"
                )
    elif shards.is_pattern(path):
        paths = shards.find_shards(path)
        return shards.ShardStore(paths), shards.shard_rows(paths, caption_columns, progress)
    elif os.path.exists(path):
        raise BadDataError(f"source is a file: {path}; expected its folder, {os.path.dirname(path) or '.'}")
    elif (
        isinstance(source, Path)
        or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
        or os.path.isdir(path.split("/")[0])
    ):
        raise BadDataError(f"folder is missing: {path}{_nearest_folder(path)}")
    dataset = hub_sets.load(path, hub_config, hub_split)
    hub_store = hub_sets.open_store(dataset, path, image_column, caption_columns)
    return hub_store, hub_sets.hub_rows(dataset, path, caption_columns)


@dataclass(frozen=True)
class _Packed:
    """Rows as JSON in one array: nothing in it is a Python object whose reference count a worker would write to."""

    text: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.bool_]
    contents: npt.NDArray[np.void]
    sizes: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, rows: Drafts, holdout: float) -> _Packed:
        splits = [row.split(holdout, locator) for locator, row in rows.items()]
        lines = [
            json.dumps([row.captions, row.where, split, row.extra, locator]).encode()
            for (locator, row), split in zip(rows.items(), splits, strict=True)
        ]
        return cls(
            np.frombuffer(b"".join(lines), np.uint8),
            np.cumsum([len(line) for line in lines]),
            np.array([split == "heldout" for split in splits], bool),
            np.array([row.fact.content for row in rows.values()], "V16"),
            np.array([row.fact.size for row in rows.values()], np.uint32).reshape(-1, 2),
        )

    def row(self, number: int, store: Store, background: str) -> Row:
        start = self.ends[number - 1] if number else 0
        captions, where, split, extra, locator = json.loads(self.text[start : self.ends[number]].tobytes())
        width, height = self.sizes[number].tolist()
        content = self.contents[number].tobytes() if width else b""
        return Row(tuple(captions), where, split, extra, locator, store, background, content, (width, height))


def _nearest_folder(path: str) -> str:
    parent, name = os.path.split(os.path.normpath(path))
    there = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    nearest = difflib.get_close_matches(name, there, n=1)
    return f"; the nearest is {os.path.join(parent, nearest[0])}" if nearest else ""
