"""What is trained, and its state as plain tensors: the same names and whole tensors with one process, DDP and FSDP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ldm.models.ema import averaged, is_sharded

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0; the other ranks get nothing
EVERYWHERE = StateDictOptions(full_state_dict=True)


@dataclass
class TrainState:
    """A network, or another module with a state, with its optimizer and its averaged weights if it has them."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    ema: EMAModel | None = None

    def files(self, name: str) -> list[str]:
        """The files of its state, without their suffix."""
        has = {"optimizer": self.optimizer, "ema": self.ema}
        return [name, *(f"{name}.{part}" for part, value in has.items() if value is not None)]

    def tensors(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Its whole state on the CPU of rank 0, file by file. Every rank must call it."""
        files = {name: whole_weights(self.module)}
        if self.optimizer is not None:
            files[f"{name}.optimizer"] = optimizer_tensors(self.module, plain(self.optimizer))
        if self.ema is not None:
            files[f"{name}.ema"] = averaged_weights(self.module, self.ema)
        return files

    def load(self, name: str, files: dict[str, dict[str, Tensor]], step: int) -> None:
        """The inverse of `tensors`, after so many steps. Every rank must call it."""
        if self.ema is not None:
            set_model_state_dict(self.module, dict(files[f"{name}.ema"]), options=EVERYWHERE)
            self.ema.optimization_step = step
            for shadow, parameter in zip(self.ema.shadow_params, self.module.parameters(), strict=True):
                shadow.data.copy_(parameter.data)
        set_model_state_dict(self.module, dict(files[name]), options=EVERYWHERE)
        if self.optimizer is not None:
            load_optimizer_tensors(self.module, plain(self.optimizer), files[f"{name}.optimizer"])


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A network's whole weights on the CPU of rank 0; the network's own tensors if they are there already.

    Every rank must call it.
    """
    weights: dict[str, Any] = get_model_state_dict(module, options=WHOLE)
    return weights


def averaged_weights(module: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """The averaged weights, likewise, but copied: the network has its own again afterwards."""
    with averaged(module, ema):
        return {name: tensor.clone() for name, tensor in whole_weights(module).items()}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat names, "<weight>:exp_avg"; its learning rate is a function of the step."""
    if not optimizer.state:
        return {}  # before its first step; torch would take one of zero to have something to return, and count it
    state: Any = get_optimizer_state_dict(module, optimizer, options=WHOLE)
    moments = state.get("state", {})
    return {f"{weight}:{key}": value for weight, values in moments.items() for key, value in values.items()}


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    by_weight: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight, key = name.rsplit(":", 1)
        by_weight.setdefault(weight, {})[key] = tensor
    if is_sharded(module) and tensors:
        optimizer.zero_grad()  # torch allocates the moments by a step without gradients
        state: Any = get_optimizer_state_dict(module, optimizer, options=EVERYWHERE)
        state["state"].update(by_weight)
        set_optimizer_state_dict(module, optimizer, state, options=EVERYWHERE)
        return
    # without that step, which takes longer than all else of a resumed start
    names = [name for name, _ in extract_model_from_parallel(module, keep_torch_compile=False).named_parameters()]
    numbers = {name: number for number, name in enumerate(names)}
    numbered = {
        numbers[name]: {key: tensor.clone() for key, tensor in values.items()}  # out of the mapped file
        for name, values in by_weight.items()
    }
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, if there is one."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
