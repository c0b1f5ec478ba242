"""The frozen encoders of a run, with latents and contexts of unit variance: what diffusion and attention learn from.

A pretrained VAE's latents and a text encoder's output have whatever scale their training left. Both are measured once
in a run, on its pictures and captions, kept in RUN and folded into the networks. Measured anew at each start, what the
U-Net sees would change with every new picture.

A text encoder's output has a mean that all captions share, in channels of different spread, and the projections of
cross-attention have no bias to take a mean away. Standardized, captions are learned in about half the
pictures (docs/experiments.md, 20).

Hashes of weights are remembered by the stamps of their files (facts.py), so a resumed run loads neither encoder.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import evenly, pixel_batches, spread
from ldm.data.dataset import CaptionedPictures
from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.safety import read_json
from ldm.models.text_encoder import TextEncoder, find_text_encoder, measure_context
from ldm.models.vae import Posterior, encode, find_vae, load_vae, measure, normalize
from ldm.system.files import typed_path
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.encoders import Encoders, for_encoding, network_of
from ldm.training.facts import RunFacts, folder_stamp, stamp

MEASURED = 1024  # pictures; the mean of a channel is then known to a thirtieth of its std, or better
CHECKED = 128  # pictures; on OpenMoji the std is then known to 1.4 %
MEASURED_CAPTIONS = 128  # thousands of tokens
CAPTIONS_AT_ONCE = 32
STD_RANGE = (0.9, 1.1)

E = TypeVar("E")


def build_encoders(
    config: Config, pictures: CaptionedPictures, device: torch.device, dtype: torch.dtype, *, text: bool = True
) -> Encoders:
    """The VAE and, if wanted, the text encoder of a run, measured on its training pictures if that was not done yet.

    Every rank must call it; rank 0 measures.

    Args:
        dtype: that they encode in.
        text: whether the run uses captions.
    Raises:
        ValueError: if there is no VAE, with the two ways out.
    """
    sources: dict[str, Source[Any]] = {"vae": VAESource(config, device)}
    if text and config.text.encoder is not None:
        sources["text"] = TextSource(config, device)
    for source in sources.values():
        source.measure_once(pictures, dtype)
    load_text = sources["text"].load if "text" in sources else None
    together = config.cache_folder() is None
    return Encoders(sources["vae"].load, load_text, dtype, together=together, sources=sources)


class Source(ABC, Generic[E]):
    """Where an encoder of a run comes from: its files, and the scale that was measured in this run."""

    name: str  # among a run's encoders
    key: str  # of the config
    scale_file: str  # in RUN

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device, self.facts = config, device, RunFacts(config.run)

    @cached_property
    @abstractmethod
    def folder(self) -> Path:
        """Of its files."""

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Whether it is measured, and scaled as that says."""

    @abstractmethod
    def read(self, *, weights: bool = True) -> E:
        """The encoder as its files have it; without weights, on the meta device."""

    @abstractmethod
    def hash(self, encoder: E) -> str:
        """A hash of all that decides what it computes."""

    @abstractmethod
    def dependencies(self) -> dict[str, Any]:
        """What its scale depends on besides its weights."""

    @abstractmethod
    def measure(self, encoder: E, pictures: CaptionedPictures, tick: Tick) -> tuple[Tensor, Tensor]:
        """Mean and std of each channel of what it makes of these pictures."""

    @abstractmethod
    def rescale(self, encoder: E, mean: Tensor, std: Tensor) -> None:
        """Fold mean and std into it, in place."""

    @cached_property
    def stamp(self) -> str:
        """Of its files and of what reading them depends on."""
        files = folder_stamp(self.folder)
        return files and stamp(files, self.config.text.max_length if self.name == "text" else None)

    @cached_property
    def known_weights(self) -> str | None:
        """The hash of the encoder as its files have it, if it is remembered."""
        known: str | None = self.facts.recall(f"{self.name}: weights", self.stamp)
        return known

    def weights(self, encoder: E | None = None) -> str:
        """The hash of the encoder as its files have it; it is read only if the hash isn't known."""
        if self.known_weights is None:
            self.known_weights = self.hash(self.read() if encoder is None else encoder)
            self.facts.keep(f"{self.name}: weights", self.stamp, self.known_weights)
        return self.known_weights

    def scale(self, encoder: E | None = None) -> Scale:
        """Where its scale is kept, and what that depends on."""
        return Scale(Path(self.config.run) / self.scale_file, {self.key: self.weights(encoder), **self.dependencies()})

    def measure_once(self, pictures: CaptionedPictures, dtype: torch.dtype) -> None:
        """Measure its scale unless that was done. Every rank must call it; rank 0 measures."""

        def work(tick: Tick) -> int:
            encoder = self.read() if self.known_weights is None else None
            scale = self.scale(encoder)
            if scale.read() is not None:
                return 0
            encoder = self.read() if encoder is None else encoder
            for_encoding(network_of(encoder).to(self.device), dtype)
            scale.keep(self.measure(encoder, pictures, tick))
            return 1

        if self.scaled and on_rank_0(work):
            give_back()

    def load(self) -> E:
        """The encoder on the run's device, in float32, scaled as it was measured."""
        encoder = self.read()
        self.weights(encoder)
        if self.scaled:
            self.rescale(encoder, *self.scale().require(f"{self.key}: {self.folder}"))
        network_of(encoder).to(self.device)
        return encoder

    def identity(self) -> list[Any]:
        """All that `load` depends on."""
        scale = self.scale().require(f"{self.key}: {self.folder}") if self.scaled else ()
        return [self.weights(), [tensor.tolist() for tensor in scale]]

    def fingerprint(self, dtype: torch.dtype) -> str | None:
        """The hash of the scaled encoder in a dtype, if it is remembered."""
        if self.known_weights is None:
            return None
        known: str | None = self.facts.recall(f"{self.name}: {dtype}", stamp(self.identity()))
        return known

    def remember(self, dtype: torch.dtype, value: str) -> None:
        """Remember the hash of the scaled encoder in a dtype."""
        self.facts.keep(f"{self.name}: {dtype}", stamp(self.identity()), value)


class VAESource(Source[Any]):
    """The VAE in RUN/vae, which speaks latents of unit variance, or the config's `vae`, which is measured."""

    name, key, scale_file = "vae", "vae", "vae_scale.json"

    @cached_property
    def folder(self) -> Path:
        trained = Path(self.config.run) / "vae"
        if self.config.vae is not None:
            return find_vae(self.config.vae)
        if (trained / "config.json").exists():
            return trained
        raise ValueError(
            f"vae: there is none in {trained}; train one with: accelerate launch train/train_vae.py and the same "
            "words as here, or name a pretrained one with vae=<folder or Hub id>"
        )

    @property
    def scaled(self) -> bool:
        return self.config.vae is not None

    def read(self, *, weights: bool = True) -> Any:
        return load_vae(self.folder, weights=weights)

    def hash(self, encoder: Any) -> str:
        return fingerprint(encoder)

    def dependencies(self) -> dict[str, Any]:
        data = self.config.data
        return {"source": data.source, "size": data.size, "background": data.background}

    def measure(self, encoder: Any, pictures: CaptionedPictures, tick: Tick) -> tuple[Tensor, Tensor]:
        return measure_latents(encoder, pictures, self.config.data.size, MEASURED, tick)

    def rescale(self, encoder: Any, mean: Tensor, std: Tensor) -> None:
        normalize(encoder, mean, std)


class TextSource(Source[TextEncoder]):
    """The config's text encoder, standardized if the config says so."""

    name, key, scale_file = "text", "text.encoder", "text_scale.json"

    @cached_property
    def folder(self) -> Path:
        return find_text_encoder(self.config.text.encoder or "")

    @property
    def scaled(self) -> bool:
        return self.config.text.standardize

    def read(self, *, weights: bool = True) -> TextEncoder:
        return TextEncoder.load(self.config.text, weights=weights)

    def hash(self, encoder: TextEncoder) -> str:
        return fingerprint(encoder.model, tokenizer_facts(encoder.tokenizer))

    def dependencies(self) -> dict[str, Any]:
        return {"source": self.config.data.source, "caption_columns": list(self.config.data.caption_columns)}

    def measure(self, encoder: TextEncoder, pictures: CaptionedPictures, tick: Tick) -> tuple[Tensor, Tensor]:
        return measure_captions(encoder, pictures, tick)

    def rescale(self, encoder: TextEncoder, mean: Tensor, std: Tensor) -> None:
        encoder.standardize(mean, std)


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


def vae_downsampling(config: Config, task: str) -> int:
    """Pixels along an edge for one latent of a task's VAE, from its config.json, or from the recipe of one to train."""
    trained = Path(config.run) / "vae"
    if task == "vae" or (config.vae is None and not (trained / "config.json").exists()):
        levels: Sequence[int] = config.vae_model.channels
    else:
        facts = read_json(find_vae(config.vae or trained) / "config.json")
        levels = facts.get("block_out_channels") or facts.get("decoder_block_out_channels") or (1,)
    return 2 ** (len(levels) - 1)


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
