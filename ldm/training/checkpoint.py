"""A checkpoint can be resumed; a pipeline can be sampled. This file is about checkpoints.

    RUN/checkpoints/ldm/step_0001000/
        unet.safetensors  unet.ema.safetensors  unet.optimizer.safetensors  state.json  manifest.json

A checkpoint is written into a temporary folder, listed with sizes and hashes in its manifest, flushed to the disk and
renamed into place; only then are older ones deleted. So a folder of that name is whole, and what a disk does to it
later is detected. It holds no random state: every random number is a function of (seed, n) (randomness.py); the
position in the data and the learning rate are functions of the step. In fp16 the gradient scaler's state is in it.
Safetensors and JSON only: a checkpoint can't run code.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.system.errors import RunError
from ldm.system.files import check_room, put_in_place, temporary_beside
from ldm.system.hashing import fault, write_manifest
from ldm.training.distributed import Tick, on_rank_0
from ldm.training.train_state import TrainState

SMALL_FILES = 1 << 16  # bytes that a checkpoint takes besides its tensors, generously
DISK_ERRORS = (OSError, SafetensorError)  # the second is how safetensors reports the first


def save_checkpoint(
    folder: Path,
    step: int,
    config: dict[str, Any],
    train_state: Mapping[str, TrainState],
    accelerator: Accelerator,
    keep: int,
    facts: Mapping[str, Any] | None = None,
    *,
    must: bool = False,
) -> bool:
    """Write folder/step_<step>/, then delete all but the newest `keep`. Every rank must call it.

    A disk that is full or fails is no reason to stop training: the existing checkpoints stay, a warning says what is
    wrong, and the next save may succeed.

    Args:
        facts: what the data are, besides the config; compared on resume.
        must: whether failing is an error, since nothing comes after this one.
    Returns:
        Whether it was written; the same on every rank.
    Raises:
        RunError: if a number in it is not finite, or if it could not be written and `must` is set.
    """
    files = {name: tensors for key, state in train_state.items() for name, tensors in state.tensors(key).items()}
    scaler = getattr(accelerator, "scaler", None)
    state = {
        "step": step,
        **circumstances(accelerator),
        "facts": dict(facts or {}),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "config": config,
        "config_sha256": digest(config),
    }

    def write(_: Tick) -> int:
        check_finite(files, step)
        try:
            write_checkpoint(folder, step, state, files)
        except DISK_ERRORS as error:
            failed = f"step {step} could not be saved in {folder}: {error}"
            if must:
                raise RunError(f"{failed}; make room and run the same command again to resume") from error
            print(f"\nwarning: {failed}; training continues, and the checkpoints before it stay", file=sys.stderr)
            return 0
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        return 1

    return on_rank_0(write) == 1


def circumstances(accelerator: Accelerator) -> dict[str, Any]:
    """What a step's last digits depend on, besides the config."""
    precision = accelerator.mixed_precision
    return {"processes": accelerator.num_processes, "precision": "fp32" if precision == "no" else precision}


def digest(config: Mapping[str, Any]) -> str:
    """The SHA-256 of a config's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_finite(files: Mapping[str, dict[str, Tensor]], step: int) -> None:
    """The last gate: steps with such gradients are skipped, but a step itself can overflow."""
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise RunError(
                    f"step {step} is not saved, since it is not finite: {name}, {key}. The checkpoints before it stay; "
                    "lower the learning rate, and allow that: optim.lr=… 'resume.allow=[optim.lr]'"
                )


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], files: Mapping[str, dict[str, Tensor]]) -> None:
    """Commit folder/step_<step>/, or raise one of DISK_ERRORS and leave everything as it was."""
    tensors = [tensor for group in files.values() for tensor in group.values()]
    final = folder / f"step_{step:07d}"
    temporary = temporary_beside(final)
    try:
        check_room(folder, sum(tensor.nbytes for tensor in tensors) + SMALL_FILES)
        for name, group in files.items():
            save_file({key: value.contiguous() for key, value in group.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2), "utf-8")
        write_manifest(temporary)
        put_in_place(temporary, final)
    except DISK_ERRORS:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def checkpoint_folder(run: str | Path, task: str) -> Path:
    """Where a run keeps the checkpoints of a task: "vae", "ldm", "distill" or "classifier"."""
    return Path(run) / "checkpoints" / task


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in a task's folder, oldest first.

    Up to version 0.1 the U-Net's were in RUN/checkpoints itself; they are found there.
    """
    folders = [folder.parent, folder] if folder.name == "ldm" else [folder]
    found = [path for place in folders for path in place.glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name)]
    return sorted(found, key=step_of)


def has_begun(run: str | Path, task: str) -> bool:
    """Whether a run of a task is resumed: its data, networks and settings were checked before its first step."""
    return bool(checkpoints(checkpoint_folder(run, task)))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(path: Path, train_state: Mapping[str, TrainState], accelerator: Accelerator | None = None) -> int:
    """Put a checkpoint's state into networks, optimizers and averages; returns its step. Every rank must call it."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    for name, trained in train_state.items():
        files = {file: load_file(path / f"{file}.safetensors") for file in trained.files(name)}
        trained.load(name, files, state["step"])
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; broken ones are renamed, each with a line that says why."""
    for left in folder.glob(".step_*"):  # a killed process was writing or deleting it
        shutil.rmtree(left, ignore_errors=True)
    for path in reversed(checkpoints(folder)):
        wrong = fault(path)
        if wrong is None:
            return path
        aside = next(name for i in range(1, 1000) if not (name := path.with_name(f"{path.name}.broken-{i}")).exists())
        path.rename(aside)
        print(f"{path} is broken: {wrong}; set aside as {aside.name}")
    return None
