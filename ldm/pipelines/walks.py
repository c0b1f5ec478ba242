"""Walks: pictures on the way from one prompt, or one seed, to another.

    prompts   context = (1 - f) * context_a + f * context_b      a straight line
    seeds     noise   = slerp(noise_a, noise_b, f)               an arc: as far from 0 as noise is

A straight line between two noises passes near 0, where no noise is. Contexts lie on no sphere; a straight line and an
arc between them gave the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ldm.pipelines.inputs import check_number, check_prompts


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """The point at this fraction of the arc from a to b [B, ...], each sample on its own (Shoemake 1985)."""
    dims = tuple(range(1, a.ndim))
    lengths = (a.square().sum(dims, keepdim=True) * b.square().sum(dims, keepdim=True)).sqrt()
    angle = ((a * b).sum(dims, keepdim=True) / lengths).clamp(-1, 1).acos()
    arc = (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() < 1e-4, torch.lerp(a, b, fraction), arc)  # no arc between parallel ones


@torch.no_grad()
def walk(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    frames: int = 16,
    *,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    on_batch: Callable[[int], Any] | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Generate pictures on the way between prompts, seeds or both.

    Args:
        pipe: an LDMPipeline.
        prompts: where it starts and ends; one prompt stays; none for a model without text.
        seeds: likewise; picture 0 is that of the first prompt and seed, as the pipeline makes it.
        frames: pictures, at least 2, both ends included.
        batch_size: pictures generated at once.
        height, width: in pixels.
        on_batch: called with the number of pictures after each batch.
        settings: further arguments of the call, the same for all pictures.
    Raises:
        ValueError: names the argument and what it allows.
    """
    check_number("frames", frames, 2, 10_000, Integral)
    for name, ends, least in (("prompts", prompts, 0), ("seeds", seeds, 1)):
        if isinstance(ends, str) or not least <= len(ends) <= 2:
            raise ValueError(f"{name}: expected one, or two to walk between, got {ends!r}")
    if len(prompts) < 2 and len(seeds) < 2:
        raise ValueError("prompts: expected two prompts or two seeds to walk between")
    for name, ends in (("prompts", prompts), ("seeds", seeds)):
        if len(ends) == 2 and ends[0] == ends[1]:
            raise ValueError(f"{name}: {ends[0]!r} is both ends, so all pictures would be one; name two, or it once")
    for seed in seeds:
        check_number("seeds", seed, 0, 2**63 - 1, Integral)
    if len(prompts) == 2 and pipe.tokenizer is None:
        raise ValueError("prompts: this model knows no text; walk between two seeds")

    device, factor = pipe._execution_device, pipe.vae_scale_factor
    edges = [pipe.edge("height", height) // factor, pipe.edge("width", width) // factor]
    shape = (1, pipe.unet.config.out_channels, *edges)
    contexts: list[Tensor] = []
    if len(prompts) == 2:
        texts = check_prompts("prompts", list(prompts), pipe.tokenizer)
        contexts = [pipe.encode_prompt(text, device, 1, False)[0] for text in texts]
    dtype = contexts[0].dtype if contexts else pipe.unet.dtype
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noises = [randn_tensor(shape, generator=generator, device=device, dtype=dtype) for generator in generators]
    state = generators[0].get_state()  # samplers' own noise comes after: the same for all pictures

    pictures: list[Image.Image] = []
    for start in range(0, frames, batch_size):
        fractions = [i / (frames - 1) for i in range(start, min(start + batch_size, frames))]
        given = dict(settings)
        if contexts:
            given["prompt_embeds"] = torch.cat([torch.lerp(contexts[0], contexts[1], f) for f in fractions])
        elif prompts:
            given["prompt"] = list(prompts) * len(fractions)
        noise = [slerp(noises[0], noises[1], f) if len(noises) == 2 else noises[0] for f in fractions]
        generator = [torch.Generator() for _ in fractions]
        for one in generator:
            one.set_state(state)
        made = pipe(latents=torch.cat(noise), generator=generator, height=height, width=width, **given)
        pictures += made.images
        if on_batch is not None:
            on_batch(len(fractions))
    return pictures
