"""What a run reports of its frozen encoders: how much the VAE blurs, how many captions are cut."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.batches import evenly, load_pixels, pixel_batches
from ldm.data.dataset import CaptionedPictures
from ldm.data.grid import captioned_grid
from ldm.data.rows import count
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import decode, encode, psnr, to_pictures

FEW = 64  # pictures that a first look reconstructs
UNKNOWN_MOST = 0.2  # a share of unknown tokens above this means a broken vocabulary or a foreign language


@torch.no_grad()
def reconstruction_psnr(vae: Any, pictures: CaptionedPictures, size: int, most: int) -> Tensor:
    """PSNR in dB, float32 [N], of at most so many pictures through the VAE and back: no model can do better."""
    return torch.cat(
        [
            psnr(decode(vae, encode(vae, pixels).mean), pixels).cpu()
            for pixels in pixel_batches(evenly(pictures, most), size, "reconstructing")
        ]
    )


def report_reconstruction(vae: Any, pictures: CaptionedPictures, size: int, most: int = FEW) -> tuple[float, str]:
    """Mean PSNR in dB on at most so many held-out pictures, without any on training pictures, and a sentence of it."""
    shown, kind = (pictures.heldout, "held-out") if len(pictures.heldout) else (pictures.train, "training")
    values = reconstruction_psnr(vae, shown, size, most)
    mean = float(values.mean())
    return (
        mean,
        f"VAE: {mean:.2f} dB PSNR on {count(len(values), f'{kind} picture')}, the ceiling of the model's pictures",
    )


@torch.no_grad()
def reconstructions(vae: Any, pictures: CaptionedPictures, size: int, most: int = 8) -> Image.Image:
    """Pictures over their reconstructions, to look at."""
    rows = evenly(pictures, most)
    pixels = torch.stack([load_pixels(row, size) for row in rows]).to(vae.device)
    shown = to_pictures(pixels) + to_pictures(decode(vae, encode(vae, pixels).mean))
    captions = [row.captions[0] if row.captions else "" for row in rows] + ["reconstructed"] * len(rows)
    return captioned_grid(shown, captions, columns=len(rows))


def report_captions(text: TextEncoder, pictures: CaptionedPictures) -> str:
    """How many captions are longer than the encoder takes, with the longest, and the share of unknown tokens.

    Raises:
        ValueError: if most of the captions' tokens are unknown to the tokenizer.
    """
    captions = sorted({caption for row in pictures for caption in row.captions})
    most = text.tokenizer.model_max_length
    lengths = text.lengths(captions)
    unknown = text.unknown_rate(captions)
    if unknown > UNKNOWN_MOST:
        raise ValueError(
            f"text.encoder: {unknown:.0%} of the captions' tokens are unknown to its tokenizer; "
            "choose an encoder that was trained on the captions' language"
        )
    line = f"captions: {count(len(captions), 'different one')}, the longest of {max(lengths)} tokens"
    cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > most]
    if cut:
        line += (
            f"; {len(cut)} are longer than text.max_length={most} and are cut, the first: {cut[0]!r} "
            f"(set text.max_length={max(lengths)} if the encoder takes that many)"
        )
    return line
