"""Costs that are counted instead of timed: they are the same on every machine, so CI can check them.

python -m benchmarks.counters
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.settings import SETTINGS, SIZE, Setting
from ldm.data.cache.latents import context_kind, posterior_kind
from ldm.models.unet import choose_attention
from ldm.models.vae import downsampling

META = torch.device("meta")  # on real CPU tensors the counter misses attention


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`, a multiply-add being two."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return int(counter.get_total_flops())


def latent_shape(setting: Setting) -> tuple[int, int, int]:
    """[C,h,w] of a setting's latents."""
    with META:
        vae = setting.vae()
    size = SIZE // downsampling(vae)
    return vae.config.latent_channels, size, size


def unet_flops(setting: Setting) -> int:
    """Of the U-Net in one training sample, forward and backward, with the attention kernel of training on a CPU."""
    shape = latent_shape(setting)
    with META:
        unet = setting.unet(shape).train()
        choose_attention(unet, torch.device("cpu"))
        x_t, t, context = torch.empty(1, *shape), torch.zeros(1), torch.empty(1, setting.tokens, setting.width)
    return flops(lambda: unet(x_t, t, encoder_hidden_states=context).sample.sum().backward())


def encoding_flops(setting: Setting) -> dict[str, int]:
    """Of encoding one picture and one caption, which the cache saves for every sample."""
    from transformers import CLIPTextModel

    with META, torch.no_grad():
        vae = setting.vae().requires_grad_(False)
        config = setting.text_config()
        config._attn_implementation = "eager"  # batched products, which the counter supports
        text = CLIPTextModel(config).requires_grad_(False)
        pixels = torch.empty(1, 3, SIZE, SIZE)
        ids = torch.zeros(1, setting.tokens, dtype=torch.int64)
        return {"vae": flops(lambda: vae.encode(pixels)), "text": flops(lambda: text(input_ids=ids))}


def cached_bytes(setting: Setting) -> dict[str, int]:
    """On disk, of one picture's posterior and one caption's context: a record, and its entry in the index."""
    kinds = {
        "picture": posterior_kind("", latent_shape(setting), SIZE, "white"),
        "caption": context_kind("", (setting.tokens, setting.width)),
    }
    return {name: kind.disk_size for name, kind in kinds.items()}


def evaluations(pipeline: Any, steps: int, guidance_scale: float) -> int:
    """U-Net evaluations of one generated picture: rows of the batches of all its calls."""
    rows = 0

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    handle = pipeline.unet.register_forward_pre_hook(hook)
    try:
        pipeline("a cat", num_inference_steps=steps, guidance_scale=guidance_scale, seed=0, output_type="latent")
    finally:
        handle.remove()
    return rows


def counters(setting: Setting) -> dict[str, int]:
    """All counters of a setting, without the evaluations, which depend on the pipeline."""
    encoding, cached = encoding_flops(setting), cached_bytes(setting)
    return {
        "unet_flops_per_sample": unet_flops(setting),
        "vae_flops_per_picture": encoding["vae"],
        "text_flops_per_caption": encoding["text"],
        "bytes_per_cached_picture": cached["picture"],
        "bytes_per_cached_caption": cached["caption"],
    }


def main() -> None:
    """Print the counters of every setting, and the ratio of a sample's FLOPs with and without encoding."""
    found = {name: counters(setting) for name, setting in SETTINGS.items()}
    print("| counter | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for counter in next(iter(found.values())):
        print(f"| {counter} | " + " | ".join(f"{each[counter]:,}" for each in found.values()) + " |")
    shares = (sum(list(each.values())[:3]) / each["unet_flops_per_sample"] for each in found.values())
    print("| FLOPs with encoding / without | " + " | ".join(f"{share:.2f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
