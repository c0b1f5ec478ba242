"""Numbers that are not numbers never reach the weights, and losses that jump are written down.

Whether a step is taken is decided where the gradients are, without waiting for the device: a loss that is not finite
makes its gradients NaN, reducing the gradients spreads that to all ranks, their norm is then not finite on every rank
alike, and the optimizer's fused kernel leaves weights and moments as they are. The average is taken as after any step,
of weights that stood still. So a resumed run skips the same steps.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm.system.errors import RunError
from ldm.training.logging import Tracker
from ldm.training.randomness import row_of
from ldm.training.signals import EXIT_CODES
from ldm.training.train_state import plain

WINDOW, ENOUGH = 200, 30  # losses that a jump is measured against, at most and at least
SIGMA = 1.4826  # the std of a normal distribution over its median absolute deviation
SIGNALS = tuple(EXIT_CODES)


def telling(loss: Tensor) -> Tensor:
    """The loss, whose gradients are NaN if it is not finite itself: (1e20)**2 is infinite, its derivative is not."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def update(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float
) -> Tensor:
    """Clip the gradients and step, unless one of them is not finite; returns 1.0 for a step that was skipped, else 0.0.

    Every rank must call it, and all skip alike.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    inner: Any = plain(optimizer)
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    shrinking = None
    if inner.defaults.get("fused") and accelerator.scaler is None and not isinstance(gradients[0], DTensor):
        norm = nn.utils.get_total_norm(gradients)
        shrinking = (norm / clip).clamp(min=1)  # the kernel divides by it, which saves a pass over the gradients
    else:
        norm = accelerator.clip_grad_norm_(module.parameters(), clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    skipped = (~norm.isfinite()).float()
    if inner.defaults.get("fused"):
        inner.found_inf, inner.grad_scale = skipped, shrinking  # the kernel's own ways (torch.amp uses them)
        optimizer.step()
        vars(inner).pop("found_inf", None), vars(inner).pop("grad_scale", None)
    elif not skipped.item():
        optimizer.step()
    optimizer.zero_grad()
    return skipped


class Watch:
    """Hears of every step, on all ranks alike: its loss, whether it was skipped, and whether a signal came.

    On a CPU it hears at once. A GPU is told to do the next step before the last one's numbers are read, so that its
    queue never runs dry; what is decided from them (to stop, never what is learned) is then decided one step later.

    Attributes:
        losses: of the steps since they were last taken, averaged over all ranks; NaN for skipped ones.
        skipped: how many steps were skipped.
        signal: the signal that all ranks agreed to obey, or 0.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tracker: Tracker,
        batch: Callable[[int], dict[str, Any]],
        learning_rate: Callable[[int], float],
        *,
        max_skipped: int,
        spike: float,
    ) -> None:
        self.accelerator, self.tracker, self.batch, self.learning_rate = accelerator, tracker, batch, learning_rate
        self.max_skipped, self.spike = max_skipped, spike
        self.lag = 0 if accelerator.device.type == "cpu" else 1
        self.waiting: deque[tuple[int, Tensor, Any]] = deque()
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.losses: list[float] = []
        self.skipped = self.in_a_row = self.signal = 0

    def hear(self, step: int, loss: Tensor, skipped: Tensor, signal: int) -> None:
        """Take a step's numbers, scalars on the device. Every rank must call it.

        Raises:
            RunError: if too many steps in a row were skipped.
        """
        numbers = torch.zeros(2 + len(SIGNALS), device=self.accelerator.device)
        numbers[0], numbers[1] = loss, skipped
        if signal:
            numbers[2 + SIGNALS.index(signal)].fill_(1.0)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(numbers)
        event = torch.Event(numbers.device) if self.lag else None
        host = numbers.to("cpu", non_blocking=True)
        if event is not None:
            event.record()
        self.waiting.append((step, host, event))
        self.read(self.lag)

    def drain(self) -> None:
        """Hear of all steps until now. Every rank must call it, since all raise alike."""
        self.read(0)

    def take_losses(self) -> list[float]:
        """The losses since the last call, all steps included."""
        self.drain()
        losses, self.losses = self.losses, []
        return losses

    def read(self, left: int) -> None:
        """Judge all but the last so many steps."""
        while len(self.waiting) > left:
            step, host, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            total, skips, *signals = host.tolist()
            for number, votes in zip(SIGNALS, signals, strict=True):
                self.signal = self.signal or (number if votes else 0)
            self.judge(step, total / self.accelerator.num_processes, skips > 0)

    def judge(self, step: int, loss: float, skipped: bool) -> None:
        """Count, compare, write down."""
        self.losses.append(loss)
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            lr = self.learning_rate(step)
            self.tracker.event(step + 1, "skipped", {"loss": repr(loss), "lr": lr, **self.batch(step)})
            if self.in_a_row >= self.max_skipped:
                raise RunError(
                    f"loss or gradients are not finite for {self.in_a_row} steps in a row, the last at step {step + 1} "
                    f"(loss {loss}, lr {lr:g}), {described(self.batch(step))}. None of these steps was taken: the "
                    "weights are those before them. Look at these pictures, lower the learning rate or use more "
                    "precision (loop.precision=fp32)"
                )
            return
        self.in_a_row = 0
        if self.spike and len(self.recent) >= ENOUGH:
            median = statistics.median(self.recent)
            sigma = SIGMA * statistics.median(abs(value - median) for value in self.recent)
            if loss > median + self.spike * sigma > median:
                told = {"loss": loss, "median": median, "sigmas": (loss - median) / sigma, **self.batch(step)}
                self.tracker.event(step + 1, "spike", told)
        self.recent.append(loss)


def batch_of(seed: int, batch_size: int, pictures: Any) -> Callable[[int], dict[str, Any]]:
    """step => the numbers of its samples, first and last, and where their pictures come from."""

    def batch(step: int) -> dict[str, Any]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        rows = [pictures[row_of(seed, n, len(pictures))].where for n in numbers]
        return {"samples": [numbers[0], numbers[-1]], "rows": rows}

    return batch


def described(batch: dict[str, Any], most: int = 8) -> str:
    """A batch in a sentence."""
    first, last = batch["samples"]
    rows = batch["rows"]
    more = f" and {len(rows) - most} more (all in log.jsonl)" if len(rows) > most else ""
    return f"samples {first} to {last}: {'; '.join(rows[:most])}{more}"


def mean_of_finite(losses: list[float]) -> float | None:
    """The mean of the losses of the steps that were taken; None if there are none."""
    taken = [loss for loss in losses if abs(loss) < float("inf")]
    return sum(taken) / len(taken) if taken else None
