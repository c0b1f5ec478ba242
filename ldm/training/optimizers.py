"""Optimizers by name: `optim.name`. Each is a library's own; what is ours is what they need to fit one training loop.

adamw           torch.optim.AdamW (Loshchilov & Hutter 2019)
muon            torch.optim.Muon for linear maps and convolutions, AdamW for what else learns (Jordan et al. 2024)
schedule_free   schedulefree.AdamWScheduleFree: no decay of the learning rate, and its own average (Defazio et al. 2024)
adamw8bit       bitsandbytes.optim.AdamW8bit: moments in 8 bits, on CUDA (Dettmers et al. 2022)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from ldm.models.ema import learning

NAMES = ("adamw", "muon", "schedule_free", "adamw8bit")
#: name => the package that has it, and our extra that installs it.
PACKAGES = {"schedule_free": ("schedulefree", "schedule-free"), "adamw8bit": ("bitsandbytes", "8bit")}
#: Layers that read the network's input or make its output, which Muon is not for.
OUTER = ("conv_in", "conv_out")
MOMENTUM = 0.95  # Muon's


def check_optimizer(name: str, accelerator: Accelerator) -> None:
    """Refuse an optimizer that can't work here, before anything runs.

    Raises:
        ValueError: for a name that is none, sharded weights, or a device that it doesn't know.
        ModuleNotFoundError: if its package is missing.
    """
    if name not in NAMES:
        raise ValueError(f"optim.name: expected one of {', '.join(NAMES)}, got {name!r}")
    if name != "adamw" and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            f"optim.name: {name} needs whole weights, and FSDP shards them; use adamw, or DDP (--multi_gpu)"
        )
    if name == "adamw8bit" and accelerator.device.type != "cuda":
        raise ValueError(f"optim.name: adamw8bit needs CUDA, and this is {accelerator.device.type}; use adamw")
    package, extra = PACKAGES.get(name, (None, None))
    if package and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"optim.name: {name} needs {package}; pip install 'ldm[{extra}]'", name=package)


def build_optimizer(
    module: nn.Module, name: str, lr: float, betas: tuple[float, float], weight_decay: float, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """The optimizer of this name for what learns of a network.

    AdamW is fused where torch has such a kernel: its default on a CPU is a loop over tensors.

    Raises:
        ValueError, ModuleNotFoundError: as `check_optimizer`.
    """
    check_optimizer(name, accelerator)
    weights = learning(module)
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    fused = accelerator.device.type in ("cpu", "cuda")
    if name == "muon":
        return MuonAndAdamW(*by_shape(module), fused=fused, **settings)
    if name == "schedule_free":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(weights, **settings)
        optimizer.train()
        return optimizer
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, **settings)
    return torch.optim.AdamW(weights, fused=fused, **settings)


# --- Muon -----------------------------------------------------------------------------------------


def by_shape(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What learns of a network: the matrices of its inner layers, kernels of convolutions among them; and the rest.

    The first and the last layer, embeddings, biases and norms are the rest, as Jordan et al. leave them to AdamW.
    """
    inner = {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.rsplit(".", 1)[-1] not in OUTER
    }
    weights = learning(module)
    return [w for w in weights if id(w) in inner], [w for w in weights if id(w) not in inner]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for what else learns, as one optimizer.

    Muon replaces the momentum of a matrix by the nearest matrix whose singular values are all about 1. A kernel
    [O,I,h,w] is the matrix [O,I*h*w] that multiplies a patch. Its step is scaled to the size of AdamW's ("match_rms_
    adamw", Liu et al. 2025, eq. 4), so both take one learning rate and one weight decay.

    Attributes:
        param_groups: the matrices, the rest.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        fused: bool,
    ) -> None:
        if not matrices:
            raise ValueError("optim.name: muon needs linear maps or convolutions, and none learn here; use adamw")
        self.flat = [nn.Parameter(weight.detach().flatten(1)) for weight in matrices]
        self.muon = torch.optim.Muon(
            self.flat, lr=lr, weight_decay=weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        groups = [{"params": list(others)}]  # none beside adapters, all of which are matrices
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        super().__init__([{"params": list(matrices)}, {"params": list(others)}], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step both; `closure` is not for this loop."""
        matrices, others = self.param_groups
        for inner, group in ((self.muon, matrices), (self.adamw, others)):
            inner.param_groups[0]["lr"] = group["lr"]
        taken = [(flat, weight) for flat, weight in zip(self.flat, matrices["params"]) if weight.grad is not None]
        for flat, weight in taken:  # anew at each step: moving, loading and lending a network move its weights
            flat.data, flat.grad = weight.data.flatten(1), weight.grad.flatten(1)
            self.muon.state[flat] = self.state[weight]
        self.muon.step()
        for flat, weight in taken:
            if flat.data_ptr() != weight.data_ptr():  # channels_last: flattening has copied it
                weight.data.copy_(flat.data.view_as(weight))
            flat.grad = None
        self.adamw.state = self.state
        self.adamw.step()


# --- schedule-free --------------------------------------------------------------------------------


@contextmanager
def own_average(module: nn.Module, optimizer: Any) -> Iterator[None]:
    """Inside, the network has the average that a schedule-free optimizer keeps; afterwards, its own weights again.

    The network trains at y = (1 - beta) z + beta x, between the point z that gradients move and the average x of all
    z so far, which is what is good (Defazio et al. 2024, eq. 3-5). The library goes from y to x and back by two
    interpolations, which round: y is kept meanwhile, so a validation changes no digit of the training.
    """
    weights = learning(module)
    kept = [weight.detach().clone() for weight in weights]
    optimizer.eval()  # y => x
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def has_own_average(optimizer: Any) -> bool:
    """Whether it is a schedule-free one."""
    return "weight_sum" in optimizer.param_groups[0]


#: What schedule-free optimizers keep beside each weight's state: steps, the sum of their weights, the largest rate.
RUNNING = ("k", "weight_sum", "lr_max")


def running_values(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's values of no weight, as tensors: int64, or float64, which holds Python's floats."""
    group = optimizer.param_groups[0]
    return {key: as_tensor(group[key]) for key in RUNNING if key in group}


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, a number as an int64 or float64 tensor."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
