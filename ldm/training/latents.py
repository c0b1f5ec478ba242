"""From a VAE to latents that diffusion can learn: measure, normalize, check, and say how good they can get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.batches import evenly, load_pixels, pixel_batches
from ldm.data.dataset import CaptionedPictures
from ldm.data.grid import captioned_grid
from ldm.data.rows import count
from ldm.models.fingerprint import fingerprint
from ldm.models.vae import Posterior, decode, encode, load_vae, measure, normalize, psnr, to_pictures
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import while_others_wait
from ldm.training.encoders import for_encoding
from ldm.training.scales import Scale

MEASURED = 1024  # pictures; the mean of a channel is then known to a thirtieth of its std, or better
CHECKED = 128  # pictures, at every start; on OpenMoji the std is then known to 1.4 %
GLANCE = 64  # pictures, at every start, which go through the VAE and back
RECONSTRUCTED = 256  # pictures, once a VAE is trained
SCALE_FILE = "vae_scale.json"  # in RUN
STD_RANGE = (0.9, 1.1)


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


def measure_pretrained(
    config: Config, pictures: CaptionedPictures, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Measure the latents of `vae` on these pictures, once in a run. Every rank must call it; rank 0 measures.

    Args:
        dtype: that it encodes in.
    """

    def measured(tick: Callable[[], None]) -> None:
        vae = load_vae(config.vae or "")
        scale = latent_scale(config, vae)
        for_encoding(vae.to(device), dtype)
        scale.keep(lambda: measure_latents(vae, pictures, config.data.size, MEASURED, tick))

    if config.vae is not None:
        while_others_wait(measured)
        give_back()


def latent_scale(config: Config, vae: Any) -> Scale:
    """Where the scale of a pretrained VAE's latents is kept, and what it depends on; the VAE as it was loaded."""
    data = config.data
    facts = {"vae": fingerprint(vae), "source": data.source, "size": data.size, "background": data.background}
    return Scale(Path(config.run) / SCALE_FILE, facts)


def measure_latents(
    vae: Any, pictures: CaptionedPictures, size: int, most: int, tick: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel [C], over at most so many of these pictures."""

    def posteriors() -> Iterator[Posterior]:
        for pixels in pixel_batches(evenly(pictures, most), size, "measuring latents"):
            yield encode(vae, pixels)
            tick()

    return measure(posteriors())


def normalize_on(vae: Any, pictures: CaptionedPictures, size: int) -> None:
    """Measure the latents of these pictures and fold their mean and std into the VAE, in place."""
    normalize(vae, *measure_latents(vae, pictures, size, MEASURED))


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


@torch.no_grad()
def reconstruction_psnr(vae: Any, pictures: CaptionedPictures, size: int, most: int) -> Tensor:
    """PSNR in dB, float32 [N], of at most so many pictures through the VAE and back: no model can draw better."""
    return torch.cat(
        [
            psnr(decode(vae, encode(vae, pixels).mean), pixels).cpu()
            for pixels in pixel_batches(evenly(pictures, most), size, "reconstructing")
        ]
    )


def report_reconstruction(vae: Any, pictures: CaptionedPictures, size: int, most: int = GLANCE) -> tuple[float, str]:
    """Mean PSNR in dB on at most so many held-out pictures, without any on training pictures, and a sentence of it."""
    shown, kind = (pictures.heldout, "held-out") if len(pictures.heldout) else (pictures.train, "training")
    values = reconstruction_psnr(vae, shown, size, most)
    mean = float(values.mean())
    return (
        mean,
        f"VAE: {mean:.2f} dB PSNR on {count(len(values), f'{kind} picture')}, the ceiling of what the model can draw",
    )


@torch.no_grad()
def reconstructions(vae: Any, pictures: CaptionedPictures, size: int, most: int = 8) -> Image.Image:
    """Pictures over their reconstructions, to look at."""
    rows = evenly(pictures, most)
    pixels = torch.stack([load_pixels(row, size) for row in rows]).to(vae.device)
    drawn = to_pictures(pixels) + to_pictures(decode(vae, encode(vae, pixels).mean))
    captions = [row.captions[0] if row.captions else "" for row in rows] + ["reconstructed"] * len(rows)
    return captioned_grid(drawn, captions, columns=len(rows))
