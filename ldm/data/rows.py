"""What every source of captioned pictures yields: rows that name a picture, and problems.

A source (a folder, a Hub data set, shards) yields a `Found` for each row that names a picture, or a `Problem`
for each that does not. What a caption is, and which split it belongs to, is defined here for all of them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

Split: TypeAlias = Literal["train", "heldout"]

# Names of splits, in a column `split` or as folders; those of Hugging Face's `datasets` are among them.
SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("heldout", "held-out", "test", "testing", "validation", "valid", "val", "dev"), "heldout"),
    **dict.fromkeys(("eval", "evaluation"), "heldout"),
}
# control characters that are not white space, surrogates without a partner, and the mark of a lost character
_GARBLED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
# characters of untrusted file names that would break a report's line, steer the terminal or fail to be encoded
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LISTED = 1000  # problems written into one message; all of them are in `BadDataError.problems`
_FIX = "Correct them, or leave these rows out with data.on_bad=skip."


@dataclass(frozen=True)
class Problem:
    """Something wrong with one row or one file, and where: `caption is empty: data/metadata.jsonl row 17 (cat.png)`."""

    what: str
    where: str

    def __str__(self) -> str:
        return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found.group()):02x}", f"{self.what}: {self.where}")


class BadDataError(ValueError):
    """Data that cannot be trained on. `problems` lists what is wrong row by row; empty where the whole source fails."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def listing(cls, problems: Sequence[Problem], source: str, fix: str = _FIX) -> BadDataError:
        """One error that lists the problems, a line each, and names the way out."""
        lines = [f"{count(len(problems), 'problem')} in {source}"]
        lines += [f"  {problem}" for problem in problems[:_LISTED]]
        if len(problems) > _LISTED:
            lines.append(f"  ... and {len(problems) - _LISTED:,} more")
        return cls("\n".join([*lines, fix]), problems)


class BadCaptionError(ValueError):
    """A caption that cannot be used; the message gives the reason, not the place."""


#: Text that differs if the file does, and when that last changed, in seconds since 1970.
Stamp: TypeAlias = tuple[str, float]


class Store(Protocol):
    """Where the bytes of the pictures lie. Can be pickled, and read from several threads."""

    def read(self, locator: Any) -> bytes:
        """The picture file at `locator`. Raises BadPictureError if it is not there or is no file."""
        ...

    def locate(self, cell: object) -> Any:
        """The locator of the picture that a cell of a row names, hashable. Raises BadPictureError if there is none."""
        ...

    def stamp(self, locator: Any) -> Stamp | None:
        """A stamp that differs if the picture has changed; None if there is none. Raises BadPictureError."""
        ...


@dataclass(frozen=True)
class Found:
    """A row as its source has it: names a picture that is there; its captions are not checked yet.

    Attributes:
        where: file and row, for reports.
        locator: what `Store.read` takes; two rows with the same locator describe the same picture.
        captions: the caption cells, of any type.
        split: the cell of the split column, None where there is none.
        extra: other plain values of the row, and what `Store.locate` takes of its other pictures.
    """

    where: str
    locator: str | int | tuple[int, ...]
    captions: Sequence[object]
    split: object = None
    extra: dict[str, Any] = field(default_factory=dict)


Finding: TypeAlias = Found | Problem


def file_stamp(path: str, status: os.stat_result | None = None) -> Stamp:
    """A file's name, inode, size, and times of the last change of content and of anything, never set back."""
    status = status or os.stat(path)
    text = f"{path}\0{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return text, max(status.st_mtime, status.st_ctime)


def split_of(caption: str, holdout: float) -> Split:
    """The split of a caption, by its hash: the same on every machine and whatever else the data holds.

    Args:
        caption: a picture's first caption.
        holdout: share of all captions that is kept out of training, in [0, 1).
    """
    return "heldout" if int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16) / 2**32 < holdout else "train"


def named_split(cell: object) -> Split | None:
    """The split that a cell names; None where it is empty. Raises BadCaptionError if there is no such split."""
    if is_null(cell) or cell == "":
        return None
    split = SPLITS.get(cell.strip().lower()) if isinstance(cell, str) else None
    if split is None:
        raise BadCaptionError(f"split is {str(cell)[:40]!r}; expected one of {', '.join(SPLITS)}")
    return split


def captions_of(cells: Sequence[object]) -> tuple[str, ...]:
    """The captions in a row's cells, each a text or a list of texts, without duplicates.

    Where there are several columns, some may be null: not every picture has five captions.

    Raises:
        BadCaptionError: if any of them is empty or no text, or there is none at all.
    """
    full = [cell for cell in cells if not is_null(cell)]
    if not full:
        raise BadCaptionError("caption is empty")
    captions = [caption for cell in full for caption in (cell if isinstance(cell, (list, tuple)) else [cell])]
    if not captions:
        raise BadCaptionError("caption is an empty list")
    return tuple(dict.fromkeys(clean(caption) for caption in captions))


def clean(caption: object) -> str:
    """A caption in one line: line breaks become spaces, white space around it is dropped.

    Files and pages keep one prompt a line, so a caption with a line break of any kind (also U+2028) would be several.

    Raises:
        BadCaptionError: if it is no text that can be read.
    """
    if is_null(caption):
        raise BadCaptionError("caption is empty")
    if not isinstance(caption, str):
        raise BadCaptionError(f"caption is not text but {type(caption).__name__} ({str(caption)[:40]})")
    lines = caption.splitlines()
    text = lines[0].strip() if len(lines) == 1 else " ".join(line for part in lines if (line := part.strip()))
    if not text:
        raise BadCaptionError("caption is empty")
    if garbled := _GARBLED.search(text):
        raise BadCaptionError(f"caption holds U+{ord(garbled.group()):04X}, which is no readable character")
    if all(unicodedata.category(character)[0] in "CZ" for character in text):
        raise BadCaptionError("caption has only invisible characters")
    return text


def plain(row: dict[str, Any], besides: Collection[str]) -> dict[str, Any]:
    """The text, number and truth values of a row, besides some columns."""
    return {key: v for key, v in row.items() if key not in besides and isinstance(v, (str, int, float, bool))}


def require_columns(wanted: Sequence[str], columns: Iterable[str], where: str, fix: str) -> None:
    """Raise BadDataError, naming the nearest column, unless all `wanted` columns are there."""
    there = sorted(columns)
    for name in wanted:
        if name not in there:
            nearest = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
            hint = f"; the nearest is {nearest[0]!r}: {fix}" if nearest else ""
            raise BadDataError(f"column {name!r} is missing: {where} has {', '.join(there) or 'no columns'}{hint}")


def count(number: int, noun: str) -> str:
    """`1 problem`, `1,200 problems`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_null(cell: object) -> bool:
    """Whether a cell of a table is empty: None, or NaN."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))
