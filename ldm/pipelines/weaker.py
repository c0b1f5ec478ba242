"""The weaker model of autoguidance: another pipeline's U-Net, after a check that both have the same latents.

Autoguidance (Karras et al. 2024) takes the difference of two predictions of one x_t under one condition. That means
something only if both models have the same latents, contexts, classes, process and kind of prediction: models of the
same data, of which one was trained for fewer steps or has fewer channels.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from ldm.diffusion.schedule import prediction_from_config, schedule_from_config
from ldm.models.fingerprint import tokenizer_facts, weights_fingerprint

#: What both U-Nets must take, by the stock config's names.
INPUTS = (
    "in_channels", "out_channels", "cross_attention_dim", "encoder_hid_dim", "num_class_embeds", "class_embed_type",
    "projection_class_embeddings_input_dim", "addition_embed_type", "time_cond_proj_dim",
)  # fmt: skip


def load_weaker(pipe: Any, name: str | PathLike[str]) -> Any:
    """The U-Net of a weaker model, in the pipeline's dtype.

    Args:
        pipe: the pipeline that is to move away from it.
        name: a pipeline folder, or a Hub id.
    Raises:
        ValueError: naming what differs from the pipeline, or the file that can't be used.
        FileNotFoundError: if there is no such pipeline.
    """
    other = type(pipe).from_pretrained(name, dtype=pipe.unet.dtype)
    differing = difference(pipe, other)
    if differing:
        raise ValueError(
            f"weaker: {name} has another {differing} than the model; name one that was trained with the same"
        )
    return other.unet


def difference(pipe: Any, other: Any) -> str | None:
    """The first thing in which two pipelines differ so that their predictions can't be compared."""
    for name in INPUTS:
        if getattr(pipe.unet.config, name) != getattr(other.unet.config, name):
            return f"U-Net input ({name} {getattr(other.unet.config, name)}, not {getattr(pipe.unet.config, name)})"
    one, two = pipe.scheduler.config, other.scheduler.config
    if prediction_from_config(one) != prediction_from_config(two):
        return f"kind of prediction ({prediction_from_config(two)}, not {prediction_from_config(one)})"
    betas = schedule_from_config(one).betas, schedule_from_config(two).betas
    if betas[0].shape != betas[1].shape or not torch.equal(*betas):
        return "noise schedule"
    if weights_fingerprint(pipe.vae) != weights_fingerprint(other.vae):
        return "VAE"
    if (pipe.text_encoder is None) != (other.text_encoder is None):
        return "text encoder"
    if pipe.text_encoder is not None:
        if weights_fingerprint(pipe.text_encoder) != weights_fingerprint(other.text_encoder):
            return "text encoder"
        if tokenizer_facts(pipe.tokenizer) != tokenizer_facts(other.tokenizer):
            return "tokenizer"
    if pipe.labels != other.labels:
        return "set of classes"
    if pipe.numbers != other.numbers:
        return "scale of numbers"
    return None


def check_weaker(
    weaker: Any, weak_unet: Any, autoguidance_scale: Any, guidance_scale: Any, negative_prompt: Any
) -> None:
    """Raise a ValueError for arguments of autoguidance that contradict each other, naming one."""
    if weaker is not None and weak_unet is not None:
        raise ValueError("weaker: give weaker, a model's folder, or weak_unet, its U-Net, not both")
    if autoguidance_scale is not None and weaker is None and weak_unet is None:
        raise ValueError("autoguidance_scale: there is no weaker model to move away from; name it with weaker")
    if autoguidance_scale is not None and guidance_scale is not None:
        raise ValueError("guidance_scale: autoguidance_scale takes its place; leave one of them out")
    if weaker is not None and guidance_scale is not None:
        raise ValueError("guidance_scale: with a weaker model it is autoguidance_scale that counts")
    if weaker is not None and negative_prompt is not None:
        raise ValueError("negative_prompt: guidance moves away from the weaker model instead; leave one of them out")
