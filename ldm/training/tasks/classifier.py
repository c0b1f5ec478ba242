"""Training the classifier of noisy latents: -log p(y | x_t, t) at uniform t (Dhariwal & Nichol 2021, section 4.3).

It reads the config of the U-Net's training: the same pictures, VAE and noise schedule, so that it sees what the U-Net
sees. Its gradient guides sampling (ldm.diffusion.guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data.batches import evenly, load_pixels
from ldm.data.buckets import Buckets
from ldm.data.cache.latents import LatentCache
from ldm.data.dataset import CaptionedPictures, Row
from ldm.data.labels import Labels
from ldm.diffusion.guidance import classifier_loss
from ldm.diffusion.timesteps import at_share
from ldm.evaluation.validation import LabeledValidationSet, classifier_accuracy
from ldm.models.classifier import NoisyClassifier, build_classifier
from ldm.models.vae import Posterior, encode, latent_shape
from ldm.training.checkpoint import has_begun
from ldm.training.config import Config, DataConfig
from ldm.training.distributed import Tick, encoding_dtype
from ldm.training.encoder_sources import build_encoders
from ldm.training.encoders import Encoders
from ldm.training.export import check_weights, export, loadable
from ldm.training.initial_model import schedule_of
from ldm.training.latent_cache import build_cache, encode_once
from ldm.training.normalization import check_scale
from ldm.training.randomness import generator, row_of
from ldm.training.task import Recipe, Task
from ldm.training.train_state import whole_weights

VALIDATED = 1024  # held-out pictures, at most: an accuracy is then known to 0.02


@dataclass(frozen=True)
class LabeledSamples:
    """Sample n: a picture's posterior (its pixels, if there is no cache), label, t and noise.

    Attributes:
        ids: the label of each picture.
        T: number of timesteps.
        latent_shape: (C, h, w).
        cache: the pictures' posteriors.
    """

    pictures: CaptionedPictures
    ids: npt.NDArray[np.int64]
    data: DataConfig
    seed: int
    T: int
    latent_shape: tuple[int, int, int]
    cache: LatentCache | None

    def row_of(self, n: int) -> int:
        return row_of(self.seed, n, len(self.pictures))

    def row_facts(self, number: int, row: Row) -> list[Any]:
        return [int(self.ids[number])]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, as DataLoader reads them."""
        with self.cache.reading() if self.cache else nullcontext():
            return [self[n] for n in numbers]

    def __getitem__(self, n: int) -> dict[str, Any]:
        number = self.row_of(n)
        rng = generator(self.seed, "classifier sample", n)
        u, x, y, flip = torch.rand(4, generator=rng, dtype=torch.float64)
        flipped = self.data.flip and float(flip) < 0.5
        sample = {
            "label": int(self.ids[number]),
            "t": at_share(u, self.T),
            "eps": torch.randn(self.latent_shape, generator=rng),
            "posterior_noise": torch.randn(self.latent_shape, generator=rng),
        }
        if self.cache is None:
            row, data = self.pictures[number], self.data
            return sample | {"pixels": load_pixels(row, data.size, data.crop, (float(x), float(y)), flipped)}
        mean, std = self.cache.posterior(number, flipped)
        return sample | {"mean": mean, "std": std}


@dataclass
class Classifier(Task):
    """A classifier of noisy latents, behind a frozen VAE."""

    name = "classifier"
    title = "classifier"
    optim_section = loop_section = "classifier_training"
    result = "classifier"

    pictures: CaptionedPictures
    labels: Labels
    encoders: Encoders
    samples: LabeledSamples = field(init=False)
    heldout: LabeledValidationSet | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        config, ids = self.config, self.labels.ids(self.pictures.train)
        self.latent_shape = latent_shape(self.encoders.vae_outline, config.data.size)
        self.schedule = schedule_of(config)
        if self.schedule.name == "rectified_flow":
            raise ValueError(
                "diffusion.schedule: stock samplers don't report their place on rectified_flow's path, which guidance "
                "by a classifier needs; train it for a model with another schedule"
            )
        self.samples = LabeledSamples(
            self.pictures.train, ids, config.data, config.seed, self.schedule.T, self.latent_shape, None
        )
        self.workers = config.data.workers
        self.details = f", latents {list(self.latent_shape)}"

    @classmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Classifier:
        assert config.data.label_column is not None
        labels = Labels.read(pictures, config.data.label_column)
        per_label = np.bincount(labels.ids(pictures.train), minlength=len(labels.names))
        accelerator.print(
            f"{labels.column}: {len(labels.names)} classes, the most frequent {labels.names[per_label.argmax()]} with "
            f"{per_label.max() / len(pictures.train):.1%} of the pictures"
        )
        device, dtype = accelerator.device, encoding_dtype(accelerator)
        encoders = build_encoders(config, pictures.train, device, dtype, text=False)
        if not has_begun(config.run, cls.name) and config.init is None:
            check_scale(encoders.vae, pictures.train, config.data.size)
        return cls(config, accelerator, pictures, labels, encoders)

    @cached_property
    def recipe(self) -> Recipe:
        every = self.config.classifier_training.checkpoint_every
        return Recipe.of(self.config.classifier_training, evaluate_every=every, sample_every=0)

    def build(self) -> None:
        torch.manual_seed(self.config.seed)
        self.add("classifier", self.fresh())

    def fresh(self) -> NoisyClassifier:
        """A classifier with random weights."""
        return build_classifier(
            self.config.classifier, latent_shape=self.latent_shape, names=self.labels.names, schedule=self.schedule
        )

    def prepare(self) -> None:
        config, rows = self.config, evenly(self.pictures.heldout, VALIDATED)
        if config.cache_folder() is not None:
            cache = build_cache(config, self.pictures.train, self.encoders, self.latent_shape, "classifier")
            self.samples, self.workers = replace(self.samples, cache=cache), 0
        if len(rows):
            squares = Buckets.square(config.data.size, len(rows))
            means, _ = encode_once(config, rows, squares, [], self.encoders, self.latent_shape, "classifier_heldout")
            x0, ids = torch.stack(means).to(self.accelerator.device), torch.from_numpy(self.labels.ids(rows))
            rng = generator(config.seed, "held out")
            self.heldout = LabeledValidationSet.fixed(x0, ids.to(x0.device), config.diffusion.timesteps, rng)
        self.free()

    def frozen_facts(self) -> dict[str, str]:
        identity = self.encoders.identity
        return {"encoders": identity[:16]} if identity else {}

    def free(self) -> None:
        self.encoders.free()

    @property
    def classifier(self) -> NoisyClassifier:
        """The classifier itself, out of what accelerate wraps it in."""
        return self.accelerator.unwrap_model(self.train_state["classifier"].module)  # type: ignore[no-any-return]

    def batch(self, collated: dict[str, Any]) -> dict[str, Tensor]:
        device = self.accelerator.device
        on_device = {name: value.to(device, non_blocking=True) for name, value in collated.items() if name != "t"}
        if "pixels" in on_device:
            with torch.no_grad():
                posterior = encode(self.encoders.vae, on_device.pop("pixels"))
        else:
            posterior = Posterior(on_device["mean"], on_device["std"])
        return on_device | {"x0": posterior.sample(on_device["posterior_noise"]), "t": collated["t"]}

    def loss(self, step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        module = self.train_state["classifier"].module
        with self.accelerator.autocast():
            loss = classifier_loss(module, self.schedule, batch["x0"], batch["t"], batch["eps"], batch["label"])
        return {"classifier": loss}

    def validate(self) -> dict[str, float]:
        """Accuracy on held-out pictures, in total and by quarter of t, and the loss in nats."""
        if self.heldout is None:
            return {}
        classifier = self.classifier.eval()
        found = classifier_accuracy(classifier, self.schedule, self.heldout)
        classifier.train()
        return {f"heldout/{name}": value for name, value in found.items()}

    def export(self, step: int) -> Path | None:
        """Save RUN/classifier."""
        weights = whole_weights(self.train_state["classifier"].module)

        def write(folder: Path, _: Tick) -> None:
            self.classifier.save(folder, weights)
            with loadable():
                found = NoisyClassifier.load(folder)
            check_weights("classifier", weights, found.state_dict())

        return export(Path(self.config.run) / "classifier", step, write, must=step == self.recipe.steps)

    def summary(self) -> str:
        example = f"--classifier {Path(self.config.run) / 'classifier'} --class-label {self.labels.names[0]}"
        return f"classifier: done; guide with it: ldm sample MODEL PROMPT {example}"
