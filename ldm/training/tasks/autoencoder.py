"""Training the autoencoder: reconstruct, stay near a Gaussian, and (optionally) look and feel right.

    L = l1 |x' - x| + mse (x' - x)**2 + gradient |dx' - dx| + kl KL(q(z|x) || N(0, I))
        + perceptual LPIPS(x', x) + adversarial PatchGAN(x')              (Rombach et al. 2022, section 3.1)

The KL weight is tiny: latents need a bounded, smooth shape, not a standard normal one; their scale is
set afterwards (models/vae.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.batches import load_pixels
from ldm.data.dataset import CaptionedPictures
from ldm.training.config import Config, DataConfig, VAETrainingConfig
from ldm.training.plain_loop import PlainTraining
from ldm.training.randomness import generator, row_of


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


class PixelSamples(Dataset[dict[str, Tensor]]):
    """Sample n of a VAE's run: a picture, and the noise of its posterior."""

    def __init__(
        self, pictures: CaptionedPictures, data: DataConfig, seed: int, latent_shape: tuple[int, int, int]
    ) -> None:
        self.pictures, self.data, self.seed, self.latent_shape = pictures, data, seed, latent_shape

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        row = self.pictures[row_of(self.seed, n, len(self.pictures))]
        rng = generator(self.seed, "vae sample", n)
        x, y, flip = torch.rand(3, generator=rng, dtype=torch.float64).tolist()
        pixels = load_pixels(row, self.data.size, self.data.crop, (x, y), self.data.flip and flip < 0.5)
        return {"pixels": pixels, "noise": torch.randn(self.latent_shape, generator=rng)}


def pixel_loss(config: VAETrainingConfig, output: Tensor, pixels: Tensor) -> Tensor:
    """The L1, MSE and gradient terms, weighted."""
    error = output - pixels
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    gradient = across.abs().mean() + down.abs().mean()
    return config.l1 * error.abs().mean() + config.mse * error.square().mean() + config.gradient * gradient


def load_lpips(device: torch.device) -> nn.Module:
    """LPIPS with VGG features (Zhang et al. 2018), frozen.

    Raises:
        ValueError: if the package or its weights can't be had.
    """
    try:
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except Exception as error:  # a missing package, a torchvision that doesn't import, weights that can't be downloaded
        raise ValueError(
            f"vae_training.perceptual: LPIPS can't be had ({type(error).__name__}: {error}); "
            "install lpips and torchvision and let it download VGG's weights once, or set vae_training.perceptual=0"
        ) from error


@dataclass
class VAETraining(PlainTraining):
    """An autoencoder and, with an adversarial loss, its judge."""

    name = "VAE"
    lpips: nn.Module | None = None

    @classmethod
    def prepare(cls, config: Config, accelerator: Accelerator, vae: nn.Module) -> VAETraining:
        """Hand the networks over to accelerate and make their optimizers."""
        training = cls(config, accelerator)
        training.add("vae", Reconstruction(vae))
        if config.vae_training.adversarial:
            training.add("discriminator", PatchDiscriminator())
        if config.vae_training.perceptual:
            training.lpips = load_lpips(accelerator.device)
        return training

    @property
    def recipe(self) -> VAETrainingConfig:
        return self.config.vae_training

    def step(self, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One step of the VAE, and of its judge once there is one."""
        recipe, device = self.recipe, self.accelerator.device
        pixels, noise = batch["pixels"].to(device), batch["noise"].to(device)
        vae, judge = self.trainees["vae"], self.trainees.get("discriminator")
        judging = judge is not None and step >= recipe.adversarial_start
        with self.accelerator.autocast():
            output, kl = vae.module(pixels, noise)
            loss = pixel_loss(recipe, output, pixels) + recipe.kl * kl.mean()
            if self.lpips is not None:
                loss = loss + recipe.perceptual * self.lpips(output, pixels).mean()
            if judge is not None and judging:
                judge.module.requires_grad_(False)
                loss = loss + recipe.adversarial * fooling_loss(judge.module(output))
                judge.module.requires_grad_(True)
        skipped = self.update(vae, loss, step)
        if judge is not None and judging:
            with self.accelerator.autocast():
                verdict = judge_loss(judge.module(pixels), judge.module(output.detach()))
            skipped = torch.maximum(skipped, self.update(judge, verdict, step))
        return loss.detach(), skipped


class PatchDiscriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): pixels [B,3,H,W] => one logit for each overlapping patch, [B,1,h,w].

    Strided convolutions see patches of 34 pixels; group norm instead of batch norm, so that a verdict
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


def judge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The judge's hinge loss on its logits for real and reconstructed pictures (Lim & Ye 2017)."""
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()


def fooling_loss(fake: Tensor) -> Tensor:
    """What the VAE minimizes: the negative of the judge's logits for its reconstructions."""
    return -fake.mean()
