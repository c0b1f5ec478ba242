"""RUN/pipeline: the averaged weights as a pipeline, replaced only by one that is whole and is what was trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.training.checkpoint import DISK_ERRORS, on_rank_0
from ldm.training.disk import put_in_place, temporary_beside
from ldm.training.samples import Batch
from ldm.training.selfcheck import PipelineMismatch, check_pipeline, quiet
from ldm.training.signals import RunError
from ldm.training.trainee import averaged_weights

if TYPE_CHECKING:
    from ldm.training.loop import Training

#: U-Net weights on the CPU => the pipeline they make.
BuildPipeline = Callable[[dict[str, Tensor]], Any]


def export(training: Training, build_pipeline: BuildPipeline, stored: Batch, done: int) -> Any:
    """Save RUN/pipeline with the averaged weights; returns it on rank 0, None elsewhere. Every rank must call it.

    A disk that is full costs this export, not the run, unless it is the last one.

    Raises:
        RunError: if what was written is not what was trained; the pipeline before it stays.
    """
    weights = averaged_weights(training.unet, training.ema)
    expected = training.averaged_error(stored)
    final = Path(training.config.run) / "pipeline"
    built: list[Any] = []

    @torch.no_grad()
    def loss_of(unet: nn.Module) -> float:
        return float(replace(training, unet=unet.eval()).error(stored))

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
