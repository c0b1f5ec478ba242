"""pixels => latents => pixels, and the only place where latents are scaled.

Diffusion assumes data of about unit variance; a VAE's raw latents have whatever variance its training
left them. So the mean and std of every latent channel are measured over the data set once and folded
into the VAE's own weights: into `quant_conv`, the last layer of the encoder, and `post_quant_conv`,
the first of the decoder. After that the VAE has latents of unit variance, `scaling_factor` is 1, and
stock diffusers (whose pipelines know a scalar `scaling_factor` and nothing else) needs no code of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ldm.models.loading import find_model, load_network, loading
from ldm.models.safety import check_model_folder, read_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


NARROW = -6.0  # the log variance that training starts from: a std of 0.05
# Pixels that a VAE is given at once: 8 pictures of 64 px, or one larger one. On a CPU more are no faster, and one of
# Stable Diffusion's size takes 130 MB for every 8 (docs/experiments.md, 31); a GPU wants more to be busy.
PIXELS_AT_ONCE = 2**15
PIXELS_AT_ONCE_ON_A_GPU = 2**19
TILE = 512  # pixels along an edge that `enable_tiling` decodes at once; stock's default of 32 would cut small pictures


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder that train_vae.py trains.

    Attributes:
        channels: width of each level; every level but the last halves the resolution, so three levels
            make latents a quarter of the pictures' size (f4).
        layers: residual blocks per level.
        latent_channels: channels of the latents.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    layers: int = 1
    latent_channels: int = 4

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"vae_model.channels: expected at least one positive width, got {list(self.channels)}")
        for name in ("layers", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"vae_model.{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Posterior:
    """q(latents | pixels), a diagonal Gaussian over scaled latents: mean and std [B,C,h,w]; std may be 0."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise [B,C,h,w]."""
        return self.mean + self.std * noise


def build_vae(config: VAEConfig) -> AutoencoderKL:
    """A stock AutoencoderKL with random weights, whose posterior starts narrow.

    Stock initialization has log variances near 0, noise of std 1 on means of std 0.1, and a short run learns little
    but to shout over it (docs/experiments.md, 4).
    """
    from diffusers import AutoencoderKL

    # as many groups as all widths divide into, of at least two channels
    most = max(1, min(32, config.channels[0] // 2))
    groups = max(g for g in range(1, most + 1) if not any(width % g for width in config.channels))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(config.channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.channels),
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=groups,
        scaling_factor=1.0,
        sample_size=TILE,
    )
    torch.nn.init.constant_(vae.quant_conv.bias[config.latent_channels :], NARROW)
    return vae


def load_vae(name: str | Path, *, weights: bool = True) -> Any:
    """A pretrained AutoencoderKL or AutoencoderTiny, frozen.

    Args:
        name: a folder (a VAE's own, or a pipeline's that has one in `vae/`) or a Hub id.
        weights: whether to load them; without, they are on the meta device.
    Raises:
        ValueError: if it holds another class of model, weights of another, or more than data (`ldm.models.safety`).
        OSError: if there is no such folder or id.
    """
    import diffusers

    folder = find_vae(name)
    check_model_folder(folder)
    class_name = read_json(folder / "config.json").get("_class_name")
    if class_name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(f"vae: {name} is a {class_name}; expected AutoencoderKL or AutoencoderTiny")
    kind = getattr(diffusers, class_name)
    if weights:
        return load_network(kind, folder).eval().requires_grad_(False)
    with loading(folder), torch.device("meta"):
        return kind.from_config(read_json(folder / "config.json")).eval().requires_grad_(False)


def find_vae(name: str | Path) -> Path:
    """The folder of a VAE: `name` is a folder (a VAE's own, or a pipeline's) or a Hub id.

    Raises:
        OSError: if there is no such folder or id, or it holds no VAE.
    """
    folder = find_model(name)
    if (folder / "vae" / "config.json").exists():
        folder = folder / "vae"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"vae: {name} has no config.json; expected a VAE's folder, or a pipeline's")
    return folder


def downsampling(vae: Any) -> int:
    """How many pixels, along an edge, one latent stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_shape(vae: Any, size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of squares of so many pixels along an edge."""
    edge = size // downsampling(vae)
    return (int(vae.config.latent_channels), edge, edge)


def encode(vae: Any, pixels: Tensor, device: torch.device | None = None) -> Posterior:
    """pixels [B,3,H,W] in [-1,1] => the posterior over scaled latents [B,C,H/f,W/f], a few pictures at a time.

    Args:
        device: where the VAE computes, if it is moved there only to compute (offloading); by default where it is.
    """
    device = vae.device if device is None else device
    height, width = pixels.shape[-2:]
    means, stds = [], []
    for part in pixels.split(at_once(vae, height, width)):
        encoded = vae.encode(part.to(device, vae.dtype))
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:  # AutoencoderTiny has no posterior
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        means.append(mean.float())
        stds.append(std.float())
    scale = vae.config.scaling_factor
    return Posterior(torch.cat(means) * scale, torch.cat(stds) * scale)


def sample_posterior(
    vae: Any, pixels: Tensor, generators: Sequence[torch.Generator | None], device: torch.device | None = None
) -> Tensor:
    """pixels [N,3,H,W] in [-1,1] => scaled latents [B,C,H/f,W/f], one sample for each of B generators, stock's bits.

    Pictures are encoded one by one, as StableDiffusionImg2ImgPipeline encodes them for a list of generators. Each of
    the N has B / N generators in a row; None samples from torch's own.
    """
    encoded = [vae.encode(one.to(device or vae.device, vae.dtype)) for one in pixels.split(1)]
    copies = len(generators) // len(encoded)
    raw_latents = [
        encoded[i // copies].latent_dist.sample(generator) if has_posterior(vae) else encoded[i // copies].latents
        for i, generator in enumerate(generators)
    ]
    scaled: Tensor = vae.config.scaling_factor * torch.cat(raw_latents)
    return scaled


def has_posterior(vae: Any) -> bool:
    """Whether it encodes to a distribution: AutoencoderTiny encodes to latents."""
    return hasattr(vae, "quant_conv")


def decode(vae: Any, latents: Tensor) -> Tensor:
    """scaled latents [B,C,h,w] => pixels [B,3,H,W], in [-1,1], a few pictures at a time."""
    height, width = (edge * downsampling(vae) for edge in latents.shape[-2:])
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    parts = [vae.decode(part).sample.float() for part in latents.split(at_once(vae, height, width))]
    return torch.cat(parts).clamp(-1, 1)


def at_once(vae: Any, height: int, width: int) -> int:
    """Pictures of so many pixels that it is given at a time, where it stands."""
    most = PIXELS_AT_ONCE if vae.device.type == "cpu" else PIXELS_AT_ONCE_ON_A_GPU
    return max(1, most // (height * width))


@torch.no_grad()
def measure(posteriors: Iterable[Posterior]) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel, float64 [C] on the CPU, of latents drawn from these posteriors.

    The variance of a draw is the variance of the means plus the mean of the variances.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for posterior in posteriors:
        mean, std = posterior.mean.cpu().double(), posterior.std.cpu().double()  # Apple's GPU has no float64
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum((0, 2, 3))
        square = square + (mean**2 + std**2).sum((0, 2, 3))
    if not count:
        raise ValueError("measure: no latents to measure")
    mean = total / count
    return mean, (square / count - mean**2).clamp(min=0).sqrt()


@torch.no_grad()
def normalize(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Change the VAE in place so that latents of the given mean and std [C] come out with mean 0 and std 1.

    An AutoencoderKL with quant convolutions is normalized channel by channel. One without, and
    AutoencoderTiny, have only the scalar `scaling_factor`: their overall std becomes 1, their mean stays.
    """
    if not bool((std > 0).all()):
        raise ValueError(f"normalize: a latent channel is constant (std {std.tolist()}); the VAE has collapsed")
    if getattr(vae, "quant_conv", None) is None:
        vae.register_to_config(scaling_factor=float(vae.config.scaling_factor / std.square().mean().sqrt()))
        return
    old = vae.config.scaling_factor
    mean, std = mean.cpu() / old, std.cpu() / old  # of the raw latents
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    # encoder: (mean_raw, log variance_raw) => ((mean_raw - m) / s, log variance_raw - 2 log s)
    weight, bias = quant.weight.cpu().double(), quant.bias.cpu().double()
    weight[:channels] /= std.reshape(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    quant.weight.copy_(weight)
    quant.bias.copy_(bias)
    # decoder: z => W (z s + m) + b
    weight, bias = post.weight.cpu().double(), post.bias.cpu().double()
    post.bias.copy_(bias + weight[:, :, 0, 0] @ mean)
    post.weight.copy_(weight * std.reshape(1, -1, 1, 1))
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def fold_scale(vae: Any, scale: float) -> None:
    """Change the VAE in place so that its `scaling_factor` is this one, and its scaled latents stay what they were.

    Raises:
        ValueError: if it has no quant convolutions to fold anything into.
    """
    if getattr(vae, "quant_conv", None) is None or getattr(vae, "post_quant_conv", None) is None:
        raise ValueError(
            f"vae: expected an AutoencoderKL with quant convolutions, into which a scale can be folded, got "
            f"{type(vae).__name__}"
        )
    std = torch.full((vae.config.latent_channels,), scale, dtype=torch.float64)
    normalize(vae, torch.zeros_like(std), std)  # => scaling_factor 1, and what was 1 is 1 / scale
    vae.register_to_config(scaling_factor=scale)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """pixels [B,3,H,W] in [-1,1] => 8-bit pictures."""
    arrays = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, float32 [B], on the device of the reconstruction.

    Both arguments are [B,3,H,W] in [-1,1].
    """
    mse = ((reconstruction - pixels.to(reconstruction.device)) / 2).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1e-10).log10()
