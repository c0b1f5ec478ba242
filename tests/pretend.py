"""A second device without hardware: its tensors are the CPU's, but say that they are elsewhere and won't meet others.

    python tests/pretend.py train/train_ldm.py --config recipe.yaml ...    a command, as if on a GPU

On a machine with a CPU alone, nothing tells that a tensor was left behind. Here operations whose tensors are on two
devices fail, as CUDA's do. It is torch's own way to write a backend in Python (torch.utils.backend_registration): each
operation on tensors "of" the device unwraps them, runs on the CPU and wraps what comes out.
"""

from __future__ import annotations

import importlib
import pkgutil
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
#: What may bring tensors of two devices together, as on CUDA: copies, and indices from the CPU.
MEET = ("_to_copy", "copy_", "_copy_from", "_foreach_copy_", "index", "index_put_", "_index_put_impl_")


class Backend:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Event:
    """Nothing is ever waited for."""

    def __init__(self, *_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class There(torch.Tensor):
    """A tensor of the device; `here` is where its numbers are."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=torch.device(NAME, 0), requires_grad=here.requires_grad,
        )  # fmt: skip
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, *args, **(kwargs or {}))

    # those who save tensors ask where they are stored
    def storage(self) -> Any:
        return self.here.storage()

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation, on the CPU."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    name = operation._schema.name.removeprefix("aten::")
    there = any(isinstance(tensor, There) for tensor in tensors)
    if there and name not in MEET and any(not isinstance(t, There) and t.dim() for t in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME}:0 and cpu")
    if (asked := kwargs.get("device")) is not None:
        there = torch.device(asked).type == NAME
    plain = {key: torch.device("cpu") if key == "device" and value is not None else value
             for key, value in kwargs.items() if key != "pin_memory"}  # fmt: skip
    found = operation(*tree_map(inside, args), **tree_map(inside, plain))
    returned = operation._schema.returns
    if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:  # x.add_(y) is x
        given = [kwargs.get(argument.name, args[i] if i < len(args) else None)
                 for i, argument in enumerate(operation._schema.arguments)
                 if argument.alias_info is not None and argument.alias_info.is_write]  # fmt: skip
        return given[0] if len(returned) == 1 else tuple(given)
    return tree_map(outside, found) if there else found


def inside(value: Any) -> Any:
    return value.here if isinstance(value, There) else value


def outside(value: Any) -> Any:
    return There(value) if isinstance(value, torch.Tensor) else value


class Torch:
    """The module torch, with an event that waits for nothing and a `tensor` that makes one for the device."""

    Event = Event

    @staticmethod
    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return torch.tensor(*args, device=device, **kwargs)
        return torch.tensor(*args, **kwargs).to(device)  # torch's own would make it inside of torch, past `run`

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def set_up() -> None:
    """Make the device known, and make it the one that trainings and pipelines find."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    global library  # it lives as long as something holds it
    library = torch.library.Library("_", "IMPL", "PrivateUse1")
    library.fallback(run)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module that moves keeps its parameters, as on CUDA

    import accelerate

    import ldm
    import ldm.system.devices
    import ldm.training.distributed

    choose = ldm.training.distributed.build_accelerator

    def build_accelerator(*args: Any) -> accelerate.Accelerator:
        accelerator = choose(*args)
        accelerate.PartialState._shared_state["device"] = torch.device(NAME, 0)
        accelerator.state._shared_state["device"] = torch.device(NAME, 0)
        return accelerator

    ldm.training.distributed.build_accelerator = build_accelerator
    ldm.system.devices.best_device = lambda: torch.device(NAME, 0)
    for found in pkgutil.walk_packages(ldm.__path__, "ldm."):
        module = importlib.import_module(found.name)
        for name, value in {"torch": Torch(), "build_accelerator": build_accelerator,
                            "best_device": ldm.system.devices.best_device}.items():  # fmt: skip
            if hasattr(module, name):
                setattr(module, name, value)


if __name__ == "__main__":
    set_up()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
