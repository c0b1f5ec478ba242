"""Synthetic rows in a real latent cache, in any number, without encoding a picture.

Captions are all different. Latents and contexts have the shapes of configs/openmoji64.yaml, at the chosen resolution.
The stores are written and read by ldm.data itself; only their content is random.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.buckets import Buckets
from ldm.data.cache.latents import Builder, Captions, LatentCache, context_kind, posterior_kind, save_table
from ldm.data.cache.store import Kind, to_keys
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import CaptionedPictures, read_captioned

CHANNELS = 4
PART = 512  # rows per write


@dataclass(frozen=True)
class Rows:
    """`count` rows in a folder, with latents [4,edge,edge] and contexts [L,D]."""

    folder: Path
    count: int
    edge: int
    context: tuple[int, int] = (24, 384)

    @property
    def place(self) -> Path:
        """Their folder."""
        return self.folder / f"{self.count}-rows-{self.edge}"

    @property
    def posteriors(self) -> Kind:
        """The store of their latents."""
        return posterior_kind("synthetic", (CHANNELS, self.edge, self.edge), 4 * self.edge, "white")

    @property
    def contexts(self) -> Kind:
        """The store of their captions' contexts."""
        return context_kind("synthetic", self.context)

    @property
    def size(self) -> int:
        """Approximate bytes on disk."""
        return self.count * (self.posteriors.disk_size + self.contexts.disk_size + 400)

    def write(self) -> None:
        """Make them if they are missing."""
        table = self.place / "rows.npy"
        if table.exists():
            return
        save_captions(self.place / "data", self.count)
        pictures = self.pictures()
        builder = Builder(self.place / "cache")
        keys = to_keys(b"".join(self.posteriors.key(b"%d" % i) for i in range(self.count)))
        captions = Captions.of(pictures, self.contexts).keys
        rng = np.random.default_rng(0)
        mean = rng.standard_normal((PART, *self.posteriors.shape[1:]), np.float32)
        latents = np.stack([mean, np.full_like(mean, 0.05)], 1)  # mean and std
        states = rng.standard_normal((PART, *self.contexts.shape), np.float32)
        for kind, wanted, payloads in ((self.posteriors, keys, latents), (self.contexts, captions, states)):
            with builder.writer(kind) as writer:
                for start in tqdm(range(0, len(wanted), PART), f"{self.count:,} {kind.name}", leave=False, delay=2):
                    part = wanted[start : start + PART]
                    writer.append(part, payloads[: len(part)])
        save_table(table, keys.reshape(-1, 1))

    def pictures(self) -> CaptionedPictures:
        """The rows as training reads them, without decoding the pictures."""
        return read_captioned(self.place / "data", check=False, holdout=0.0, progress=False)

    def source(self) -> ConditionedPictures:
        """The same with all of their conditions."""
        return ConditionedPictures.read(self.pictures(), progress=False)

    def cache(self) -> LatentCache:
        """Their latent cache."""
        buckets = Buckets.square(4 * self.edge, self.count)
        return LatentCache.open(
            self.place / "cache", self.place / "rows.npy", [self.posteriors], self.contexts, buckets
        )


def save_captions(folder: Path, count: int) -> None:
    """A data set of `datasets` with `count` different captions of one black picture."""
    import datasets

    datasets.disable_progress_bars()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    cell = {"bytes": picture.getvalue(), "path": None}
    columns = {"image": [cell] * count, "text": [f"picture {i}" for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
