"""Training the autoencoder: reconstruct, stay near a Gaussian, and (optionally) look and feel right.

    L = l1 |x' - x| + mse (x' - x)**2 + gradient |dx' - dx| + kl KL(q(z|x) || N(0, I))
        + perceptual LPIPS(x', x) + adversarial PatchGAN(x')              (Rombach et al. 2022, section 3.1)

The KL weight is tiny: latents need a bounded, smooth shape, not a standard normal one; their scale is
set afterwards (models/vae.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ldm.data.batches import load_pixels
from ldm.data.dataset import CaptionedPictures, Row
from ldm.models.vae import build_vae, latent_shape, load_vae
from ldm.training.config import Config, DataConfig, VAETrainingConfig
from ldm.training.distributed import Tick
from ldm.training.encoder_report import reconstructions, report_reconstruction
from ldm.training.export import check_weights, export, loadable
from ldm.training.normalization import normalize_on
from ldm.training.randomness import generator, row_of
from ldm.training.task import Recipe, Task
from ldm.training.train_state import whole_weights

VALIDATED = 256  # pictures, at most


@dataclass(frozen=True)
class PixelSamples:
    """Sample n: a picture [3,H,W] in [-1,1] and the noise of its posterior, [C,h,w]."""

    pictures: CaptionedPictures
    data: DataConfig
    seed: int
    latent_shape: tuple[int, int, int]
    crops: float = 0.0

    def row_of(self, n: int) -> int:
        return row_of(self.seed, n, len(self.pictures))

    def row_facts(self, number: int, row: Row) -> list[Any]:
        return []

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        row = self.pictures[self.row_of(n)]
        rng = generator(self.seed, "vae sample", n)
        x, y, flip = torch.rand(3, generator=rng, dtype=torch.float64).tolist()
        whole = not self.crops or float(torch.rand((), generator=rng, dtype=torch.float64)) >= self.crops
        crop = self.data.crop if whole else "detail"
        pixels = load_pixels(row, self.data.size, crop, (x, y), self.data.flip and flip < 0.5)
        return {"pixels": pixels, "noise": torch.randn(self.latent_shape, generator=rng)}


@dataclass
class Autoencoder(Task):
    """An AutoencoderKL and, with an adversarial loss, a discriminator."""

    name = "vae"
    title = "VAE"
    optim_section = loop_section = "vae_training"
    result = "vae"
    preview_folder = "reconstructions"

    pictures: CaptionedPictures
    quality: str = ""

    def __post_init__(self) -> None:
        self.latent_shape = latent_shape(build_vae(self.config.vae_model), self.config.data.size)
        self.samples = PixelSamples(
            self.pictures.train, self.config.data, self.config.seed, self.latent_shape, self.config.vae_training.crops
        )
        self.workers = self.config.data.workers
        self.details = f", latents {list(self.latent_shape)}"

    @classmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Autoencoder:
        return cls(config, accelerator, pictures)

    @cached_property
    def recipe(self) -> Recipe:
        every = self.config.vae_training.checkpoint_every
        return Recipe.of(self.config.vae_training, evaluate_every=every, sample_every=every)

    def build(self) -> None:
        torch.manual_seed(self.config.seed)
        self.add("vae", Reconstruction(build_vae(self.config.vae_model)))
        if self.config.vae_training.adversarial:
            self.add("discriminator", PatchDiscriminator())
        perceptual = self.config.vae_training.perceptual > 0
        self.lpips = load_lpips(self.accelerator.device) if perceptual else None

    @property
    def vae(self) -> Any:
        """The autoencoder itself, out of what accelerate wraps it in."""
        return self.accelerator.unwrap_model(self.train_state["vae"].module).vae

    def batch(self, collated: dict[str, Any]) -> dict[str, Tensor]:
        return {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in collated.items()}

    def loss(self, step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        recipe, pixels = self.config.vae_training, batch["pixels"]
        discriminator = self.train_state["discriminator"].module if "discriminator" in self.train_state else None
        with self.accelerator.autocast():
            output, kl = self.train_state["vae"].module(pixels, batch["noise"])  # (B, 3, H, W), (B,)
            loss = pixel_loss(recipe, output, pixels) + recipe.kl * kl
            if self.lpips is not None:
                loss = loss + recipe.perceptual * self.lpips(output, pixels).flatten(1).mean(1)
            if discriminator is None or step < recipe.adversarial_start:
                return {"vae": loss}
            discriminator.requires_grad_(False)
            loss = loss + recipe.adversarial * generator_loss(discriminator(output))
            discriminator.requires_grad_(True)
            hinge = discriminator_loss(discriminator(pixels), discriminator(output.detach()))
        return {"vae": loss, "discriminator": hinge}

    def validate(self) -> dict[str, float]:
        """PSNR in dB of reconstructions, of held-out pictures if there are any."""
        mean, self.quality = report_reconstruction(self.vae, self.pictures, self.config.data.size, VALIDATED)
        return {"heldout/psnr" if len(self.pictures.heldout) else "train/psnr": mean}

    def preview(self, step: int, interrupted: Callable[[], bool]) -> Image.Image | None:
        """Pictures over their reconstructions."""
        rows = self.pictures.heldout if len(self.pictures.heldout) else self.pictures.train
        return reconstructions(self.vae, rows, self.config.data.size)

    def export(self, step: int) -> Path | None:
        """Save RUN/vae, normalized, after the last step alone: what finds it there can rely on it being trained."""
        if step < self.recipe.steps:
            return None
        weights = whole_weights(self.vae)

        def write(folder: Path, tick: Tick) -> None:
            vae = build_vae(self.config.vae_model)
            vae.load_state_dict(weights)
            vae.to(self.accelerator.device).eval().requires_grad_(False)
            normalize_on(vae, self.pictures.train, self.config.data.size, tick)
            vae.save_pretrained(folder)
            with loadable():
                found = load_vae(folder)
            check_weights("vae", vae.state_dict(), found.state_dict())

        return export(Path(self.config.run) / "vae", step, write, must=True)

    def summary(self) -> str:
        return f"{self.quality or 'VAE'}; saved in {Path(self.config.run) / 'vae'}"


class Reconstruction(nn.Module):
    """pixels => latents => pixels in one `forward`, which is what DDP wraps."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the reconstruction [B,3,H,W] and KL(q(z|x) || N(0, I)) in nats per pixel value, [B]."""
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample.float(), posterior.kl().float() / pixels[0].numel()


def pixel_loss(config: VAETrainingConfig, output: Tensor, pixels: Tensor) -> Tensor:
    """The L1, MSE and gradient terms of each picture, weighted, [B]."""
    error = output - pixels
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]

    def mean(values: Tensor) -> Tensor:
        return values.flatten(1).mean(1)

    gradient = mean(across.abs()) + mean(down.abs())
    return config.l1 * mean(error.abs()) + config.mse * mean(error.square()) + config.gradient * gradient


def load_lpips(device: torch.device) -> nn.Module:
    """LPIPS with VGG features (Zhang et al. 2018), frozen.

    Raises:
        ValueError: if the package or its weights are missing.
    """
    try:
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:  # a missing package, a torchvision that doesn't import, weights that can't be downloaded
        raise ValueError(
            f"vae_training.perceptual: LPIPS can't be loaded ({type(error).__name__}: {error}); "
            "install lpips and torchvision and let it download VGG's weights once, or set vae_training.perceptual=0"
        ) from error


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): pixels [B,3,H,W] => one logit for each overlapping patch, [B,1,h,w].

    Strided convolutions see patches of 34 pixels; group norm instead of batch norm, so that a logit
    depends on its own picture alone.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(16, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, padding=1),
            nn.GroupNorm(16, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, padding=1),
        )


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss [B] on its logits for real and reconstructed pictures (Lim & Ye 2017)."""
    return (torch.relu(1 - real) + torch.relu(1 + fake)).flatten(1).mean(1)


def generator_loss(fake: Tensor) -> Tensor:
    """What the VAE minimizes [B]: the negative of the discriminator's logits for its reconstructions."""
    return -fake.flatten(1).mean(1)
