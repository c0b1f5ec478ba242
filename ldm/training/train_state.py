"""What is trained, and its state as plain tensors: the same names and whole tensors with one process, DDP and FSDP.

Of a network that is partly frozen, as beside LoRA adapters, only what learns is optimized, averaged and saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
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
from ldm.training.optimizers import as_tensor, own_average, running_values

# on rank 0; the other ranks get nothing
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
EVERYWHERE = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)


@dataclass
class TrainState:
    """A network, or another module with a state, with its optimizer and its averaged weights if it has them.

    Attributes:
        ema: the average that is validated and exported; a schedule-free optimizer has its own instead.
        powers: averages whose width is chosen after training, by the names of their widths.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    ema: EMAModel | None = None
    powers: Mapping[str, EMAModel] = field(default_factory=dict)

    @property
    def averages(self) -> dict[str, EMAModel]:
        """All that is averaged here, by the ends of their files' names."""
        first = {} if self.ema is None else {"ema": self.ema}
        return first | {f"ema-{width}": average for width, average in self.powers.items()}

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Inside, the network has its averaged weights. Every rank must enter."""
        lent = own_average(self.module, plain(self.optimizer)) if self.ema is None else averaged(self.module, self.ema)
        with lent:
            yield self.module

    def files(self, name: str) -> list[str]:
        """The files of its state, without their suffix."""
        optimizer = [] if self.optimizer is None else [f"{name}.optimizer"]
        return [name, *optimizer, *(f"{name}.{part}" for part in self.averages)]

    def tensors(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Its whole state on the CPU of rank 0, file by file. Every rank must call it."""
        files = {name: whole_weights(self.module)}
        if self.optimizer is not None:
            files[f"{name}.optimizer"] = optimizer_tensors(self.module, plain(self.optimizer))
        for part, average in self.averages.items():
            files[f"{name}.{part}"] = averaged_weights(self.module, average)
        return files

    def load(self, name: str, files: dict[str, dict[str, Tensor]], step: int) -> None:
        """The inverse of `tensors`, after so many steps. Every rank must call it."""
        for part, average in self.averages.items():
            load_weights(self.module, files[f"{name}.{part}"])
            average.optimization_step = step
            for shadow, parameter in zip(average.shadow_params, learning(self.module), strict=True):
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
    if is_sharded(module):
        state: Any = get_optimizer_state_dict(module, optimizer, options=WHOLE)
        moments = state.get("state", {})
        return {f"{weight}:{key}": value for weight, values in moments.items() for key, value in values.items()}
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return {}
    found = {  # not from its state_dict, whose values bitsandbytes wraps
        f"{name}:{key}": as_tensor(value).cpu()
        for name, weight in learning_by_name(module).items()
        for key, value in optimizer.state.get(weight, {}).items()
    }
    return found | {f":{key}": value for key, value in running_values(optimizer).items()}


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
    weights, groups = learning_by_name(module), optimizer.state_dict()["param_groups"]
    running = {key: tensor.item() for key, tensor in by_weight.pop("", {}).items()}
    ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = {id(weight): number for number, weight in enumerate(ordered)}
    numbered = {
        numbers[id(weights[name])]: {key: loaded(tensor) for key, tensor in values.items()}
        for name, values in by_weight.items()
    }
    optimizer.load_state_dict({"state": numbered, "param_groups": [{**group, **running} for group in groups]})


def loaded(tensor: Tensor) -> Any:
    """A tensor out of the mapped file; a number that an optimizer counts in Python is one again."""
    return tensor.item() if tensor.dtype == torch.int64 and not tensor.ndim else tensor.clone()


def learning_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by the names that they have in files."""
    bare = extract_model_from_parallel(module, keep_torch_compile=False)
    return {name: weight for name, weight in bare.named_parameters() if weight.requires_grad}


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, if there is one."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
