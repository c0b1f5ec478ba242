"""Every random number of training, as a function of (seed, n).

n numbers the samples of a run: step s of a run with batches of B is samples s*B ... s*B + B - 1. Nothing
depends on earlier random numbers or on the process. So a resumed run continues exactly where it stopped, and two
processes that share a batch see the very samples that one process would have seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """What chance decides for one sample.

    Attributes:
        row: which picture.
        caption: which of its captions, in [0, 1); None if the caption is dropped.
        crop: position (x, y) of a random crop, each in [0, 1).
        flip: whether to mirror.
        u: in [0, 1), which the timestep follows from (ldm.diffusion.timesteps).
        eps: [C,h,w] the noise of the forward process.
        posterior_noise: [C,h,w] the noise of the VAE's posterior.
    """

    row: int
    caption: float | None
    crop: tuple[float, float]
    flip: bool
    u: float
    eps: Tensor
    posterior_noise: Tensor


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on all the bits of (seed, *key)."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def permutation(seed: int, rows: int, epoch: int, *key: int) -> Tensor:
    """The order of so many pictures in one epoch, int64 [rows]; `key` is that of a bucket among others."""
    return torch.randperm(rows, generator=generator(seed, "epoch", epoch, *key))


epoch_order = lru_cache(maxsize=4)(permutation)


def row_of(seed: int, n: int, rows: int) -> int:
    """Which of so many pictures sample n shows; each epoch visits every picture once."""
    epoch, position = divmod(n, rows)
    return int(epoch_order(seed, rows, epoch)[position])


def draw(seed: int, n: int, *, row: int, latent_shape: tuple[int, int, int], caption_dropout: float) -> Draw:
    """Everything that chance decides for sample n, which shows the picture `row`."""
    rng = generator(seed, "sample", n)
    dropped, caption, x, y, flip, u = torch.rand(6, generator=rng, dtype=torch.float64).tolist()
    return Draw(
        row=row,
        caption=None if dropped < caption_dropout else caption,
        crop=(x, y),
        flip=flip < 0.5,
        u=u,
        eps=torch.randn(latent_shape, generator=rng),
        posterior_noise=torch.randn(latent_shape, generator=rng),
    )


def sample_numbers(
    first_step: int,
    steps: int,
    batch_size: int,
    accumulation: int,
    rank: int,
    processes: int,
    key: str = "loop.batch_size",
) -> list[range]:
    """The sample numbers of each batch of one process, in order.

    Step s covers samples s*B ... s*B + B - 1 whatever the number of processes; rank r takes every part of it
    that follows rank r - 1's.

    Args:
        batch_size: of all processes together; `key` is its config key.
    Raises:
        ValueError: if it can't be shared evenly.
    """
    shares = accumulation * processes
    if batch_size % shares:
        raise ValueError(
            f"{key}: {batch_size} can't be shared by {processes} processes with {accumulation} accumulated "
            f"batches each; make it a multiple of {shares}"
        )
    share = batch_size // shares
    return [
        range(start, start + share)
        for step in range(first_step, steps)
        for micro in range(accumulation)
        for start in [step * batch_size + (micro * processes + rank) * share]
    ]
