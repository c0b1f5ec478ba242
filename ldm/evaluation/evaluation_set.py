"""All real pictures of a data set, and the captions among theirs that a model is asked to draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.data.batches import pixel_batches, spread
from ldm.data.cache.latents import load_pixels
from ldm.data.dataset import CaptionedPictures
from ldm.evaluation.features import Space, embed_all
from ldm.models.vae import to_pictures

REFERENCE = 10_000  # pictures that others are compared with; all pairs of them have to fit into memory


@dataclass(frozen=True)
class Asked:
    """Captions to draw, and the real pictures that they belong to.

    Attributes:
        name: "train" or "heldout", the split that they are from.
        numbers: the pictures' places in the data set.
        captions: the first caption of each.
        compositions: whether each is a new combination of things that are trained on apart.
    """

    name: str
    numbers: tuple[int, ...]
    captions: tuple[str, ...]
    compositions: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, most: int) -> Asked:
        """At most so many, spread evenly."""
        kept = spread(len(self), most)
        return Asked(
            self.name,
            tuple(self.numbers[i] for i in kept),
            tuple(self.captions[i] for i in kept),
            tuple(self.compositions[i] for i in kept),
        )


class Gallery:
    """A data set at one size.

    Attributes:
        pictures: all of its rows.
        captions: of each row.
        training: the places of the rows that are trained on, int64.
    """

    def __init__(self, pictures: CaptionedPictures, size: int) -> None:
        self.pictures = pictures
        self.size = size
        rows = list(pictures)
        self.captions = [row.captions for row in rows]
        self.where = [row.where for row in rows]
        self._heldout = [row.split == "heldout" for row in rows]
        self._composition = [bool(row.extra.get("composition")) for row in rows]
        self.training = torch.tensor([i for i, out in enumerate(self._heldout) if not out], dtype=torch.int64)

    def ask(self, split: str, most: int | None) -> Asked:
        """The captions of a split, or at most so many of them, spread evenly."""
        numbers = tuple(i for i, out in enumerate(self._heldout) if out == (split == "heldout"))
        asked = Asked(
            split,
            numbers,
            tuple(self.captions[i][0] for i in numbers),
            tuple(self._composition[i] for i in numbers),
        )
        return asked if most is None else asked.some(most)

    def others(self, sets: Sequence[Asked], most: int = REFERENCE) -> list[int]:
        """Training pictures that are in none of these sets, at most so many, spread evenly."""
        taken = {number for asked in sets for number in asked.numbers}
        free = [number for number in self.training.tolist() if number not in taken]
        return [free[i] for i in spread(len(free), most)]

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """The real pictures at these places, [N,3,size,size] in [-1,1]."""
        return torch.stack([load_pixels(self.pictures[i], self.size) for i in numbers])

    def vectors(self, spaces: Sequence[Space], cache: Path) -> dict[str, Tensor]:
        """Each space's vectors [N,D] of all pictures, from the cache folder if they were computed before."""
        known = fingerprint(self.pictures)
        files = {}
        for space in spaces:
            key = json.dumps([space.describe(), known, self.size])
            files[space.name] = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        missing = [space for space in spaces if not files[space.name].exists()]
        if missing:
            cache.mkdir(parents=True, exist_ok=True)
            found = embed_all(missing, pixel_batches(self.pictures, self.size, "looking at real pictures"))
            for name, vectors in found.items():
                unfinished = files[name].with_suffix(".new")
                save_file({"vectors": vectors.contiguous()}, unfinished)
                unfinished.rename(files[name])
        return {name: load_file(file)["vectors"] for name, file in files.items()}

    def save(self, number: int, out: Path) -> str:
        """Write the real picture at this place to out/real/<number>.png, once; returns its path relative to out."""
        relative = f"real/{number:06d}.png"
        path = out / relative
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pictures(self.pixels([number]))[0].save(path)
        return relative


def fingerprint(pictures: CaptionedPictures) -> str:
    """The SHA-256 of which pictures these are: their locators and captions, in order."""
    digest = hashlib.sha256()
    for row in pictures:
        digest.update(json.dumps([row.locator, row.captions]).encode())
    return digest.hexdigest()
