"""Latents => pixels, at the end of the denoising loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

#: Tensors as large as a picture at the VAE's widest full-resolution layer that are alive at once while it decodes.
DECODING_TENSORS = 5
#: Share of the free memory that decoding may take.
MEMORY_SHARE = 0.5


def decode(
    vae: Any, latents: Tensor, generator: Any = None, compute: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Decode as stock pipelines do, all pictures at once; one after the other if memory is short.

    Args:
        vae: a stock VAE.
        latents: [B,C,h,w], scaled.
        generator: what stock pipelines hand to `vae.decode`.
        compute: raw latents => pixels in place of the VAE's own `decode`.
    Returns:
        Pixels [B,3,H,W], in about [-1,1].
    """
    raw_latents = latents / vae.config.scaling_factor
    if compute is None:

        def compute(part: Tensor) -> Tensor:
            return vae.decode(part, return_dict=False, generator=generator)[0]  # type: ignore[no-any-return]

    if decoding_bytes(vae, latents) <= MEMORY_SHARE * free_bytes(latents.device):
        return compute(raw_latents)
    return torch.cat([compute(part) for part in raw_latents.split(1)])


def decoding_bytes(vae: Any, latents: Tensor) -> int:
    """Memory that decoding these latents at once takes, roughly: a few tensors of the widest full-resolution layer."""
    widths = vae.config.block_out_channels
    widest = widths[min(1, len(widths) - 1)]  # the last upsampling leaves the channels of the level below
    element = torch.finfo(vae.dtype).bits // 8
    pictures, _, height, width = latents.shape
    pixels = height * width * 4 ** (len(widths) - 1)
    return int(pictures * pixels * widest * element * DECODING_TENSORS)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; Apple's GPU shares the CPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
