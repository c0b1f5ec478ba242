"""Rows as a source has them => rows to train on, and everything that is wrong with the others."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from ldm.data.images import BadPictureError, decode
from ldm.data.rows import BadCaptionError, Finding, Problem, Split, Store, captions_of, named_split, split_of


@dataclass
class Draft:
    """A picture, as its rows so far describe it."""

    where: str
    captions: tuple[str, ...]
    named: Split | None  # the split, where a column says it
    extra: dict[str, Any]

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


def without_broken(rows: Drafts, store: Store, background: str, progress: bool, problems: list[Problem]) -> Drafts:
    """Decode every picture, in threads. Those that cannot be are left out and added to `problems`."""
    from tqdm import tqdm

    def broken(locator: Any) -> str | None:
        try:
            decode(store.read(locator), background)
        except BadPictureError as error:
            return str(error)
        return None

    good: Drafts = {}
    items = iter(rows.items())
    with (
        warnings.catch_warnings(),
        tqdm(total=len(rows), desc="checking pictures", unit="picture", disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")  # they name no file; what matters is reported
        while chunk := list(itertools.islice(items, 512)):
            for (locator, row), what in zip(chunk, threads.map(broken, dict(chunk)), strict=True):
                if what is None:
                    good[locator] = row
                else:
                    problems.append(Problem(what, row.where))
                bar.update()
    return good
