"""A pipeline replaces the one before it only if what lies on the disk is what was trained.

It is loaded again from the folder it was written to. Every weight of every network must come back bit by bit, the
scheduler with every setting, the tokenizer with every rule, and the U-Net must give a stored batch the loss that the
averaged weights give it inside the training process: weights can be right and the config beside them wrong. What no
step changes is looked at once.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ldm.models.fingerprint import tokenizer_facts, weights_fingerprint
from ldm.models.loading import NETWORKS, load_network
from ldm.pipelines.text_to_image import LDMPipeline

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


@dataclass(frozen=True)
class Frozen:
    """All of a pipeline that no step changes, in a few hashes: what they were taken of may be let go.

    Attributes:
        pipeline: its class.
        networks: name => class and hash of the weights, the U-Net left out.
        tokenizer: all that decides which tokens a caption becomes; None without one.
        scheduler: its settings.
    """

    pipeline: Any
    networks: dict[str, tuple[type, str]]
    tokenizer: list[Any] | None
    scheduler: dict[str, Any]

    @classmethod
    def of(cls, pipeline: Any, networks: dict[str, tuple[type, str]]) -> Frozen:
        """What a pipeline in memory has, and these networks, each as `known` tells it."""
        tokenizer = None if pipeline.tokenizer is None else tokenizer_facts(pipeline.tokenizer)
        return cls(type(pipeline), networks, tokenizer, settings(pipeline.scheduler))


def known(network: nn.Module) -> tuple[type, str]:
    """What a network is known by: its class and a hash of its weights."""
    return type(network), weights_fingerprint(network)


def check_frozen(folder: Path, expected: Frozen) -> None:
    """Compare all of a saved pipeline but its U-Net with what was in memory, one network after the other.

    Raises:
        PipelineMismatch: says what differs.
    """
    with loadable():
        loaded = expected.pipeline.from_pretrained(folder, **dict.fromkeys(NETWORKS))
    if settings(loaded.scheduler) != expected.scheduler:
        raise PipelineMismatch("scheduler: other settings than in memory")
    if loaded.tokenizer is not None and tokenizer_facts(loaded.tokenizer) != expected.tokenizer:
        raise PipelineMismatch("tokenizer: other tokens than in memory")
    for name, (kind, weights) in expected.networks.items():
        with loadable():
            found = known(load_network(kind, folder / name, whole=issubclass(kind, ModelMixin)))
        if found != (kind, weights):
            raise PipelineMismatch(f"{name}: what was written differs from the weights in memory")


def check_unet(
    folder: Path, unet: nn.Module, expected: float, loss_of: Callable[[nn.Module], float], precision: str
) -> None:
    """Compare the U-Net of a saved pipeline, loaded as pipelines are, with the one in memory.

    Args:
        folder: where the pipeline was saved.
        unet: what was saved.
        expected: the loss of the averaged weights on the stored batch, in the training process.
        loss_of: the loss of a U-Net on it.
        precision: accelerate's mixed_precision of the run.
    Raises:
        PipelineMismatch: says what differs.
    """
    with loadable():
        loaded = LDMPipeline.from_pretrained(folder, vae=None, text_encoder=None)
    check_weights("unet", unet.state_dict(), loaded.unet.state_dict())
    found = loss_of(loaded.unet)
    if not math.isclose(found, expected, rel_tol=TOLERANCE[precision]):
        raise PipelineMismatch(f"unet: loss {found:.6g} on the stored batch, {expected:.6g} in memory")


@contextlib.contextmanager
def loadable() -> Iterator[None]:
    """Inside, whatever loading a damaged folder raises is a PipelineMismatch."""
    try:
        yield
    except Exception as error:
        raise PipelineMismatch(f"it can't be loaded again: {type(error).__name__}: {error}") from error


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
