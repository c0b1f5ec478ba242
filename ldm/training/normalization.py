"""Latents and contexts of unit variance: what diffusion and cross-attention can learn from.

A pretrained VAE's latents and a text encoder's output have whatever scale their training left. Both are measured once
in a run, on its pictures and captions, kept in RUN and folded into the networks. Measured anew at each start, what the
U-Net sees would change with every new picture.

A text encoder's output has a mean that all captions share, in channels of different spread, and the projections of
cross-attention have no bias to take a mean away. Standardized, captions are learned in about half the
pictures (docs/experiments.md, 20).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import evenly, pixel_batches, spread
from ldm.data.dataset import CaptionedPictures
from ldm.models.text_encoder import TextEncoder, measure_context
from ldm.models.vae import Posterior, encode, measure, normalize
from ldm.system.files import typed_path
from ldm.training.distributed import Tick

MEASURED = 1024  # pictures; the mean of a channel is then known to a thirtieth of its std, or better
CHECKED = 128  # pictures; on OpenMoji the std is then known to 1.4 %
MEASURED_CAPTIONS = 128  # thousands of tokens
CAPTIONS_AT_ONCE = 32
STD_RANGE = (0.9, 1.1)


@dataclass(frozen=True)
class Scale:
    """Mean and std of each channel, float64 [C], in a file.

    Attributes:
        file: where they are kept, as JSON.
        facts: what they depend on; with other facts they are not these.
    """

    file: Path
    facts: Mapping[str, Any]

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Mean and std, if they have been measured with the same facts."""
        try:
            found = json.loads(self.file.read_text("utf-8"))
            mean, std = (torch.tensor(found.pop(name), dtype=torch.float64) for name in ("mean", "std"))
            found["source"] = typed_path(found["source"])  # earlier versions kept it as it was typed
        except (OSError, ValueError, KeyError):
            return None
        return (mean, std) if found == dict(self.facts) else None

    def require(self, what: str) -> tuple[Tensor, Tensor]:
        """Mean and std; raises ValueError, which names the config's key and value, if they have not been measured."""
        found = self.read()
        if found is None:
            raise ValueError(f"{what}: {self.file} is not about it; start the run again")
        return found

    def keep(self, measured: tuple[Tensor, Tensor]) -> None:
        """Write mean and std, in one stroke."""
        mean, std = measured
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f".{self.file.name}.new")
        new.write_text(json.dumps({**self.facts, "mean": mean.tolist(), "std": std.tolist()}, indent=2) + "\n", "utf-8")
        new.rename(self.file)


def measure_latents(
    vae: Any, pictures: CaptionedPictures, size: int, most: int, tick: Tick = lambda: None
) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel [C], over at most so many of these pictures."""

    def posteriors() -> Iterator[Posterior]:
        for pixels in pixel_batches(evenly(pictures, most), size, "measuring latents"):
            yield encode(vae, pixels)
            tick()

    return measure(posteriors())


def normalize_on(vae: Any, pictures: CaptionedPictures, size: int, tick: Tick = lambda: None) -> None:
    """Measure the latents of these pictures and fold their mean and std into the VAE, in place."""
    normalize(vae, *measure_latents(vae, pictures, size, MEASURED, tick))


def check_scale(vae: Any, pictures: CaptionedPictures, size: int) -> None:
    """Refuse a VAE whose latents have a std outside 1 +- 0.1 on these pictures: the noise schedule would not fit.

    Raises:
        ValueError: with the std that was found and what to do.
    """
    _, std = measure_latents(vae, pictures, size, CHECKED)
    overall = float(std.square().mean().sqrt())
    if not STD_RANGE[0] <= overall <= STD_RANGE[1]:
        raise ValueError(
            f"vae: its latents have a std of {overall:.3f} on these pictures, expected 1 +- 0.1; it was normalized on "
            "other pictures. Name it as vae=<folder> to have it measured again, or train one with train/train_vae.py"
        )


def measure_captions(
    text: TextEncoder, pictures: CaptionedPictures, tick: Tick = lambda: None
) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel of the context [dim], over some of these pictures' captions."""
    captions = sorted({caption for row in pictures for caption in row.captions})
    chosen = [captions[i] for i in spread(len(captions), MEASURED_CAPTIONS)]

    def contexts() -> Iterator[Tensor]:
        silent = os.environ.get("RANK", "0") != "0"
        places = range(0, len(chosen), CAPTIONS_AT_ONCE)
        for start in tqdm(places, desc="measuring context", unit="batch", leave=False, disable=silent):
            yield text.encode(chosen[start : start + CAPTIONS_AT_ONCE])
            tick()

    return measure_context(contexts())
