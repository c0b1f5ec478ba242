"""The learning rate as a function of the step, and steps that are skipped where a number is not finite.

Whether a step is taken is decided where the gradients are, without waiting for the device: a loss that is not finite
makes its gradients NaN, reducing the gradients spreads that to all ranks, their norm is then not finite on every rank
alike, and the optimizer's fused kernel leaves weights and moments as they are. So a resumed run skips the same steps.
Optimizers without such a kernel, those of optimizers.py but AdamW, cost a GPU one wait a step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.training.train_state import plain


def learning_rate(
    peak: float, step: int, steps: int, warmup: int, decay: Literal["constant", "cosine"], cooldown: int = 0
) -> float:
    """The learning rate of a step in [0, steps): a linear rise over `warmup` steps, times a fall.

    It falls along a cosine to zero, or not at all but over the last `cooldown` steps, there as 1 - sqrt(share of them
    that is over), which leaves as good a model as the cosine does and does not depend on the last step before that
    (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations", section 3).
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay == "cosine":
        return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
    over = (step - (steps - cooldown)) / cooldown if cooldown else 0.0
    return peak * rise * (1 - math.sqrt(min(1.0, max(0.0, over))))


def with_nan_gradients(loss: Tensor) -> Tensor:
    """The loss, whose gradients are NaN if it is not finite itself: (1e20)**2 is infinite, its derivative is not."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def update(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float
) -> Tensor:
    """Clip the gradients and step, unless one of them is not finite. Every rank must call it, and all skip alike.

    Returns:
        1.0 for a step that was skipped, else 0.0, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    fused = plain(optimizer).defaults.get("fused")
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    divisor = None
    if fused and accelerator.scaler is None and not isinstance(gradients[0], DTensor):
        norm = nn.utils.get_total_norm(gradients)
        divisor = (norm / clip).clamp(min=1)  # the kernel divides by it, which saves a pass over the gradients
    else:
        norm = accelerator.clip_grad_norm_(module.parameters(), clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    skipped = (~norm.isfinite()).float()
    if fused:
        fused_step(optimizer, skipped, divisor)
    elif not skipped.item():
        optimizer.step()
    optimizer.zero_grad()
    return skipped


def fused_step(optimizer: torch.optim.Optimizer, skip: Tensor, divisor: Tensor | None) -> None:
    """A step of a fused kernel that divides its gradients and leaves all as it is where `skip` is 1.0.

    Fused optimizers take both from two attributes that torch.amp.GradScaler sets around each step; the scaler itself
    takes another pass over the gradients. tests/training/test_optimizer.py fails when torch changes that.
    """
    inner: Any = plain(optimizer)
    inner.found_inf, inner.grad_scale = skip, divisor
    optimizer.step()
    for name in ("found_inf", "grad_scale"):  # in fp16 the gradient scaler has set and deleted its own
        vars(inner).pop(name, None)
