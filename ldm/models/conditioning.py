"""Conditions of the denoiser besides x_t and t, and how a stock U-Net takes them.

The U-Net attends to text, adds a class to the time embedding, and takes a second picture's latents as further channels
beside x_t (Rombach et al. 2022, section 3.3). A model may have all of these conditions, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch, None where a model has no such.

    Attributes:
        context: [B,L,D], of the captions.
        class_labels: int64 [B]; the last class of a network is the null class. Or float [B,K+1], K numbers and a 1;
            zeros are the null condition (`ldm.data.numbers`).
        channels: [B,K,h,w], what follows the channels of x_t.
    """

    context: Tensor | None = None
    class_labels: Tensor | None = None
    channels: Tensor | None = None

    def __getitem__(self, rows: Any) -> Conditioning:
        """The conditions of these rows of the batch."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Conditioning:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Any) -> Conditioning:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return Conditioning(**{name: None if value is None else function(value) for name, value in given.items()})


def together(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Several conditionings of B samples each, one after the other: of one batch of their sum."""
    if len(conditionings) == 1:
        return conditionings[0]
    given = [[getattr(one, item.name) for one in conditionings] for item in fields(Conditioning)]
    return Conditioning(*(None if values[0] is None else torch.cat(values) for values in given))


def denoise(unet: Any, x_t: Tensor, t: Tensor, conditioning: Conditioning, **stock: Any) -> Tensor:
    """The output of a stock U-Net, [B,C,h,w], or [B,2C,h,w] with learned variance.

    Args:
        x_t: [B,C,h,w].
        t: [B] or a scalar; it may lie on another device.
        conditioning: of the B samples.
        stock: other arguments of the stock U-Net.
    """
    if conditioning.channels is not None:
        x_t = torch.cat([x_t, conditioning.channels.to(x_t)], dim=1)  # (B, C+K, h, w)
    output: Tensor = unet(
        x_t,
        t.to(x_t.device, non_blocking=x_t.is_cuda),  # without waiting for a GPU
        encoder_hidden_states=conditioning.context,
        class_labels=conditioning.class_labels,
        return_dict=False,
        **stock,
    )[0]
    return output


def scale_embedding(scales: Tensor, dim: int) -> Tensor:
    """What a distilled U-Net is given of its guidance scales [B], float32 [B,dim]: as stock pipelines embed them."""
    return get_timestep_embedding(1000 * (scales - 1), dim, downscale_freq_shift=1)


class UNetDenoiser:
    """A stock U-Net with everything in place but x_t and t: the denoiser of `ldm.inference.sampling`.

    Attributes:
        unet: the network, or what computes it.
        conditions: what each name stands for; all of B samples.
        stock: other arguments of the stock U-Net, for each call.
    """

    def __init__(self, unet: Any, conditions: Mapping[str, Conditioning], **stock: Any) -> None:
        self.unet, self.conditions, self.stock = unet, dict(conditions), stock
        self._joined: dict[tuple[str, ...], Conditioning] = {}

    def replace(self, **conditions: Conditioning) -> None:
        """From now on these names stand for other conditions."""
        self.conditions |= conditions
        self._joined.clear()

    def __call__(self, x_t: Tensor, t: Tensor, *names: str) -> tuple[Tensor, ...]:
        """x_t [B,C,h,w] at t, a scalar => a prediction [B,C,h,w] for each name, from one evaluation of the network."""
        if names not in self._joined:
            self._joined[names] = together([self.conditions[name] for name in names])
        batch = torch.cat([x_t] * len(names)) if len(names) > 1 else x_t  # (B * names, C, h, w)
        return denoise(self.unet, batch, t, self._joined[names], **self.stock).chunk(len(names))
