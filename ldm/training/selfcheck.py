"""A pipeline replaces the one before it only if what lies on the disk is what was trained.

It is loaded again from the folder it was written to. Every weight of every network must come back bit by bit, the
scheduler with every setting, and its U-Net must give a stored batch the loss that the averaged weights give it inside
the training process: weights can be right and the config beside them wrong.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Relative difference of the two losses: attention kernels and TF32 round differently, half precision more so.
TOLERANCE = {"no": 1e-3, "bf16": 5e-2, "fp16": 5e-2}


class PipelineMismatch(RuntimeError):
    """What was written is not what was trained."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of saving and loading inside."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def check_pipeline(
    folder: Path, pipeline: Any, expected: float, loss_of: Callable[[nn.Module], float], precision: str
) -> None:
    """Compare a saved pipeline with the one in memory.

    Args:
        folder: where it was saved.
        pipeline: what was saved.
        expected: the loss of the averaged weights on the stored batch, in the training process.
        loss_of: the loss of a U-Net on it.
        precision: accelerate's mixed_precision of the run.
    Raises:
        PipelineMismatch: says what differs.
    """
    try:
        loaded = type(pipeline).from_pretrained(folder)
    except Exception as error:  # whatever loading a damaged folder raises
        raise PipelineMismatch(f"it can't be loaded again: {type(error).__name__}: {error}") from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            check_weights(name, part.state_dict(), getattr(loaded, name).state_dict())
    if settings(loaded.scheduler) != settings(pipeline.scheduler):
        raise PipelineMismatch("scheduler: other settings than in memory")
    found = loss_of(loaded.unet.to(pipeline.device))
    close = math.isclose(found, expected, rel_tol=TOLERANCE[precision])
    if not close:
        raise PipelineMismatch(f"unet: loss {found:.6g} on the stored batch, {expected:.6g} in memory")


def check_weights(name: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise a PipelineMismatch unless both have the same tensors, bit by bit."""
    if expected.keys() != found.keys():
        raise PipelineMismatch(f"{name}: weights {sorted(expected.keys() ^ found.keys())[:3]} are only on one side")
    for key, tensor in expected.items():
        if not torch.equal(tensor.cpu(), found[key].cpu()):
            raise PipelineMismatch(f"{name}: {key} differs from the weights in memory")


def settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON holds it, without what diffusers notes for itself."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(scheduler.config), default=str))
    return {name: value for name, value in kept.items() if not name.startswith("_")}
