"""Training the classifier of noisy latents: -log p(y | x_t, t) at uniform t (Dhariwal & Nichol 2021, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.batches import evenly, load_pixels, pixel_batches
from ldm.data.cache.latents import LatentCache
from ldm.data.dataset import CaptionedPictures
from ldm.data.labels import Labels
from ldm.diffusion.guidance import classifier_loss
from ldm.diffusion.timesteps import at_share
from ldm.evaluation.validation import LabeledValidationSet, classifier_accuracy
from ldm.models.classifier import NoisyClassifier
from ldm.models.vae import Posterior, encode
from ldm.system.files import put_in_place, temporary_beside
from ldm.training.config import ClassifierTrainingConfig, Config, DataConfig
from ldm.training.plain_loop import PlainTraining
from ldm.training.randomness import generator, row_of
from ldm.training.train_state import whole_weights

ASKED = 1024  # held-out pictures, at most: an accuracy is then known to 0.02


@dataclass(frozen=True)
class LabelledSamples(Dataset[dict[str, Any]]):
    """Sample n of a classifier's run: a picture's posterior (its pixels, if there is none yet), label, t and noise.

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

    def __getitem__(self, n: int) -> dict[str, Any]:
        number = row_of(self.seed, n, len(self.pictures))
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
class ClassifierTraining(PlainTraining):
    """A classifier, and the frozen VAE for samples that are still pixels."""

    name = "classifier"
    vae: Any = None

    @classmethod
    def prepare(
        cls, config: Config, accelerator: Accelerator, classifier: NoisyClassifier, vae: Any
    ) -> ClassifierTraining:
        """Hand the classifier over to accelerate and make its optimizer."""
        training = cls(config, accelerator, vae=vae)
        training.add("classifier", classifier, config.classifier_training.weight_decay)
        return training

    @property
    def recipe(self) -> ClassifierTrainingConfig:
        return self.config.classifier_training

    @property
    def classifier(self) -> NoisyClassifier:
        """The classifier itself, out of what accelerate wraps it in."""
        return self.accelerator.unwrap_model(self.trainees["classifier"].module)  # type: ignore[no-any-return]

    def step(self, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One step on a batch of `LabelledSamples`; the loss is in nats."""
        device = self.accelerator.device
        x0 = self.latents(batch).sample(batch["posterior_noise"].to(device))
        trainee, labels = self.trainees["classifier"], batch["label"].to(device)
        with self.accelerator.autocast():
            loss = classifier_loss(
                trainee.module, self.classifier.schedule, x0, batch["t"], batch["eps"].to(device), labels
            ).mean()
        skipped = self.update(trainee, loss, step)
        return loss.detach(), skipped

    def latents(self, batch: dict[str, Tensor]) -> Posterior:
        """The posterior of each sample, on the device."""
        device = self.accelerator.device
        if "pixels" not in batch:
            return Posterior(batch["mean"].to(device), batch["std"].to(device))
        with torch.no_grad():
            return encode(self.vae, batch["pixels"].to(device))

    def accuracy(self, questions: LabeledValidationSet) -> dict[str, float]:
        """How often the classifier is right on held-out pictures."""
        classifier = self.classifier.eval()
        answers = classifier_accuracy(classifier, classifier.schedule, questions)
        classifier.train()
        return answers

    def export(self) -> None:
        """Save RUN/classifier. Every rank must call it."""
        weights = whole_weights(self.trainees["classifier"].module)
        if self.accelerator.is_main_process:
            final = Path(self.config.run) / "classifier"
            temporary = temporary_beside(final)
            self.classifier.save(temporary, weights)
            put_in_place(temporary, final)
        self.accelerator.wait_for_everyone()


@torch.no_grad()
def labelled_questions(
    config: Config, heldout: CaptionedPictures, labels: Labels, vae: Any
) -> LabeledValidationSet | None:
    """The held-out pictures' latents and labels with their fixed (t, eps); None if there are none to ask."""
    rows = evenly(heldout, ASKED)
    if not len(rows):
        return None
    mean = torch.cat([encode(vae, pixels).mean for pixels in pixel_batches(rows, config.data.size, "asking")])
    ids = torch.from_numpy(labels.ids(rows)).to(vae.device)
    rng = generator(config.seed, "held out")
    return LabeledValidationSet.fixed(mean, ids, config.diffusion.timesteps, rng)
