"""Pictures with all that a model can be conditioned on: captions, a class or numbers, a conditioning picture.

pictures = ConditionedPictures.read(read_captioned("pictures"), label_column="kind", condition_column="sketch")
pictures.train.class_ids                     # int64, one a row
pictures.train.condition(0).image()          # the picture that row 0 names in its column `sketch`
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from ldm.data.checks import Draft, Drafts, without_broken
from ldm.data.dataset import CaptionedPictures, Row
from ldm.data.facts import UNKNOWN, Fact
from ldm.data.images import BadPictureError
from ldm.data.labels import Labels
from ldm.data.numbers import Numbers, number_of
from ldm.data.rows import BadDataError, Problem, is_null, require_columns

MOST_REPEATS = 1000


@dataclass(frozen=True)
class ConditionedPictures:
    """Captioned pictures with checked classes and conditioning pictures. `train`, `heldout`, `select` are views.

    Attributes:
        pictures: the rows.
        labels: the classes, where rows have one.
        condition_column: the column of a row's conditioning picture: in a folder's metadata its name, relative to the
            folder; in shards the name before its ending; in a Hub set another column of pictures.
        condition_facts: what is known of the conditioning pictures, by their locators.
        numbers: the number columns, where rows have some.
        repeats_column: the column of how often an epoch shows a picture; None shows each once.
    """

    pictures: CaptionedPictures
    labels: Labels | None = None
    condition_column: str | None = None
    condition_facts: Mapping[str, Fact] = field(default_factory=dict, repr=False)
    numbers: Numbers | None = None
    repeats_column: str | None = None

    @classmethod
    def read(
        cls,
        pictures: CaptionedPictures,
        label_column: str | None = None,
        condition_column: str | None = None,
        *,
        number_columns: Sequence[str] = (),
        repeats_column: str | None = None,
        progress: bool = True,
        facts: Path | None = None,
    ) -> ConditionedPictures:
        """Check the columns of all rows, training and held-out.

        Args:
            facts: a folder in which what is known of the conditioning pictures is remembered, as for `read_captioned`.
        Raises:
            BadDataError: listing the rows without a class, a number or a readable conditioning picture, and those that
                can't be shown as often as they say.
        """
        labels = Labels.read(pictures, label_column) if label_column else None
        numbers = Numbers.read(pictures, number_columns) if number_columns else None
        read = cls(pictures, labels, condition_column, numbers=numbers, repeats_column=repeats_column)
        if repeats_column:
            require_columns(
                [repeats_column],
                {name for row in pictures for name in row.extra},
                pictures.source,
                "set data.repeats_column",
            )
            read._count_repeats(repeats_column)
        if condition_column:
            return replace(read, condition_facts=read._check_conditions(condition_column, progress, facts))
        return read

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def train(self) -> ConditionedPictures:
        """The rows to train on."""
        return replace(self, pictures=self.pictures.train)

    @property
    def heldout(self) -> ConditionedPictures:
        """The rows that are kept out of training."""
        return replace(self, pictures=self.pictures.heldout)

    def select(self, indices: Iterable[int]) -> ConditionedPictures:
        """The rows at these places, in this order."""
        return replace(self, pictures=self.pictures.select(indices))

    @property
    def null_class(self) -> int:
        """The class of a picture whose class was dropped: the one after the last."""
        assert self.labels is not None
        return len(self.labels.names)

    @cached_property
    def class_ids(self) -> npt.NDArray[np.int64]:
        """The class of each row, int64 [N]; for rows that have one."""
        assert self.labels is not None
        return self.labels.ids(self.pictures)

    @cached_property
    def class_inputs(self) -> npt.NDArray[np.int64] | npt.NDArray[np.float32] | None:
        """What a stock U-Net takes as `class_labels` of each row: classes [N], numbers [N,K+1], or None for neither."""
        if self.numbers:
            return self.numbers.vectors(self.pictures)
        return self.class_ids if self.labels else None

    @property
    def null_input(self) -> int | npt.NDArray[np.float32]:
        """The same of a picture whose class or numbers were dropped."""
        return self.numbers.null if self.numbers else self.null_class

    @cached_property
    def repeats(self) -> npt.NDArray[np.int64] | None:
        """How often an epoch shows each picture, int64 [N]; None is once."""
        return None if self.repeats_column is None else self._count_repeats(self.repeats_column)

    @property
    def all_pictures(self) -> Sequence[Row]:
        """All pictures to encode: the rows, and after them rows that read their conditioning pictures."""
        return Together(self) if self.condition_column else self.pictures

    def condition_number(self, number: int) -> int:
        """The place of row `number`'s conditioning picture in `all_pictures`."""
        return len(self) + number

    def condition(self, number: int) -> Row:
        """A row without captions that reads the conditioning picture of row `number`.

        Raises:
            BadPictureError: if there is none.
        """
        assert self.condition_column is not None
        row = self.pictures[number]
        locator = row.store.locate(row.extra.get(self.condition_column))
        fact = self.condition_facts.get(locator, UNKNOWN)
        return replace(row, captions=(), locator=locator, content=fact.content, size=fact.size)

    def _count_repeats(self, column: str) -> npt.NDArray[np.int64]:
        """The numbers in a column, 1 where a cell is empty; raises a BadDataError listing those that can't be."""
        found, problems = np.ones(len(self), np.int64), []
        for place, row in enumerate(self.pictures):
            cell = row.extra.get(column)
            if is_null(cell) or cell == "":
                continue
            number = number_of(cell)
            if number is None or not 1 <= number <= MOST_REPEATS or number % 1:
                what = f"{column} is {str(cell)[:40]!r}; expected a whole number from 1 to {MOST_REPEATS}"
                problems.append(Problem(what, row.where))
            else:
                found[place] = number
        if problems:
            raise BadDataError.listing(problems, self.pictures.source, "Correct them, or leave the column out.")
        return found

    def _check_conditions(self, column: str, progress: bool, facts: Path | None) -> dict[str, Fact]:
        columns = {name for row in self.pictures for name in row.extra}
        require_columns([column], columns, self.pictures.source, "set data.condition_column")
        problems: list[Problem] = []
        named: Drafts = {}
        for number, row in enumerate(self.pictures):
            try:
                named[self.condition(number).locator] = Draft(row.where, (), None, {})
            except BadPictureError as error:
                problems.append(Problem(f"{column}: {error}", row.where))
        good = without_broken(named, self.pictures[0].store, facts, progress, problems)
        if problems:
            raise BadDataError.listing(problems, self.pictures.source, "Correct them, or leave these rows out.")
        return {locator: row.fact for locator, row in good.items()}


@dataclass(frozen=True)
class Together(Sequence[Row]):
    """Rows, and after them rows that read their conditioning pictures; each is made at access."""

    source: ConditionedPictures

    def __len__(self) -> int:
        return 2 * len(self.source)

    @overload
    def __getitem__(self, key: int) -> Row: ...
    @overload
    def __getitem__(self, key: slice) -> list[Row]: ...
    def __getitem__(self, key: int | slice) -> Row | list[Row]:
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        rows = len(self.source)
        return self.source.pictures[key] if key < rows else self.source.condition(key - rows)
