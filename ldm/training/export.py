"""RUN/pipeline: the averaged weights as a pipeline, replaced only by one that is whole and is what was trained.

All of a pipeline but its U-Net is there before the first step, and no step changes it. It is saved once, in RUN/frozen,
and pipelines share its files, by hard links where the disk knows them. So an export takes the time and the memory of a
U-Net, however large the text encoder is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.models.text_encoder import TextEncoder
from ldm.system.errors import RunError
from ldm.system.files import put_in_place, temporary_beside
from ldm.system.memory import give_back
from ldm.training.checkpoint import DISK_ERRORS, on_rank_0
from ldm.training.distributed import while_others_wait
from ldm.training.encoders import Encoders
from ldm.training.samples import Batch
from ldm.training.selfcheck import Frozen, PipelineMismatch, check_frozen, check_unet, known, quiet
from ldm.training.train_state import averaged_weights

if TYPE_CHECKING:
    from ldm.training.trainer import Training

#: A VAE and a text encoder, without their weights => a pipeline, likewise.
BuildPipeline = Callable[[Any, TextEncoder | None], Any]
#: U-Net weights on the CPU => the U-Net that pipelines have.
BuildUNet = Callable[[dict[str, Tensor]], Any]


def save_frozen(run: Path, encoders: Encoders, build_pipeline: BuildPipeline) -> None:
    """Save RUN/frozen, one network after the other: each is in memory alone. Every rank must call it.

    Raises:
        RunError: if there is no room for it, or what was written is not what is in memory.
    """
    final = run / "frozen"
    encoders.free()  # pipelines have them in float32

    def save(_: Callable[[], None]) -> None:
        vae = encoders.load_vae()
        with writing(final):
            temporary = temporary_beside(final)
            networks = {"vae": save_network(vae, temporary / "vae")}
        text = encoders.load_text() if encoders.load_text else None
        with writing(final):
            if text is not None:
                networks["text_encoder"] = save_network(text.model, temporary / "text_encoder")
            pipeline = build_pipeline(vae, text)
            pipeline.save_without_networks(temporary)
            check_frozen(temporary, Frozen.of(pipeline, networks))
            put_in_place(temporary, final)

    while_others_wait(save)


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Inside, what goes wrong is a RunError that names the folder; loading an encoder belongs outside."""
    try:
        with quiet():
            yield
    except PipelineMismatch as error:
        raise RunError(f"what was written for {final} is not what is in memory: {error}") from error
    except DISK_ERRORS as error:
        raise RunError(f"{final} could not be saved: {error}; make room, then the same command tries again") from error


def save_network(network: Any, folder: Path) -> tuple[type, str]:
    """Save a network and let its weights go; returns what it is known by."""
    network.save_pretrained(folder, safe_serialization=True)
    told = known(network)
    network.to("meta")  # what a pipeline's index says of it is still there
    give_back()
    return told


def export(training: Training, build_unet: BuildUNet, stored: Batch, done: int) -> Path | None:
    """Save RUN/pipeline with the averaged weights; returns it on rank 0, None elsewhere. Every rank must call it.

    A disk that is full costs this export, not the run, unless it is the last one.

    Raises:
        RunError: if what was written is not what was trained; the pipeline before it stays.
    """
    give_back()  # what steps have freed: the pipeline's U-Net is in memory beside the one that learns
    weights = averaged_weights(training.unet, training.ema)
    expected = training.averaged_error(stored)
    frozen, final = (Path(training.config.run) / name for name in ("frozen", "pipeline"))

    @torch.no_grad()
    def loss_of(unet: nn.Module) -> float:
        unet = unet.to(training.accelerator.device).eval()
        return float(replace(training, unet=unet).error(stored))

    def write() -> int:
        try:
            temporary = temporary_beside(final)
            shutil.copytree(frozen, temporary, copy_function=link, dirs_exist_ok=True)
            unet = build_unet(weights)
            with quiet():
                unet.save_pretrained(temporary / "unet")
                check_unet(temporary, unet, expected, loss_of, training.accelerator.mixed_precision)
            put_in_place(temporary, final)
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

    return final if on_rank_0(training.accelerator, write) else None


def link(file: str, to: str) -> None:
    """The same file under another name; a copy where the file system has no such links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)
