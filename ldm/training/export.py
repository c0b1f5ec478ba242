"""Folders of a model, replaced only by one that is whole and is what was trained.

What was written is loaded again from the disk before it replaces the folder before it. Every weight must come back bit
by bit, the scheduler with every setting, the tokenizer with every rule, and a U-Net must give a stored batch the loss
that the averaged weights give it inside the training process: weights can be right and the config beside them wrong.

All of a pipeline but its U-Net exists before the first step, and no step changes it. It is saved and checked once, in
RUN/frozen, and pipelines share its files, by hard links where the file system has them. So an export takes the time and
the memory of a U-Net, however large the text encoder is.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ldm.models.fingerprint import tokenizer_facts, weights_fingerprint
from ldm.models.loading import NETWORKS, load_network
from ldm.models.lora import NAME, adapter_weights
from ldm.models.lora_files import OtherBaseWarning
from ldm.models.text_encoder import TextEncoder
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.errors import RunError
from ldm.system.files import link_or_copy, put_in_place, temporary_beside
from ldm.system.memory import give_back
from ldm.training.checkpoint import DISK_ERRORS
from ldm.training.distributed import Tick, on_rank_0

#: Relative difference of the two losses: attention kernels and TF32 round differently, half precision more so.
TOLERANCE = {"no": 1e-3, "bf16": 5e-2, "fp16": 5e-2}


class ExportMismatch(RuntimeError):
    """What was written is not what was trained."""


def export(final: Path, step: int, write: Callable[[Path, Tick], None], *, must: bool) -> Path | None:
    """Replace `final` by what `write` fills a folder with; returns it on rank 0, None elsewhere.

    Every rank must call it.
    A disk that is full costs this export, not the run, unless nothing comes after it.

    Args:
        step: that it holds the weights of.
        write: fills an empty folder and checks it, on rank 0.
        must: whether a full disk is an error.
    Raises:
        RunError: if what was written is not what was trained; the folder before it stays.
    """

    def replace(tick: Tick) -> int:
        try:
            temporary = temporary_beside(final)
            with quiet():
                write(temporary, tick)
            put_in_place(temporary, final)
        except ExportMismatch as error:
            raise RunError(
                f"the {final.name} of step {step}, left in {temporary}, is not what was trained: {error}. {final} is "
                "as it was before; the checkpoint of this step is saved"
            ) from error
        except DISK_ERRORS as error:
            failed = f"the {final.name} of step {step} could not be saved in {final}: {error}"
            if must:
                raise RunError(f"{failed}; make room and run the same command again") from error
            print(f"\nwarning: {failed}; training continues, and the one before it stays", file=sys.stderr)
            return 0
        return 1

    written = on_rank_0(replace)
    return final if written else None


def write_pipeline(folder: Path, frozen: Path, unet: Any, expected: float, loss_of: Callable[[Any], float],
                   precision: str, kind: Any = LDMPipeline) -> None:  # fmt: skip
    """Fill a folder with RUN/frozen, which `save_frozen` left, and a U-Net; check it as `check_unet` does."""
    shutil.copytree(frozen, folder, copy_function=link_or_copy, dirs_exist_ok=True)
    unet.save_pretrained(folder / "unet")
    check_unet(folder, unet, expected, loss_of, precision, kind)


def check_unet(folder: Path, unet: nn.Module, expected: float, loss_of: Callable[[Any], float], precision: str,
               kind: Any = LDMPipeline) -> None:  # fmt: skip
    """Compare the U-Net of a saved pipeline, loaded as pipelines are, with the one in memory.

    Args:
        expected: the loss of the averaged weights on a stored batch, in the training process.
        loss_of: the loss of a U-Net on that batch.
        precision: accelerate's mixed_precision of the run.
        kind: the class of the pipeline.
    Raises:
        ExportMismatch: with what differs.
    """
    with loadable():
        loaded = kind.from_pretrained(folder, vae=None, text_encoder=None)
    check_weights("unet", unet.state_dict(), loaded.unet.state_dict())
    found = loss_of(loaded.unet)
    if not math.isclose(found, expected, rel_tol=TOLERANCE[precision]):
        raise ExportMismatch(f"unet: loss {found:.6g} on the stored batch, {expected:.6g} in memory")


def check_adapters(
    folder: Path, base: LDMPipeline, expected: Mapping[str, Mapping[str, Any]], loss: float,
    loss_of: Callable[[LDMPipeline], float], precision: str,
) -> None:  # fmt: skip
    """Load a saved LoRA into the model that it belongs to, and compare it with the adapters in memory.

    Args:
        base: that model, which has the adapters afterwards.
        expected: the averaged adapters by network.
        loss: theirs on a stored batch, in the training process.
        loss_of: the loss of a pipeline on that batch.
        precision: accelerate's mixed_precision of the run.
    Raises:
        ExportMismatch: with what differs.
    """
    with loadable(), warnings.catch_warnings():
        warnings.simplefilter("error", OtherBaseWarning)
        base.load_lora_weights(folder, adapter_name=NAME)
    for name, weights in expected.items():
        check_weights(name, weights, adapter_weights(getattr(base, name)))
    found = loss_of(base)
    if not math.isclose(found, loss, rel_tol=TOLERANCE[precision]):
        raise ExportMismatch(f"lora: loss {found:.6g} on the stored batch, {loss:.6g} in memory")


def save_frozen(
    final: Path,
    load_vae: Callable[[], Any],
    load_text: Callable[[], TextEncoder] | None,
    build_pipeline: Callable[[Any, TextEncoder | None], Any],
) -> None:
    """Save all of a pipeline but its U-Net, one network after the other: each is in memory alone.

    Every rank must call it.

    Args:
        load_vae, load_text: in float32, as pipelines have them.
        build_pipeline: makes a pipeline of a VAE and a text encoder without weights.
    Raises:
        RunError: if there is no room for it, or what was written is not what is in memory.
    """

    def save(_: Tick) -> None:
        vae = load_vae()
        with writing(final):
            temporary = temporary_beside(final)
            networks = {"vae": save_network(vae, temporary / "vae")}
        text = load_text() if load_text else None
        with writing(final):
            if text is not None:
                networks["text_encoder"] = save_network(text.model, temporary / "text_encoder")
            pipeline = build_pipeline(vae, text)
            pipeline.save_without_networks(temporary)
            check_frozen(temporary, Frozen.of(pipeline, networks))
            put_in_place(temporary, final)

    on_rank_0(save)


@contextlib.contextmanager
def writing(final: Path) -> Iterator[None]:
    """Inside, what goes wrong is a RunError that names the folder; loading an encoder belongs outside."""
    try:
        with quiet():
            yield
    except ExportMismatch as error:
        raise RunError(f"what was written for {final} is not what is in memory: {error}") from error
    except DISK_ERRORS as error:
        raise RunError(f"{final} could not be saved: {error}; make room and run the same command again") from error


def save_network(network: Any, folder: Path) -> tuple[type, str]:
    """Save a network and free its weights; returns its class and the hash of its weights."""
    network.save_pretrained(folder, safe_serialization=True)
    facts = type(network), weights_fingerprint(network)
    network.to("meta")  # what a pipeline's index holds of it is still there
    give_back()
    return facts


# --- what was written is what was trained ---------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """All of a pipeline that no step changes, in a few hashes: what they were taken of can be freed.

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
        """What a pipeline in memory has, and these networks."""
        tokenizer = None if pipeline.tokenizer is None else tokenizer_facts(pipeline.tokenizer)
        return cls(type(pipeline), networks, tokenizer, settings(pipeline.scheduler))


def check_frozen(folder: Path, expected: Frozen) -> None:
    """Compare all of a saved pipeline but its U-Net with what was in memory, one network after the other.

    Raises:
        ExportMismatch: with what differs.
    """
    with loadable():
        parts = inspect.signature(expected.pipeline.__init__).parameters
        loaded = expected.pipeline.from_pretrained(folder, **{name: None for name in NETWORKS if name in parts})
    if settings(loaded.scheduler) != expected.scheduler:
        raise ExportMismatch("scheduler: other settings than in memory")
    if loaded.tokenizer is not None and tokenizer_facts(loaded.tokenizer) != expected.tokenizer:
        raise ExportMismatch("tokenizer: other tokens than in memory")
    for name, (kind, weights) in expected.networks.items():
        with loadable():
            found = load_network(kind, folder / name, whole=issubclass(kind, ModelMixin))
        if (type(found), weights_fingerprint(found)) != (kind, weights):
            raise ExportMismatch(f"{name}: what was written differs from the weights in memory")


def check_weights(name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise an ExportMismatch unless both have the same tensors, bit by bit."""
    if expected.keys() != found.keys():
        raise ExportMismatch(f"{name}: weights {sorted(expected.keys() ^ found.keys())[:3]} are only on one side")
    for key, tensor in expected.items():
        if not torch.equal(tensor.cpu(), found[key].cpu()):
            raise ExportMismatch(f"{name}: {key} differs from the weights in memory")


def settings(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON holds it, without what diffusers notes for itself."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(scheduler.config), default=str))
    return {name: value for name, value in kept.items() if not name.startswith("_")}


@contextlib.contextmanager
def loadable() -> Iterator[None]:
    """Inside, whatever loading a damaged folder raises is an ExportMismatch."""
    try:
        yield
    except Exception as error:
        raise ExportMismatch(f"it can't be loaded again: {type(error).__name__}: {error}") from error


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
