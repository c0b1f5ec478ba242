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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import evenly, pixel_batches, spread
from ldm.data.dataset import CaptionedPictures
from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.safety import read_json
from ldm.models.text_encoder import TextEncoder, measure_context
from ldm.models.vae import Posterior, encode, find_vae, load_vae, measure, normalize
from ldm.system.files import typed_path
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.encoders import for_encoding

MEASURED = 1024  # pictures; the mean of a channel is then known to a thirtieth of its std, or better
CHECKED = 128  # pictures; on OpenMoji the std is then known to 1.4 %
MEASURED_CAPTIONS = 128  # thousands of tokens
CAPTIONS_AT_ONCE = 32
VAE_FILE, TEXT_FILE = "vae_scale.json", "text_scale.json"  # in RUN
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
        """Mean and std, if they have been measured and are about the same facts."""
        try:
            found = json.loads(self.file.read_text("utf-8"))
            mean, std = (torch.tensor(found.pop(name), dtype=torch.float64) for name in ("mean", "std"))
            found["source"] = typed_path(found["source"])  # earlier versions kept it as it was typed
        except (OSError, ValueError, KeyError):
            return None
        return (mean, std) if found == dict(self.facts) else None

    def require(self, what: str) -> tuple[Tensor, Tensor]:
        """Mean and std.

        Args:
            what: the config's key and value, for the message.
        Raises:
            ValueError: if they have not been measured.
        """
        found = self.read()
        if found is None:
            raise ValueError(f"{what}: {self.file} is not about it; start the run again")
        return found

    def keep(self, measure: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Measure unless it was done."""
        if self.read() is not None:
            return
        mean, std = measure()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f".{self.file.name}.new")
        new.write_text(json.dumps({**self.facts, "mean": mean.tolist(), "std": std.tolist()}, indent=2) + "\n", "utf-8")
        new.rename(self.file)


# --- the VAE ------------------------------------------------------------------------------------------


def load_normalized(config: Config, device: torch.device) -> Any:
    """The config's VAE, speaking latents of unit variance: the one in RUN/vae, or `vae`, scaled as it was measured.

    Raises:
        ValueError: if there is neither, with the two ways out.
    """
    trained = Path(config.run) / "vae"
    if config.vae is not None:
        vae = load_vae(config.vae)
        normalize(vae, *latent_scale(config, vae).require(f"vae: {config.vae}"))
        return vae.to(device)
    if (trained / "config.json").exists():
        return load_vae(trained).to(device)
    raise ValueError(
        f"vae: there is none in {trained}; train one with: accelerate launch train/train_vae.py and the same "
        "words as here, or name a pretrained one with vae=<folder or Hub id>"
    )


def vae_downsampling(config: Config, task: str) -> int:
    """Pixels along an edge for one latent of a task's VAE, from its config.json, or from the recipe of one to train."""
    trained = Path(config.run) / "vae"
    if task == "vae" or (config.vae is None and not (trained / "config.json").exists()):
        levels: Sequence[int] = config.vae_model.channels
    else:
        facts = read_json(find_vae(config.vae or trained) / "config.json")
        levels = facts.get("block_out_channels") or facts.get("decoder_block_out_channels") or (1,)
    return 2 ** (len(levels) - 1)


def measure_pretrained(
    config: Config, pictures: CaptionedPictures, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Measure the latents of `vae` on these pictures, once in a run. Every rank must call it; rank 0 measures.

    Args:
        dtype: that it encodes in.
    """

    def measured(tick: Tick) -> None:
        vae = load_vae(config.vae or "")
        scale = latent_scale(config, vae)
        for_encoding(vae.to(device), dtype)
        scale.keep(lambda: measure_latents(vae, pictures, config.data.size, MEASURED, tick))

    if config.vae is not None:
        on_rank_0(measured)
        give_back()


def latent_scale(config: Config, vae: Any) -> Scale:
    """Where the scale of a pretrained VAE's latents is kept, and what it depends on; the VAE as it was loaded."""
    data = config.data
    facts = {"vae": fingerprint(vae), "source": data.source, "size": data.size, "background": data.background}
    return Scale(Path(config.run) / VAE_FILE, facts)


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


# --- the text encoder -----------------------------------------------------------------------------


def load_text(config: Config, device: torch.device) -> TextEncoder:
    """The config's text encoder on a device, standardized as it was measured.

    Raises:
        ValueError: if it should be standardized and was not measured, or there is none.
    """
    text = TextEncoder.load(config.text)
    if config.text.standardize:
        text.standardize(*context_scale(config, text).require(f"text.encoder: {config.text.encoder}"))
    text.model.to(device)
    return text


def measure_text(
    config: Config, pictures: CaptionedPictures, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Measure the context of these pictures' captions, once in a run. Every rank must call it; rank 0 measures.

    Args:
        dtype: that they are encoded in.
    """

    def measured(tick: Tick) -> None:
        text = TextEncoder.load(config.text)
        scale = context_scale(config, text)
        for_encoding(text.model.to(device), dtype)
        scale.keep(lambda: measure_captions(text, pictures, tick))

    if config.text.encoder is not None and config.text.standardize:
        on_rank_0(measured)
        give_back()


def context_scale(config: Config, text: TextEncoder) -> Scale:
    """Where the scale of the context is kept, and what it depends on; the text encoder as it was loaded."""
    facts = {
        "text.encoder": fingerprint(text.model, tokenizer_facts(text.tokenizer)),
        "source": config.data.source,
        "caption_columns": list(config.data.caption_columns),
    }
    return Scale(Path(config.run) / TEXT_FILE, facts)


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
