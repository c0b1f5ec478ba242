"""The kinds of training, each with its data, networks, loss, validation and export.

autoencoder.py  the VAE
diffusion.py    the U-Net
lora.py         adapters beside a U-Net
distillation.py a student of few steps, beside the U-Net it learns from
upscaling.py    an upscaler behind a base model: crops, small pictures
classifier.py   the classifier of noisy latents
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.training.tasks.diffusion import Diffusion


def task_of_unet(config: Any) -> type[Diffusion]:
    """What `ldm train ldm` and `distill` train of a config: a student, adapters, an upscaler, or the U-Net itself."""
    from ldm.training.tasks.diffusion import Diffusion
    from ldm.training.tasks.distillation import Distillation, LoRADistillation
    from ldm.training.tasks.lora import LoRA
    from ldm.training.tasks.upscaling import Upscaling

    if config.distill.steps:
        return LoRADistillation if config.lora.rank else Distillation
    return LoRA if config.lora.rank else Upscaling if config.upscale.factor else Diffusion
