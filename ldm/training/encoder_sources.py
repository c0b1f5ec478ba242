"""Where the frozen encoders of a run come from: their files, and the scale that was measured in this run.

Hashes of weights are remembered by the stamps of their files (facts.py), so a resumed run loads neither encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ldm.data.dataset import CaptionedPictures
from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text_encoder import TextConfig, TextEncoder, find_text_encoder, tokenizer_folder
from ldm.models.vae import find_vae, load_vae, normalize
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.encoders import Encoders, for_encoding, network_of
from ldm.training.facts import RunFacts, folder_stamp, stamp
from ldm.training.initial_model import find_init
from ldm.training.normalization import MEASURED, Scale, measure_captions, measure_latents

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
    def folders(self) -> list[Path]:
        """All that hold its files."""
        return [self.folder]

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Whether it is measured and scaled."""

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
        files = [folder_stamp(folder) for folder in self.folders]
        length = self.config.text.max_length if self.name == "text" else None
        return stamp(*files, length) if all(files) else ""

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
    """The VAE in RUN/vae, which speaks latents of unit variance, the config's `vae`, which is measured, or init's."""

    name, key, scale_file = "vae", "vae", "vae_scale.json"

    @cached_property
    def folder(self) -> Path:
        trained = Path(self.config.run) / "vae"
        if self.config.init is not None:
            return find_vae(find_init(self.config.init))
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
        return self.config.vae is not None and self.config.init is None  # whose U-Net knows its latents as they are

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
    """The config's text encoder, standardized with text.standardize, or init's."""

    name, key, scale_file = "text", "text.encoder", "text_scale.json"

    @cached_property
    def folder(self) -> Path:
        return find_text_encoder(self.text.encoder or "")

    @property
    def folders(self) -> list[Path]:
        return [self.folder, tokenizer_folder(self.folder)]

    @property
    def text(self) -> TextConfig:
        """The config's section, with init's folder as the encoder where it is init's."""
        text, init = self.config.text, self.config.init
        return text if init is None else replace(text, encoder=str(find_init(init)))

    @property
    def scaled(self) -> bool:
        return self.config.text.standardize

    def read(self, *, weights: bool = True) -> TextEncoder:
        return TextEncoder.load(self.text, weights=weights)

    def hash(self, encoder: TextEncoder) -> str:
        return fingerprint(encoder.model, tokenizer_facts(encoder.tokenizer))

    def dependencies(self) -> dict[str, Any]:
        return {"source": self.config.data.source, "caption_columns": list(self.config.data.caption_columns)}

    def measure(self, encoder: TextEncoder, pictures: CaptionedPictures, tick: Tick) -> tuple[Tensor, Tensor]:
        return measure_captions(encoder, pictures, tick)

    def rescale(self, encoder: TextEncoder, mean: Tensor, std: Tensor) -> None:
        encoder.standardize(mean, std)
