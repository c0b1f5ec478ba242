"""Training the autoencoder: reconstruct, stay near a Gaussian, and (optionally) look and feel right.

    L = l1 |x' - x| + mse (x' - x)**2 + gradient |dx' - dx| + kl KL(q(z|x) || N(0, I))
        + perceptual LPIPS(x', x) + adversarial PatchGAN(x')              (Rombach et al. 2022, section 3.1)

The KL weight is tiny: latents need a bounded, smooth shape, not a standard normal one; their scale is
set afterwards (models/vae.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.data.cache import load_pixels
from ldm.data.captioned import CaptionedPictures
from ldm.models.discriminator import PatchDiscriminator, fooling_loss, judge_loss
from ldm.training.checkpoint import resume, save_checkpoint
from ldm.training.config import Config, DataConfig, VAETrainingConfig, to_dict
from ldm.training.draws import generator, row_of
from ldm.training.health import Watch, batch_of, mean_of_finite, telling, update
from ldm.training.learning_rate import learning_rate
from ldm.training.peers import Peers
from ldm.training.samples import numbers_of
from ldm.training.signals import Stopped, ignore_in_worker, noted
from ldm.training.tracking import Tracker
from ldm.training.trainee import Trainee


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
class VAETraining:
    """Everything that an autoencoder's run trains with."""

    config: Config
    accelerator: Accelerator
    trainees: dict[str, Trainee]
    lpips: nn.Module | None

    @classmethod
    def prepare(cls, config: Config, accelerator: Accelerator, vae: nn.Module) -> VAETraining:
        """Hand the networks over to accelerate and make their optimizers."""
        recipe = config.vae_training
        modules: dict[str, nn.Module] = {"vae": Reconstruction(vae)}
        if recipe.adversarial:
            modules["discriminator"] = PatchDiscriminator()
        trainees = {}
        for name, module in modules.items():
            fused = accelerator.device.type in ("cpu", "cuda")
            optimizer = torch.optim.AdamW(
                module.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0, fused=fused
            )
            trainees[name] = Trainee(*accelerator.prepare(module.train(), optimizer))
        lpips = load_lpips(accelerator.device) if recipe.perceptual else None
        return cls(config, accelerator, trainees, lpips)

    def step(self, step: int, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the VAE, and of its judge once there is one.

        Returns:
            The VAE's loss, detached, and 1.0 if a gradient was not finite, so that a network was left as it was.
        """
        recipe = self.config.vae_training
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

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        recipe = self.config.vae_training
        return learning_rate(recipe.lr, step, recipe.steps, recipe.warmup, "cosine")

    def update(self, trainee: Trainee, loss: Tensor, step: int) -> Tensor:
        """Back-propagate and step at this step's learning rate; returns 1.0 if that was skipped, else 0.0."""
        self.accelerator.backward(telling(loss))
        return update(self.accelerator, trainee.module, trainee.optimizer, self.learning_rate(step), 1.0)


def fit_vae(training: VAETraining, samples: PixelSamples, tracker: Tracker) -> list[float]:
    """Train from the newest checkpoint, or from the start, to the last step; returns the loss of each step trained."""
    config, accelerator, recipe = training.config, training.accelerator, training.config.vae_training
    folder = Path(config.run) / "vae_checkpoints"
    facts = {"pictures": len(samples.pictures)}
    first = resume(folder, training.trainees, accelerator, recipe.steps, to_dict(config), facts, "vae")
    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(first, recipe.steps, recipe.batch_size, 1, rank, processes)
    loader = DataLoader(
        samples, batch_sampler=numbers, num_workers=config.data.workers, worker_init_fn=ignore_in_worker
    )
    watch = Watch(
        accelerator,
        tracker,
        batch_of(config.seed, recipe.batch_size, samples.pictures),
        training.learning_rate,
        max_skipped=config.loop.max_skipped,
        spike=config.loop.spike,
    )
    history: list[float] = []
    bar = tqdm(
        zip(range(first, recipe.steps), loader, strict=True),
        initial=first,
        total=recipe.steps,
        unit="step",
        desc="VAE",
    )
    with noted() as signal, Peers(accelerator) as peers:
        for step, batch in bar:
            pixels, noise = (batch[name].to(accelerator.device) for name in ("pixels", "noise"))
            watch.hear(step, *training.step(step, pixels, noise), signal.number)
            done = step + 1
            last = done == recipe.steps or watch.signal != 0
            if done % recipe.log_every == 0 or last:
                history += log_losses(training, watch, done, bar, tracker)
            if done % recipe.checkpoint_every == 0 or last:
                save_checkpoint(
                    folder, done, to_dict(config), training.trainees, accelerator, config.loop.keep, facts, must=last
                )
            if watch.signal:
                break
        peers.close()
        accelerator.wait_for_everyone()
    if watch.signal:
        tracker.close()
        raise Stopped(watch.signal, f"step {done} of {recipe.steps} is saved in {folder}")
    return history


def log_losses(training: VAETraining, watch: Watch, done: int, bar: Any, tracker: Tracker) -> list[float]:
    """Tell the losses since the last line; returns each of them, NaN and infinities of skipped steps included."""
    losses = watch.take_losses()
    rate = (bar.format_dict["rate"] or 0.0) * training.config.vae_training.batch_size
    values = {"lr": training.learning_rate(done - 1), "images_per_second": rate}
    if watch.skipped:
        values["skipped"] = watch.skipped
    mean = mean_of_finite(losses)
    if mean is not None:
        values["loss"] = mean
    tracker.scalars(done, {f"vae/{name}": value for name, value in values.items()})
    told = "no step was finite" if mean is None else f"loss {mean:.4f}"
    bar.set_postfix_str(f"{told}, {rate:.1f} images/s")
    return losses
