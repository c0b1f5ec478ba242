"""data.size against everything that halves pictures: the VAE, the U-Net, steps at half the size, the classifier.

And the buckets of pictures that aren't square, whose sides fit the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ldm.data.buckets import Buckets, bucket_sizes
from ldm.data.dataset import CaptionedPictures
from ldm.data.images import Size
from ldm.models.safety import read_json
from ldm.models.vae import find_vae
from ldm.training.config import Config
from ldm.training.initial_model import InitialModel, find_init


def check_sizes(config: Config, task: str) -> None:
    """Check data.size against everything that halves pictures, before anything runs.

    Args:
        task: "vae", "ldm", "distill" or "classifier"; before a VAE is trained its U-Net is checked, too.
    Raises:
        ValueError: naming each key that data.size does not fit, and sizes that fit all of them.
    """
    initial = InitialModel.of(config)
    downsampling = vae_downsampling(config, task)
    if config.upscale.factor not in (0, downsampling):
        raise ValueError(
            f"upscale.factor: the VAE makes pictures {downsampling} times smaller, and stock upscalers need latents "
            f"of the small picture's size; set upscale.factor={downsampling}, or take a VAE of "
            f"{config.upscale.factor.bit_length()} levels"
        )
    size, need, problems = config.data.size, downsampling, []
    if size % need:
        key = "init" if initial else "vae_model.channels" if task == "vae" or config.vae is None else "vae"
        problems.append(f"the VAE's {downsampling.bit_length()} levels need a multiple of {need} ({key})")
    if task == "classifier":
        levels = len(config.classifier.channels)
        least = downsampling * config.classifier.patch_size * 2 ** (levels - 1)
        if size < least:
            problems.append(f"the classifier's {levels} levels need at least {least} (classifier.channels)")
            need = least
    else:
        levels = len(initial.unet["block_out_channels"] if initial else config.unet.channels)
        need *= 2 ** (levels - 1)
        if size % need:
            problems.append(
                f"the U-Net's {levels} levels need a multiple of {need} ({'init' if initial else 'unet.channels'})"
            )
        if config.loop.half_size_steps:
            need *= 2
            if size % need:
                problems.append(f"steps at half the size need a multiple of {need} (loop.half_size_steps=0 has none)")
    if problems:
        step = math.lcm(8, need)
        fitting = [str(n) for n in (size // step * step, size // step * step + step) if n]
        raise ValueError(
            f"data.size: {size} does not fit: {'; '.join(problems)}. Set data.size to {' or '.join(fitting)}, or take "
            "fewer levels"
        )
    if task in ("ldm", "distill"):
        sizes_of_buckets(config)


def sizes_of_buckets(config: Config) -> tuple[Size, ...]:
    """The sizes (width, height) of a run's buckets, the tallest first; the square alone without data.buckets.

    Raises:
        ValueError: naming data.buckets, if there is none but the square.
    """
    data, initial = config.data, InitialModel.of(config)
    if not data.buckets:
        return ((data.size, data.size),)
    levels = len(initial.unet["block_out_channels"] if initial else config.unet.channels)
    step = math.lcm(8, vae_downsampling(config, "ldm") * 2 ** (levels - 1) * (2 if config.loop.half_size_steps else 1))
    sizes = bucket_sizes(data.size, step, data.bucket_ratio)
    if len(sizes) == 1:
        raise ValueError(
            f"data.buckets: with sides of multiples of {step} none but the square has the area of data.size="
            f"{data.size} and a ratio up to data.bucket_ratio={data.bucket_ratio:g}; raise one of them, or take fewer "
            "levels"
        )
    return sizes


def buckets_of(config: Config, pictures: CaptionedPictures) -> Buckets:
    """The sizes that these pictures are brought to: that of the nearest bucket, or data.size."""
    if not config.data.buckets:
        return Buckets.square(config.data.size, len(pictures))
    return Buckets.nearest(pictures.sizes, sizes_of_buckets(config))


def vae_downsampling(config: Config, task: str) -> int:
    """Pixels along an edge for one latent of a task's VAE, from its config.json, or from the recipe of one to train."""
    trained = Path(config.run) / "vae"
    if task == "vae" or (config.vae is None and not (trained / "config.json").exists()):
        levels: Sequence[int] = config.vae_model.channels
    else:
        found_in = find_init(config.init) if config.init is not None else config.vae or trained
        facts = read_json(find_vae(found_in) / "config.json")
        found = facts.get("block_out_channels") or facts.get("decoder_block_out_channels")
        levels = found if isinstance(found, list) else (1,)  # loading it says what is wrong
    return 2 ** (len(levels) - 1)
