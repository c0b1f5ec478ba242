"""A checkpoint can be resumed; a pipeline can be drawn from. This file is about checkpoints.

    RUN/checkpoints/step_0001000/
        unet.safetensors  unet.ema.safetensors  unet.optimizer.safetensors  state.json

A checkpoint is written into a temporary folder and renamed into place, so a folder of that name is always
whole. There is no random state in it: every random number is a function of (seed, n), see draws.py.
Weights are gathered by torch's own `distributed.checkpoint.state_dict`, which gives the same names and full
tensors with one process, DDP and FSDP. Safetensors and JSON only: a checkpoint can't run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ldm.models.ema import averaged

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0; the other ranks get nothing
EVERYWHERE = StateDictOptions(full_state_dict=True)


@dataclass
class Trainee:
    """A network or another thing that learns, with what steps it and its average if it has them."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    ema: EMAModel | None = None


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A network's whole weights, on the CPU of rank 0. Every rank must call it."""
    weights: dict[str, Any] = get_model_state_dict(module, options=WHOLE)
    return {name: tensor.clone() for name, tensor in weights.items()}


def averaged_weights(module: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """The averaged weights, likewise."""
    with averaged(module, ema):
        return whole_weights(module)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat names, "<weight>:exp_avg"; its learning rate is a function of the step."""
    state: Any = get_optimizer_state_dict(module, optimizer, options=WHOLE)
    moments = state.get("state", {})
    return {f"{weight}:{key}": value for weight, values in moments.items() for key, value in values.items()}


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    optimizer.zero_grad()  # torch makes room for the moments by a step without gradients
    state: Any = get_optimizer_state_dict(module, optimizer, options=EVERYWHERE)
    for name, tensor in tensors.items():
        weight, key = name.rsplit(":", 1)
        state["state"].setdefault(weight, {})[key] = tensor
    set_optimizer_state_dict(module, optimizer, state, options=EVERYWHERE)


def save_checkpoint(
    folder: Path,
    step: int,
    config: dict[str, Any],
    trainees: Mapping[str, Trainee],
    accelerator: Accelerator,
    keep: int,
) -> None:
    """Write folder/step_<step>/ and delete all but the newest `keep`. Every rank must call it."""
    files: dict[str, dict[str, Tensor]] = {}
    for name, trainee in trainees.items():
        files[name] = whole_weights(trainee.module)
        if trainee.optimizer is not None:
            files[f"{name}.optimizer"] = optimizer_tensors(trainee.module, plain(trainee.optimizer))
        if trainee.ema is not None:
            files[f"{name}.ema"] = averaged_weights(trainee.module, trainee.ema)
    if accelerator.is_main_process:
        final = folder / f"step_{step:07d}"
        temporary = temporary_beside(final)
        for name, tensors in files.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        state = {"step": step, "config": config}
        (temporary / "state.json").write_text(json.dumps(state, indent=2), "utf-8")
        put_in_place(temporary, final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def temporary_beside(final: Path) -> Path:
    """An empty folder to fill before it takes the name of `final`; a killed process leaves it, and nothing reads it."""
    temporary = final.with_name(f".{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a filled folder to its final name, where it replaces the old one."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)  # a folder can't be renamed onto another
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").exists())


def load_checkpoint(path: Path, trainees: Mapping[str, Trainee]) -> int:
    """Put a checkpoint's state into networks, optimizers and averages; returns its step. Every rank must call it."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    for name, trainee in trainees.items():
        if trainee.ema is not None:
            set_model_state_dict(trainee.module, dict(load_file(path / f"{name}.ema.safetensors")), options=EVERYWHERE)
            trainee.ema.optimization_step = state["step"]
            for shadow, parameter in zip(trainee.ema.shadow_params, trainee.module.parameters(), strict=True):
                shadow.data.copy_(parameter.data)
        set_model_state_dict(trainee.module, dict(load_file(path / f"{name}.safetensors")), options=EVERYWHERE)
        if trainee.optimizer is not None:
            moments = load_file(path / f"{name}.optimizer.safetensors")
            load_optimizer_tensors(trainee.module, plain(trainee.optimizer), moments)
    return int(state["step"])


def resume(folder: Path, trainees: Mapping[str, Trainee], accelerator: Accelerator, steps: int) -> int:
    """Load the newest checkpoint in `folder`, if there is one; returns the step to go on from."""
    found = checkpoints(folder)
    if not found:
        return 0
    step = load_checkpoint(found[-1], trainees)
    accelerator.print(f"going on from {found[-1]}, step {step} of {steps}")
    return step


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, if there is one."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
