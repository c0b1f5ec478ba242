"""The denoising loop: every picture of every pipeline goes through `sample`.

    x_T ~ N(0, I)  =>  guidance(denoiser, x_t, t)  =>  scheduler.step  =>  ...  =>  x_0

It calls stock schedulers in stock's order of operations, so that a picture is bit for bit that of stock diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ldm.diffusion.guidance import ConditionalDenoiser, Guidance

#: (number of the step, t, x after the step) => the x to continue with; None ends sampling with the x it was given.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


def sample(
    denoiser: ConditionalDenoiser,
    x: Tensor,
    scheduler: Any,
    timesteps: Iterable[Tensor],
    *,
    guidance: Guidance,
    on_step: OnStep | None = None,
    **step: Any,
) -> Tensor:
    """Denoise latents.

    Args:
        denoiser: predicts eps, x0, v or flow, whatever the scheduler's `prediction_type` is.
        x: [B,C,h,w] noise, times the scheduler's `init_noise_sigma`.
        scheduler: a stock diffusers scheduler, or one of `ldm.inference.samplers`, whose timesteps are set.
        timesteps: the scheduler's; scalars, the noisiest first.
        guidance: makes one prediction of the denoiser's.
        on_step: called after each step.
        step: further arguments of `scheduler.step`: eta, generator.
    Returns:
        The denoised latents [B,C,h,w].
    """
    scale_input = getattr(scheduler, "scale_model_input", None)  # flow-matching schedulers have none
    for i, t in enumerate(timesteps):
        x_t = x if scale_input is None else scale_input(x, t)  # the scheduler's units => alpha_t x0 + sigma_t eps
        prediction = guidance(denoiser, x_t, t)
        x = scheduler.step(prediction, t, x, **step, return_dict=False)[0]  # x_t => x_{t-1}
        if on_step is not None:
            changed = on_step(i, t, x)
            if changed is None:
                break
            x = changed
    return x
