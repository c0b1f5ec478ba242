"""A checkpoint can be resumed; a pipeline can be drawn from. This file is about checkpoints.

    RUN/checkpoints/step_0001000/
        unet.safetensors  unet.ema.safetensors  unet.optimizer.safetensors  state.json  manifest.json

A checkpoint is written into a temporary folder, listed with sizes and hashes in its manifest, flushed to the disk and
renamed into place; only then are older ones deleted. So a folder of that name is whole, and what a disk does to it
later is found out. There is no random state in it: every random number is a function of (seed, n), see draws.py; the
position in the data and the learning rate are functions of the step. In fp16 the gradient scaler's state is there too.
Safetensors and JSON only: a checkpoint can't run code.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.system.errors import RunError
from ldm.system.files import check_room, hold, put_in_place, temporary_beside
from ldm.system.hashing import fault, write_manifest
from ldm.training.resume import check_changes, differences, digest
from ldm.training.train_state import Trainee

if TYPE_CHECKING:
    from accelerate import Accelerator

SMALL_FILES = 1 << 16  # bytes that a checkpoint takes besides its tensors, generously
DISK_ERRORS = (OSError, SafetensorError)  # the second is how safetensors reports the first
FAILED = -2


def save_checkpoint(
    folder: Path,
    step: int,
    config: dict[str, Any],
    trainees: Mapping[str, Trainee],
    accelerator: Accelerator,
    keep: int,
    facts: Mapping[str, Any] | None = None,
    *,
    must: bool = False,
) -> bool:
    """Write folder/step_<step>/, then delete all but the newest `keep`. Every rank must call it.

    A disk that is full or fails is no reason to stop training: the checkpoints that are there stay, a warning says
    what is wrong, and the next save may succeed.

    Args:
        facts: what the data are, besides the config; compared on resume.
        must: nothing comes after this one, so that failing is an error.
    Returns:
        Whether it was written; the same on every rank.
    Raises:
        RunError: if a number in it is not finite, or if it could not be written and `must` is set.
    """
    files = {name: tensors for key, trainee in trainees.items() for name, tensors in trainee.tensors(key).items()}
    scaler = getattr(accelerator, "scaler", None)
    state = {
        "step": step,
        **circumstances(accelerator),
        "facts": dict(facts or {}),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "config": config,
        "config_sha256": digest(config),
    }

    def write() -> int:
        check_finite(files, step)
        try:
            write_checkpoint(folder, step, state, files)
        except DISK_ERRORS as error:
            told = f"step {step} could not be saved in {folder}: {error}"
            if must:
                raise RunError(f"{told}; make room, then the same command goes on from the one before") from error
            print(f"\nwarning: {told}; training goes on, and the checkpoints before it stay", file=sys.stderr)
            return 0
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
        return 1

    return on_rank_0(accelerator, write) == 1


def circumstances(accelerator: Accelerator) -> dict[str, Any]:
    """What a step's last digits depend on, besides the config."""
    precision = accelerator.mixed_precision
    return {"processes": accelerator.num_processes, "precision": "fp32" if precision == "no" else precision}


def on_rank_0(accelerator: Accelerator, action: Callable[[], int]) -> int:
    """What rank 0's `action` returns, on every rank; if it raises a RunError, every rank does."""
    outcome, raised = 0, None
    if accelerator.is_main_process:
        try:
            outcome = action()
        except RunError as error:
            outcome, raised = FAILED, error
    outcome = int(broadcast(torch.tensor(outcome, device=accelerator.device)))
    if outcome == FAILED:
        raise raised or RunError("rank 0 says why")
    return outcome


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


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name)]
    return sorted(found, key=number_of)


def number_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_"))


def load_checkpoint(path: Path, trainees: Mapping[str, Trainee], accelerator: Accelerator | None = None) -> int:
    """Put a checkpoint's state into networks, optimizers and averages; returns its step. Every rank must call it."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    for name, trainee in trainees.items():
        files = {file: load_file(path / f"{file}.safetensors") for file in trainee.files(name)}
        trainee.load(name, files, state["step"])
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; broken ones are renamed, which one line each tells."""
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


def resume(
    folder: Path,
    trainees: Mapping[str, Trainee],
    accelerator: Accelerator,
    steps: int,
    config: dict[str, Any],
    facts: Mapping[str, Any] | None = None,
    trained: str = "unet",
) -> int:
    """Load the newest whole checkpoint in `folder`, if there is one; returns the step to go on from.

    The run's folder is held from now on. Every rank must call it.

    Args:
        config: the run's, as nested dicts; `resume.allow` lists keys that may have changed.
        facts: what the data are, besides the config.
        trained: "unet" or "vae", which read different parts of the config.
    Raises:
        RunError: if the config differs where it matters, or another process trains in this folder.
    """

    def find() -> int:
        hold(folder.parent)
        found = newest(folder)
        return -1 if found is None else number_of(found)

    step = on_rank_0(accelerator, find)
    if step < 0:
        return 0
    path = folder / f"step_{step:07d}"
    state = json.loads((path / "state.json").read_text("utf-8"))
    known = {name: (state["facts"].get(name), value) for name, value in (facts or {}).items()}
    changed = differences(state["config"], config, trained, known, step)
    rounding, allowed = check_changes(changed, config.get("resume", {}).get("allow", ()), path)
    for name, value in circumstances(accelerator).items():
        if state.get(name, value) != value:  # older checkpoints don't say their precision
            rounding.append(f"{name} {state[name]} => {value}")
    load_checkpoint(path, trainees, accelerator)
    told = f"going on from {path}, step {step} of {steps}"
    if allowed:
        told += f"; allowed: {', '.join(allowed)}"
    if rounding:
        told += f"; not exact to the last bit: {', '.join(rounding)}"
    accelerator.print(told)
    return step
