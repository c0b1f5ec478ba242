"""Numbers from columns of the data, such as a size or an angle, that a model is conditioned on.

    numbers = Numbers.read(pictures, ["size", "angle"])   # mean and deviation of each column, every row checked
    numbers.vectors(pictures.train)                       # float32 [N,3], one a row
    numbers.vector({"size": 0.3, "angle": 45})            # the same for one picture

A network takes them standardized, with a 1 behind them; all zeros stand for no numbers, the null condition of
guidance, which is thereby another input than the mean of all pictures. Mean and deviation belong to its weights: they
are saved as JSON beside them. An angle is better given as two columns, its sine and cosine: 359 degrees are then close
to 0.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm.data.dataset import CaptionedPictures
from ldm.data.rows import BadDataError, Problem, is_null, require_columns

Vectors = npt.NDArray[np.float32]
FAR = 6.0  # standard deviations from the mean of the training


@dataclass(frozen=True)
class Numbers:
    """The number columns of a data set.

    Attributes:
        columns: their names, in the order of the network's inputs.
        mean, std: of each, over the training pictures.
    """

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, pictures: CaptionedPictures, columns: Sequence[str]) -> Numbers:
        """Measure the columns on the training rows; every row must have a number in each.

        Raises:
            BadDataError: if no row has one of the columns, with the nearest one; listing all rows without a number; if
                a column has the same number everywhere.
        """
        require_columns(columns, {name for row in pictures for name in row.extra}, pictures.source,
                        "set data.number_columns")  # fmt: skip
        whole = cls(tuple(columns), (0.0,) * len(columns), (1.0,) * len(columns))
        values = whole.vectors(pictures)[:, :-1].astype(np.float64)[[row.split == "train" for row in pictures]]
        mean, std = values.mean(0), values.std(0)
        for name, one, deviation in zip(columns, mean, std, strict=True):
            if not deviation > 1e-6 * max(1.0, abs(one)):
                raise BadDataError(f"{name} is {one:g} in all of {pictures.source}; expected different numbers")
        return cls(tuple(columns), tuple(mean.tolist()), tuple(std.tolist()))

    @property
    def width(self) -> int:
        """Inputs of the network: the numbers, and whether there are any."""
        return len(self.columns) + 1

    @property
    def null(self) -> Vectors:
        """The vector that stands for no numbers, float32 [width]."""
        return np.zeros(self.width, np.float32)

    def vectors(self, pictures: CaptionedPictures) -> Vectors:
        """The vector of each row, float32 [N,width].

        Raises:
            BadDataError: listing the rows without a number.
        """
        rows = np.ones((len(pictures), self.width))
        problems = []
        for place, row in enumerate(pictures):
            for i, name in enumerate(self.columns):
                number = number_of(row.extra.get(name))
                if number is None:
                    cell = row.extra.get(name)
                    what = "is empty" if is_null(cell) or cell == "" else f"is {str(cell)[:40]!r}"
                    problems.append(Problem(f"{name} {what}; expected a number", row.where))
                else:
                    rows[place, i] = number
        if problems:
            raise BadDataError.listing(problems, pictures.source, "Correct them, or leave the column out.")
        return self._standardized(rows)

    def vector(self, numbers: Mapping[str, Any]) -> Vectors:
        """The vector of one picture, float32 [width].

        Raises:
            ValueError: for a name that is no column, with the nearest; for one that is missing or no number.
        """
        for name in numbers:
            if name not in self.columns:
                (nearest,) = difflib.get_close_matches(str(name), self.columns, n=1, cutoff=0.0)
                raise ValueError(f"numbers: there is no {name!r}; did you mean {nearest!r}?")
        row = np.ones((1, self.width))
        for i, name in enumerate(self.columns):
            number = number_of(numbers.get(name))
            if number is None:
                raise ValueError(f"numbers: expected a number for {name}, got {numbers.get(name)!r}")
            row[0, i] = number
        vector: Vectors = self._standardized(row)[0]
        for name, distance, mean in zip(self.columns, vector, self.mean, strict=False):
            if abs(distance) > FAR:
                warnings.warn(
                    f"numbers: {name}={numbers[name]} is {abs(distance):.0f} standard deviations from the mean of the "
                    f"training, {mean:.4g}; the model has hardly seen such pictures",
                    stacklevel=2,
                )
        return vector

    def _standardized(self, rows: npt.NDArray[np.float64]) -> Vectors:
        rows[:, :-1] = (rows[:, :-1] - self.mean) / self.std
        return rows.astype(np.float32)

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Numbers:
        """Read what `save` wrote. Raises ValueError if the file holds something else."""
        try:
            content = json.loads(path.read_text("utf-8"))
            made = cls(*(tuple(content[name]) for name in ("columns", "mean", "std")))
            fine = len(made.columns) == len(made.mean) == len(made.std) > 0
            fine &= all(isinstance(name, str) for name in made.columns)
            fine &= all(math.isfinite(value) for value in (*made.mean, *made.std)) and all(std > 0 for std in made.std)
        except (KeyError, TypeError, ValueError):
            fine = False
        if not fine:
            raise ValueError(f"{path} holds no numbers; expected {{'columns': [...], 'mean': [...], 'std': [...]}}")
        return made


def number_of(cell: Any) -> float | None:
    """A cell => its number, also one that is written as text, as in csv; None where it is none, or not finite."""
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
