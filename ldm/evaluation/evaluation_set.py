"""The evaluation set: all real pictures of a data set, and the prompts that a model is evaluated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.data.batches import load_pixels, pixel_batches, spread
from ldm.data.dataset import CaptionedPictures, Row
from ldm.data.rows import is_null
from ldm.evaluation.features import FeatureExtractor, extract_features
from ldm.models.vae import to_pictures

MAX_REFERENCE = 10_000  # pictures of the reference set; the kernel matrix of all pairs has to fit into memory

T = TypeVar("T")
RESERVED = ("top1", "top5", "chance", "candidates", "relatives")  # keys beside the kinds in evaluation.json


@dataclass(frozen=True)
class PromptSet:
    """Captions to generate pictures for, and the real pictures that they belong to.

    Attributes:
        name: "train" or "heldout", the split that they are from.
        numbers: the pictures' indices in the data set.
        captions: the first caption of each.
        kinds: what each tests: its cell in the data's column `test`, or "compositions" where the column `composition`
            says that it is a new combination of things that are trained on apart, or "others".
    """

    name: str
    numbers: tuple[int, ...]
    captions: tuple[str, ...]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def repeated(self, times: int) -> PromptSet:
        """Each prompt so many times in a row: picture i has seed + i, so each time another seed."""

        def each(values: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(value for value in values for _ in range(times))

        return PromptSet(self.name, each(self.numbers), each(self.captions), each(self.kinds))

    def subset(self, most: int) -> PromptSet:
        """At most this many, spread evenly."""
        kept = spread(len(self), most)
        return PromptSet(
            self.name,
            tuple(self.numbers[i] for i in kept),
            tuple(self.captions[i] for i in kept),
            tuple(self.kinds[i] for i in kept),
        )


class EvaluationSet:
    """A data set at one size.

    Attributes:
        pictures: all of its rows.
        captions: of each row.
        groups: the cell of each row in the column `group`, "" without one.
        concepts: the cell of each row in the column `concept`: what it shows, whatever its style or color; or "".
        training: the indices of the training rows, int64.
    """

    def __init__(self, pictures: CaptionedPictures, size: int) -> None:
        self.pictures = pictures
        self.size = size
        rows = list(pictures)
        self.captions = [row.captions for row in rows]
        self.where = [row.where for row in rows]
        self._heldout = [row.split == "heldout" for row in rows]
        self.groups = [text_of(row, "group") for row in rows]
        self.concepts = [text_of(row, "concept") for row in rows]
        self._kinds = [kind_of(row) for row in rows]
        self.training = torch.tensor([i for i, out in enumerate(self._heldout) if not out], dtype=torch.int64)

    def prompts(self, split: str, most: int | None) -> PromptSet:
        """The captions of a split, "train" or "heldout", or at most this many of them, spread evenly."""
        numbers = tuple(i for i, out in enumerate(self._heldout) if out == (split == "heldout"))
        prompts = PromptSet(
            split,
            numbers,
            tuple(self.captions[i][0] for i in numbers),
            tuple(self._kinds[i] for i in numbers),
        )
        return prompts if most is None else prompts.subset(most)

    def reference(self, sets: Sequence[PromptSet], most: int = MAX_REFERENCE) -> list[int]:
        """The indices of training pictures outside these prompt sets, at most this many, spread evenly."""
        taken = {number for prompts in sets for number in prompts.numbers}
        free = [number for number in self.training.tolist() if number not in taken]
        return [free[i] for i in spread(len(free), most)]

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """The real pictures at these indices, [N,3,size,size] in [-1,1]."""
        return torch.stack([load_pixels(self.pictures[i], self.size) for i in numbers])

    def features(self, extractors: Sequence[FeatureExtractor], cache: Path) -> dict[str, Tensor]:
        """The vectors [N,D] of all pictures by extractor, from the cache folder if they were computed before."""
        known = fingerprint(self.pictures)
        files = {}
        for extractor in extractors:
            key = json.dumps([extractor.describe(), known, self.size])
            files[extractor.name] = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        missing = [extractor for extractor in extractors if not files[extractor.name].exists()]
        if missing:
            cache.mkdir(parents=True, exist_ok=True)
            found = extract_features(missing, pixel_batches(self.pictures, self.size, "embedding real pictures"))
            for name, vectors in found.items():
                unfinished = files[name].with_suffix(".new")
                save_file({"vectors": vectors.contiguous()}, unfinished)
                unfinished.rename(files[name])
        return {name: load_file(file)["vectors"] for name, file in files.items()}

    def save(self, number: int, out: Path) -> str:
        """Write the real picture at this index to out/real/<number>.png, once; returns its path relative to out."""
        relative = f"real/{number:06d}.png"
        path = out / relative
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pictures(self.pixels([number]))[0].save(path)
        return relative


def text_of(row: Row, column: str) -> str:
    """A cell as text, stripped; "" if it is empty."""
    cell = row.extra.get(column)
    return "" if is_null(cell) else str(cell).strip()


def kind_of(row: Row) -> str:
    """What a picture tests, as `PromptSet.kinds` has it."""
    test = row.extra.get("test")
    if isinstance(test, str) and test and test not in RESERVED:
        return test
    return "compositions" if row.extra.get("composition") else "others"


def fingerprint(pictures: CaptionedPictures) -> str:
    """The SHA-256 of the pictures' locators and captions, in order."""
    digest = hashlib.sha256()
    for row in pictures:
        digest.update(json.dumps([row.locator, row.captions]).encode())
    return digest.hexdigest()
