"""A short config => a stock UNet2DConditionModel, with the attention kernel that suits the device."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser's shape.

    Attributes:
        channels: width of each level, finest first; each level but the last halves the resolution.
        attention: for each level, whether it attends to itself and to the context.
        layers: residual blocks per level.
        head_channels: channels of one attention head; a level has channels // head_channels heads.
        transformer_layers: transformer blocks behind each residual block of an attending level.
    """

    channels: tuple[int, ...] = (128, 192, 256)
    attention: tuple[bool, ...] = (False, True, True)
    layers: int = 2
    head_channels: int = 64
    transformer_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "head_channels", "transformer_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"unet.{name}: expected at least 1, got {getattr(self, name)}")
        if not self.channels:
            raise ValueError("unet.channels: expected at least one level, got none")
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"unet.attention: expected one entry per level of unet.channels ({len(self.channels)}), "
                f"got {len(self.attention)}"
            )
        if any(width < 32 or width % 32 for width in self.channels):
            raise ValueError(f"unet.channels: every width must be a positive multiple of 32, got {list(self.channels)}")


def build_unet(config: UNetConfig, *, latent_shape: tuple[int, int, int], context_dim: int) -> UNet2DConditionModel:
    """A stock UNet2DConditionModel with random weights.

    Args:
        latent_shape: (C, h, w) with h = w, which is stored in the config: pipelines find their default size there.
        context_dim: width of the text encoder's output.
    Raises:
        ValueError: if the latents can't be halved once per level.
    """
    from diffusers import UNet2DConditionModel

    latent_channels, latent_size, _ = latent_shape
    halvings = 2 ** (len(config.channels) - 1)
    if latent_size % halvings:
        raise ValueError(
            f"unet.channels: {len(config.channels)} levels need latents divisible by {halvings}, "
            f"but they are {latent_size} x {latent_size}; change data.size or the number of levels"
        )
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in config.attention[::-1]),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        transformer_layers_per_block=config.transformer_layers,
        cross_attention_dim=context_dim,
        # diffusers' name misleads: this is the number of heads, per level
        attention_head_dim=tuple(max(1, width // config.head_channels) for width in config.channels),
    )


def choose_attention(unet: UNet2DConditionModel, device: torch.device) -> str:
    """Set the attention kernel for a device, in place, and return its name.

    CUDA: xformers if it is installed, else PyTorch's SDPA. CPU: plain bmm + softmax, with which a training step in
    bf16 takes less time than with SDPA (docs/experiments.md, 8).
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if device.type == "cuda" and importlib.util.find_spec("xformers"):
        unet.enable_xformers_memory_efficient_attention()
        return "xformers"
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
        return "bmm + softmax"
    unet.set_attn_processor(AttnProcessor2_0())
    return "SDPA"
