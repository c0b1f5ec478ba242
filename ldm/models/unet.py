"""A short config => a stock UNet2DConditionModel, with the attention kernel that suits the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        scale_shift: let the time embedding scale and shift what group norm leaves ("adaptive group norm"), instead of
            being added (Dhariwal & Nichol 2021, section 3.1).
        residual_resampling: halve and double the resolution in residual blocks of their own, as BigGAN does (the
            same section), instead of a strided convolution and nearest-neighbor upsampling.
        pooled_text: also add the caption, pooled by attention into one vector, to the time embedding (as Imagen does,
            Saharia et al. 2022, section 2.3; `addition_embed_type="text"` in diffusers).
    """

    channels: tuple[int, ...] = (128, 192, 256)
    attention: tuple[bool, ...] = (False, True, True)
    layers: int = 2
    head_channels: int = 64
    transformer_layers: int = 1
    scale_shift: bool = False
    residual_resampling: bool = False
    pooled_text: bool = False

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
        if self.residual_resampling and self.transformer_layers > 1:
            raise ValueError(
                "unet.transformer_layers: the attention between residual up and down blocks is a single layer; set it "
                "to 1 or unet.residual_resampling=false"
            )


@dataclass(frozen=True)
class Blocks:
    """What diffusers calls the blocks of a level, down and up, with and without attention, and the block between."""

    down: str
    up: str
    attending_down: str
    attending_up: str
    mid: str


STOCK = Blocks("DownBlock2D", "UpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")
RESIDUAL = Blocks(
    "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D",
    "UNetMidBlock2DSimpleCrossAttn",
)  # fmt: skip
WITHOUT_CONTEXT = Blocks("DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "UNetMidBlock2D")


def build_unet(
    config: UNetConfig,
    *,
    latent_shape: tuple[int, int, int],
    context_dim: int | None,
    classes: int = 0,
    numbers: int = 0,
    condition_channels: int = 0,
    learned_variance: bool = False,
) -> UNet2DConditionModel:
    """A stock UNet2DConditionModel with random weights.

    Args:
        latent_shape: (C, h, w) with h = w, which is stored in the config: pipelines find their default size there.
        context_dim: width of the text encoder's output; None for a network that knows no text.
        classes: class embeddings to add to the time embedding, the null class among them; 0 for none.
        numbers: length of the vectors of numbers that are projected and added to the time embedding; 0 for none.
        condition_channels: channels that follow those of x_t in the input.
        learned_variance: answer 2C channels, the second half for the variance (Nichol & Dhariwal 2021, section 3.1).
    Raises:
        ValueError: if the latents can't be halved once per level, or there are no stock blocks for the combination.
    """
    from diffusers import UNet2DConditionModel

    latent_channels, latent_size, _ = latent_shape
    halvings = 2 ** (len(config.channels) - 1)
    if latent_size % halvings:
        raise ValueError(
            f"unet.channels: {len(config.channels)} levels need latents divisible by {halvings}, "
            f"but they are {latent_size} x {latent_size}; change data.size or the number of levels"
        )
    if context_dim is None and config.residual_resampling:
        raise ValueError(
            "unet.residual_resampling: there are no such stock blocks for a model without text; set it to false"
        )
    if context_dim is None and config.pooled_text:
        raise ValueError("unet.pooled_text: a model without text has no caption to pool; set it to false")
    blocks = WITHOUT_CONTEXT if context_dim is None else RESIDUAL if config.residual_resampling else STOCK
    heads = tuple(max(1, width // config.head_channels) for width in config.channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels + condition_channels,
        out_channels=latent_channels * (2 if learned_variance else 1),
        down_block_types=tuple(blocks.attending_down if attends else blocks.down for attends in config.attention),
        mid_block_type=blocks.mid,
        up_block_types=tuple(blocks.attending_up if attends else blocks.up for attends in config.attention[::-1]),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        transformer_layers_per_block=config.transformer_layers,
        cross_attention_dim=context_dim or 1,  # no block without context looks at it
        # the name misleads: stock text-to-image blocks take it for the number of heads, the others for their width
        attention_head_dim=heads
        if blocks is STOCK
        else tuple(width // number for width, number in zip(config.channels, heads, strict=True)),
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        num_class_embeds=classes or None,
        class_embed_type="simple_projection" if numbers else None,
        projection_class_embeddings_input_dim=numbers or None,
        addition_embed_type="text" if config.pooled_text else None,
        addition_embed_type_num_heads=pooling_heads(context_dim or 1),
    )


def pooling_heads(width: int) -> int:
    """Heads of the attention that pools a caption: about 64 channels each, as many as divide the width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def described(stock: Mapping[str, Any]) -> dict[str, Any]:
    """A stock U-Net's config => the fields of UNetConfig that say the same; left out are those of which none does."""
    widths, layers, depth = (
        stock[key] for key in ("block_out_channels", "layers_per_block", "transformer_layers_per_block")
    )
    blocks = stock["down_block_types"]
    found: dict[str, Any] = {
        "channels": tuple(widths),
        "attention": tuple("Attn" in block for block in blocks),
        "scale_shift": stock["resnet_time_scale_shift"] == "scale_shift",
        "residual_resampling": any(block in (RESIDUAL.down, RESIDUAL.attending_down) for block in blocks),
        "pooled_text": stock["addition_embed_type"] == "text",
    }
    found |= {"layers": layers} if isinstance(layers, int) else {}
    found |= {"transformer_layers": depth} if isinstance(depth, int) else {}
    given = stock["num_attention_heads"] or stock["attention_head_dim"]
    numbers = tuple(given) if isinstance(given, list | tuple) else (given,) * len(widths)
    stock_blocks = stock["mid_block_type"] == STOCK.mid
    heads = numbers if stock_blocks else tuple(width // one for width, one in zip(widths, numbers, strict=True))
    for size in sorted({width // number for width, number in zip(widths, heads, strict=True)}, reverse=True):
        if tuple(max(1, width // size) for width in widths) == heads:
            return found | {"head_channels": size}
    return found


def without_variance(weights: dict[str, Tensor], latent_channels: int) -> dict[str, Tensor]:
    """The weights of a network of learned variance, cut to its prediction, which is all that stock pipelines know."""
    last = {name: weights[name][:latent_channels] for name in ("conv_out.weight", "conv_out.bias")}
    return {**weights, **last}


def choose_attention(unet: UNet2DConditionModel, device: torch.device) -> str:
    """Set the attention kernel for a device, in place, and return its name.

    CUDA: xformers if it is installed, else PyTorch's SDPA. CPU: plain bmm + softmax, with which a training step in
    bf16 takes less time than with SDPA (docs/experiments.md, 8).
    """
    from diffusers.models import attention_processor

    if device.type == "cuda" and importlib.util.find_spec("xformers"):
        unet.enable_xformers_memory_efficient_attention()
        return "xformers"
    suffix, name = ("", "bmm + softmax") if device.type == "cpu" else ("2_0", "SDPA")
    unet.set_attn_processor(
        {
            where: getattr(attention_processor, type(kernel).__name__.removesuffix("2_0") + suffix)()
            for where, kernel in unet.attn_processors.items()
        }
    )
    return name


def student_of(teacher: UNet2DConditionModel, embedding: int) -> UNet2DConditionModel:
    """A copy of a U-Net that also takes a guidance scale, embedded in so many channels, which changes nothing yet."""
    from diffusers import UNet2DConditionModel

    given = {key: value for key, value in teacher.config.items() if not key.startswith("_")}  # "_" undoes the new one
    with torch.device("meta"):
        student: UNet2DConditionModel = UNet2DConditionModel.from_config({**given, "time_cond_proj_dim": embedding})
    first = teacher.time_embedding.linear_1.weight  # (D, channels of the embedded timestep)
    name = "time_embedding.cond_proj.weight"
    weights = {key: weight.detach().clone() for key, weight in teacher.state_dict().items()}
    student.load_state_dict({**weights, name: first.new_zeros(first.shape[1], embedding)}, assign=True)
    return student
