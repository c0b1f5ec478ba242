"""Captioned pictures from wherever they are, checked before the first step.

    rows = read_captioned("pictures")            # a folder, shards/{000..003}.tar, or owner/name on the Hub
    row = rows.train[0]
    row.captions, row.where, row.image()         # ("red heart",), "pictures/metadata.jsonl row 1 (a.png)", RGB

Every row and every picture is checked first, and all problems are reported together, by file and row. Rows of the same
picture become one row with several captions. The split is that of the `split` column, or of the folders `train/` and
`test/`; otherwise the hash of the first caption decides, so that it stays the same when the data grow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from ldm.data.checks import Drafts, gather, without_broken
from ldm.data.images import BadPictureError, decode
from ldm.data.rows import BadDataError, Found, Problem, Split, Store, count, split_of
from ldm.data.sources.opening import open_source
from ldm.system.files import typed_path

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

SLIVER = 3  # times as long as wide: less than a third of such a picture is seen
NAMED = 3  # pictures in a warning
OnBad: TypeAlias = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Row:
    """One picture with its captions.

    Attributes:
        captions: one or more, of which each epoch samples one; none if no caption columns were named.
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

    A `Row` object is made at access. All rows lie in a few arrays, about 200 bytes a picture, which the workers of a
    DataLoader share; a list of a million small objects would be copied into each of them, page by page.

    Attributes:
        source: what was read: a path in its one spelling, or a name on the Hub.
        skipped: the problems of the rows that were left out (on_bad="skip").
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
        return f"CaptionedPictures({self.source!r}: {self.shares()})"

    def shares(self) -> str:
        """`1,200 train, 60 heldout`."""
        heldout = int(self._packed.heldout[self._index].sum())
        return f"{len(self) - heldout:,} train, {heldout:,} heldout"

    @property
    def train(self) -> CaptionedPictures:
        """The rows to train on."""
        return self._view(self._index[~self._packed.heldout[self._index]])

    @property
    def heldout(self) -> CaptionedPictures:
        """The rows that are kept out of training."""
        return self._view(self._index[self._packed.heldout[self._index]])

    @property
    def sizes(self) -> npt.NDArray[np.uint32]:
        """Width and height of each picture in pixels, upright, uint32 [N,2]; 0 if it was not looked at."""
        return self._packed.sizes[self._index]

    def unfit(self, size: int, ratio: float = 1.0) -> list[str]:
        """Warnings about pictures that make poor squares of `size` pixels, a line each, with the worst by name.

        Pictures are cropped to their largest square, then resampled: a picture whose shorter side has less than `size`
        pixels is enlarged, and of a long one little is left.

        Args:
            ratio: of the longest bucket, if pictures are cropped to that and resampled to the area of the square.
        """
        width, height = self._packed.sizes[self._index].astype(np.int64).T
        short, long = np.minimum(width, height), np.maximum(width, height)

        def warning(what: str, which: npt.NDArray[np.bool_], detail: Callable[[int], str]) -> list[str]:
            found = np.flatnonzero(which)
            worst = found[np.argsort(short[found], kind="stable")].tolist()
            lines = [f"{count(len(found), 'picture')} {what}:"]
            lines += [f"{detail(i)}: {self[i].where}" for i in worst[:NAMED]]
            lines += [f"and {len(found) - NAMED:,} more"] if len(found) > NAMED else []
            return ["\n  ".join(lines)] if worst else []

        enlarged = warning(
            f"enlarged to {size} x {size}",
            (short > 0) & (short * np.minimum(long, ratio * short) < size * size),
            lambda i: f"enlarged from {width[i]} x {height[i]}",
        )
        return enlarged + warning(
            "cropped to a sliver",
            SLIVER * ratio * short < long,
            lambda i: f"cropped to a sliver ({short[i]} of {long[i]} pixels)",
        )

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
        "lower data.holdout (data.holdout=0 holds none out), or add a column `split` with the value train"
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
    only: Collection[Any] | None = None,
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
        holdout: share of the captions to keep out of training, in [0, 1), if no column `split` or folder decides it.
        hub_config, hub_split: which part of a Hub data set.
        background: color behind transparent pixels.
        progress: show progress bars.
        check: decode every picture now; without it, a broken one raises when it is read.
        facts: a folder in which what is known of the pictures is remembered, so that the next start decodes only those
            that are new or have changed. All ranks of a run name the same one, and share the work.
        only: locators of the pictures to read; all others, and what is wrong with them, are left out silently.
    Returns:
        At least one row.
    Raises:
        BadDataError: listing all rows that cannot be used, or the reason in one line why the source cannot be read.
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
    shown = typed_path(os.fspath(source))
    is_path = isinstance(source, Path) or source.startswith((".", "/", "~"))
    store, findings, listing = open_source(
        shown, is_path, image_column, caption_columns, hub_config, hub_split, progress
    )
    if only is not None:
        findings = (found for found in findings if isinstance(found, Found) and found.locator in only)
    problems: list[Problem] = []
    rows = gather(findings, problems, bool(caption_columns))
    if check:
        rows = without_broken(rows, store, facts, progress, problems)
    if problems and on_bad == "error":
        raise BadDataError.listing(problems, shown)
    if not rows:
        raise BadDataError.listing(problems, shown) if problems else BadDataError(f"no pictures found: {shown}")
    if problems:
        head = f"left out {count(len(problems), 'problem')} of {shown}, {count(len(rows), 'picture')} remain:"
        print("\n  ".join([head, *map(str, problems)]), file=sys.stderr)
    pictures = CaptionedPictures(shown, store, background, _Packed.of(rows, holdout), problems)
    if progress and listing is not None and listing.split_folders:
        folders = ", ".join(f"{folder}/" for folder in sorted(listing.split_folders))
        print(f"{shown}: split by its folders {folders}: {pictures.shares()}", file=sys.stderr)
    return pictures


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
