"""What is trained, and its state as plain tensors: the same names and whole tensors with one process, DDP and FSDP.

Of a network that is partly frozen, as beside LoRA adapters, only what learns is optimized, averaged and saved.
"""

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

from ldm.models.ema import averaged, is_sharded, learning

# on rank 0; the other ranks get nothing
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
EVERYWHERE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)


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
            load_weights(self.module, files[f"{name}.ema"])
            self.ema.optimization_step = step
            for shadow, parameter in zip(self.ema.shadow_params, learning(self.module), strict=True):
                shadow.data.copy_(parameter.data)
        load_weights(self.module, files[name])
        if self.optimizer is not None:
            load_optimizer_tensors(self.module, plain(self.optimizer), files[f"{name}.optimizer"])


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A network's whole weights, frozen ones left out, on the CPU of rank 0; its own tensors if they are there already.

    Every rank must call it.
    """
    weights: dict[str, Any] = get_model_state_dict(module, options=WHOLE)
    return weights


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """The inverse of `whole_weights`. Every rank must call it."""
    frozen = not all(weight.requires_grad for weight in module.parameters())
    options = StateDictOptions(full_state_dict=True, strict=not frozen)
    found = set_model_state_dict(module, dict(weights), options=options)
    if frozen:
        bare = extract_model_from_parallel(module, keep_torch_compile=False)
        learns = {name for name, weight in bare.named_parameters() if weight.requires_grad}
        if found.unexpected_keys or learns & set(found.missing_keys):
            raise RuntimeError(f"checkpoint: its weights are not those that learn: {found}")


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
    bare = extract_model_from_parallel(module, keep_torch_compile=False)
    names = [name for name, weight in bare.named_parameters() if weight.requires_grad]
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
