"""RUN/pipeline: the averaged weights as a pipeline, replaced only by one that is whole and is what was trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.grid import captioned_grid
from ldm.training.checkpoint import DISK_ERRORS, on_rank_0
from ldm.training.config import Config
from ldm.training.disk import put_in_place, temporary_beside
from ldm.training.samples import Batch
from ldm.training.selfcheck import PipelineMismatch, check_pipeline, quiet
from ldm.training.signals import Noted, RunError
from ldm.training.trainee import averaged_weights

if TYPE_CHECKING:
    from ldm.training.loop import Training

#: U-Net weights on the CPU => the pipeline they make.
BuildPipeline = Callable[[dict[str, Tensor]], Any]

DRAWN_AT_ONCE = 16


def export(training: Training, build_pipeline: BuildPipeline, stored: Batch, done: int) -> Any:
    """Save RUN/pipeline with the averaged weights; returns it on rank 0, None elsewhere. Every rank must call it.

    A disk that is full costs this export, not the run, unless it is the last one.

    Raises:
        RunError: if what was written is not what was trained; the pipeline before it stays.
    """
    weights = averaged_weights(training.unet, training.ema)
    expected = training.averaged_loss(stored)
    final = Path(training.config.run) / "pipeline"
    built: list[Any] = []

    @torch.no_grad()
    def loss_of(unet: nn.Module) -> float:
        return float(replace(training, unet=unet.eval()).loss(stored))

    def write() -> int:
        temporary = temporary_beside(final)
        try:
            pipeline = build_pipeline(weights)
            with quiet():
                pipeline.save_pretrained(temporary)
                check_pipeline(temporary, pipeline, expected, loss_of, training.accelerator.mixed_precision)
            put_in_place(temporary, final)
            built.append(pipeline)
        except PipelineMismatch as error:
            raise RunError(
                f"the pipeline of step {done}, left in {temporary}, is not what was trained: {error}. {final} is as "
                "it was before; the checkpoint of this step is saved"
            ) from error
        except DISK_ERRORS as error:
            told = f"the pipeline of step {done} could not be saved in {final}: {error}"
            if done == training.config.loop.steps:
                raise RunError(f"{told}; make room, then the same command tries again") from error
            print(f"\nwarning: {told}; training goes on, and the one before it stays", file=sys.stderr)
            return 0
        return 1

    on_rank_0(training.accelerator, write)
    return built[0] if built else None


def draw_prompts(pipeline: Any, config: Config, signal: Noted) -> Image.Image | None:
    """A grid of the config's prompts, always from the same noise; None if a signal came meanwhile."""

    def leave_if_asked(pipe: Any, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = bool(signal)  # the stock way out: the steps that are left are passed over
        return {}

    loop = config.loop
    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    pictures: list[Image.Image] = []
    for start in range(0, len(loop.prompts), DRAWN_AT_ONCE):
        drawn = pipeline(
            loop.prompts[start : start + DRAWN_AT_ONCE],
            num_inference_steps=loop.num_inference_steps,
            guidance_scale=loop.guidance_scale,
            seed=config.seed + len(pictures),
            callback_on_step_end=leave_if_asked,
        )
        if signal:
            return None
        pictures += drawn.images
    return captioned_grid(pictures, loop.prompts)
