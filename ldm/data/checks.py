"""Rows as a source has them => rows to train on, and everything that is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ldm.data.facts import UNKNOWN, Fact, look_at
from ldm.data.rows import BadCaptionError, Finding, Problem, Split, Store, captions_of, named_split, split_of


@dataclass
class Draft:
    """A picture, as its rows so far describe it."""

    where: str
    captions: tuple[str, ...]
    named: Split | None  # the split, if a column or folder names it
    extra: dict[str, Any]
    fact: Fact = UNKNOWN

    def split(self, holdout: float, locator: Any) -> Split:
        """The split a column names, or that of the first caption; of a picture without captions, that of its place."""
        return self.named or split_of(self.captions[0] if self.captions else str(locator), holdout)


Drafts: TypeAlias = dict[Any, Draft]  # by locator


def gather(findings: Iterable[Finding], problems: list[Problem], captioned: bool) -> Drafts:
    """Check the captions, and bring the rows of each picture together. What is wrong is added to `problems`.

    Args:
        captioned: whether every row has captions, or none has.
    """
    rows: Drafts = {}
    for found in findings:
        if isinstance(found, Problem):
            problems.append(found)
            continue
        try:
            captions = captions_of(found.captions) if captioned else ()
            named = named_split(found.split)
            row = rows.setdefault(found.locator, Draft(found.where, captions, named, found.extra))
            if named and row.named and named != row.named:
                raise BadCaptionError(f"split is {named!r}, but {row.named!r} in {row.where}")
        except BadCaptionError as error:
            problems.append(Problem(str(error), found.where))
        else:
            row.captions = tuple(dict.fromkeys(row.captions + captions))
            row.named = row.named or named
    return rows


def without_broken(rows: Drafts, store: Store, facts: Path | None, progress: bool, problems: list[Problem]) -> Drafts:
    """Look at every picture. Those that can't be decoded are left out and added to `problems`.

    Args:
        facts: the folder where what is known of the pictures is remembered, None to remember nothing.
    """
    good: Drafts = {}
    for (locator, row), fact in zip(rows.items(), look_at(store, list(rows), facts, progress), strict=True):
        if fact.broken is None:
            row.fact = fact
            good[locator] = row
        else:
            problems.append(Problem(fact.broken, row.where))
    return good
