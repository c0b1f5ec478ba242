"""The judge of the VAE's optional adversarial loss: is this patch real?"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
