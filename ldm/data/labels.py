"""Class labels from a column of the data: for classifiers and class-conditional models.

    labels = Labels.read(pictures, "group")      # names of all classes, every row checked
    labels.ids(pictures.train)                   # int64, one a row
    labels.id("food-drink")                      # the same numbers, for people

A network has numbers for its classes, so their order belongs to its weights: the names are saved as JSON beside them.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm.data.dataset import CaptionedPictures
from ldm.data.rows import BadDataError, Problem, require_columns


@dataclass(frozen=True)
class Labels:
    """The classes of a data set.

    Attributes:
        column: the column of the class.
        names: in the order of their ids: whole numbers by size, then texts by the alphabet.
    """

    column: str
    names: tuple[str, ...]

    @classmethod
    def read(cls, pictures: CaptionedPictures, column: str) -> Labels:
        """The labels of the training rows; held-out rows must have one of them.

        Args:
            pictures: all rows, training and held-out.
            column: of text or numbers; 3, 3.0 and "3" are the same label.
        Raises:
            BadDataError: if no row has the column, with the nearest one; listing all rows without a label and all
                held-out rows whose label no training row has; or if there are fewer than two labels.
        """
        columns: set[str] = set()
        trained: set[str] = set()
        found = []
        for row in pictures:
            name = label_of(row.extra.get(column))
            found.append((name, row.split, row.where))
            columns |= row.extra.keys()
            if name is not None and row.split == "train":
                trained.add(name)
        require_columns([column], columns, pictures.source, "set data.label_column")
        problems = []
        for name, split, where in found:
            if name is None:
                problems.append(Problem(f"{column} is empty", where))
            elif split == "heldout" and name not in trained:
                problems.append(Problem(f"{column} is {name[:40]!r}, which no training row has", where))
        if problems:
            fix = "Give each of them a label that training rows have, or name another column in data.label_column."
            raise BadDataError.listing(problems, pictures.source, fix)
        if len(trained) < 2:
            raise BadDataError(f"{column} is {min(trained)!r} in all of {pictures.source}; expected several labels")
        return cls(column, tuple(sorted(trained, key=_order)))

    def ids(self, pictures: CaptionedPictures) -> npt.NDArray[np.int64]:
        """The label of each row, int64 [N] in [0, len(names)).

        Raises:
            BadDataError: listing the rows without a label, or with one that isn't known.
        """
        numbers = {name: number for number, name in enumerate(self.names)}
        ids = np.empty(len(pictures), np.int64)
        problems = []
        for place, row in enumerate(pictures):
            name = label_of(row.extra.get(self.column))
            number = numbers.get(name) if name is not None else None
            if number is None:
                what = "is empty" if name is None else f"is {name[:40]!r}, which is not among the known labels"
                problems.append(Problem(f"{self.column} {what}", row.where))
            else:
                ids[place] = number
        if problems:
            raise BadDataError.listing(problems, pictures.source, f"Expected one of {', '.join(self.names)}.")
        return ids

    def id(self, name: str) -> int:
        """The number of a label. Raises ValueError, naming the nearest one, if there is no such label."""
        if name not in self.names:
            (nearest,) = difflib.get_close_matches(name, self.names, n=1, cutoff=0.0)
            raise ValueError(
                f"class label: there is no {name!r}; did you mean {nearest!r}? There are {', '.join(self.names)}"
            )
        return self.names.index(name)

    def save(self, path: Path) -> None:
        """Write the labels as JSON."""
        content = {"column": self.column, "names": self.names}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Labels:
        """Read what `save` wrote. Raises ValueError if the file holds something else."""
        content = json.loads(path.read_text("utf-8"))
        match content:
            case {"column": str(column), "names": [*names]} if all(isinstance(name, str) for name in names):
                return cls(column, tuple(names))
        raise ValueError(f"{path} holds no labels; expected {{'column': ..., 'names': [...]}}")


def label_of(cell: Any) -> str | None:
    """A cell => its label; None where it is empty. Tables without gaps have 3 where those with gaps have 3.0."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell).strip() or None


def _order(name: str) -> tuple[bool, int, str]:
    is_number = name.isascii() and name.removeprefix("-").isdigit()
    return not is_number, int(name) if is_number else 0, name
