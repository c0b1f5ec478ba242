"""What the denoiser is told besides x_t and t, and how a stock U-Net takes it.

Text is attended to, a class is added to the time embedding, a picture's latents are concatenated to x_t as further
channels (Rombach et al. 2022, section 3.3). A model may be told all of it, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch, None where a model has no such.

    Attributes:
        context: [B,L,D], of the captions.
        class_labels: int64 [B]; the last class of a network is the null class.
        channels: [B,K,h,w], what follows the channels of x_t.
    """

    context: Tensor | None = None
    class_labels: Tensor | None = None
    channels: Tensor | None = None

    def __getitem__(self, rows: Any) -> Conditioning:
        """Those of these rows of the batch."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Conditioning:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> Conditioning:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return Conditioning(**{name: None if value is None else function(value) for name, value in given.items()})


def denoise(unet: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The answer of a stock U-Net [B,C or 2C,h,w] to x_t [B,C,h,w] at t [B], which may lie on another device."""
    if conditioning.channels is not None:
        x_t = torch.cat([x_t, conditioning.channels.to(x_t)], dim=1)  # (B, C+K, h, w)
    answer: Tensor = unet(
        x_t,
        t.to(x_t.device, non_blocking=x_t.is_cuda),  # a GPU isn't waited for
        encoder_hidden_states=conditioning.context,
        class_labels=conditioning.class_labels,
    ).sample
    return answer


def tell(unet: Any, conditioning: Conditioning) -> Callable[[Tensor, Tensor, dict[str, Any]], Tensor]:
    """What `steering.steered` does before a call of the U-Net by those who know of no classes and channels.

    A batch of twice the size is that of classifier-free guidance: its first half is told the null class.
    """
    labels, channels = conditioning.class_labels, conditioning.channels

    def change(x_t: Tensor, _: Tensor, keywords: dict[str, Any]) -> Tensor:
        if labels is not None:
            null = torch.full_like(labels, unet.config.num_class_embeds - 1)
            keywords["class_labels"] = torch.cat([null, labels]) if len(x_t) == 2 * len(labels) else labels
        if channels is not None:
            halves = len(x_t) // len(channels)
            x_t = torch.cat([x_t, channels.to(x_t).repeat(halves, 1, 1, 1)], dim=1)  # (B, C+K, h, w)
        return x_t

    return change
