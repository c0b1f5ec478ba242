"""Every step is monitored, on all ranks alike: skipped steps, spikes of the loss, signals."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data.dataset import Row
from ldm.system.errors import RunError
from ldm.training.logging import Tracker
from ldm.training.signals import EXIT_CODES

WINDOW, ENOUGH = 200, 30  # losses that a spike is measured against, at most and at least
SIGMA = 1.4826  # the std of a normal distribution over its median absolute deviation
SIGNALS = tuple(EXIT_CODES)


class Monitor:
    """Takes each step's numbers: its loss, whether it was skipped, and whether a signal was received.

    On a CPU they are read at once. A GPU gets the next step to do before the last one's numbers are read, so that its
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
        samples_of: Callable[[int], dict[str, Any]],
        learning_rate: Callable[[int], float],
        *,
        task: str,
        max_skipped: int,
        spike: float,
    ) -> None:
        self.accelerator, self.tracker = accelerator, tracker
        self.samples_of, self.learning_rate, self.task = samples_of, learning_rate, task
        self.max_skipped, self.spike = max_skipped, spike
        self.lag = 0 if accelerator.device.type == "cpu" else 1
        self.waiting: deque[tuple[int, Tensor, Any]] = deque()
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.losses: list[float] = []
        self.skipped = self.in_a_row = self.signal = 0

    def record(self, step: int, loss: Tensor, skipped: Tensor, signal: int) -> None:
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

    def take_losses(self) -> list[float]:
        """The losses since the last call, all steps until now included. Every rank must call it: all raise alike."""
        self.read(0)
        losses, self.losses = self.losses, []
        return losses

    def read(self, left: int) -> None:
        """Read the numbers of all but the last so many steps."""
        while len(self.waiting) > left:
            step, host, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            total, skips, *signals = host.tolist()
            for number, votes in zip(SIGNALS, signals, strict=True):
                self.signal = self.signal or (number if votes else 0)
            self.examine(step, total / self.accelerator.num_processes, skips > 0)

    def examine(self, step: int, loss: float, skipped: bool) -> None:
        """Count a skipped step; log it, or a spike."""
        self.losses.append(loss)
        if skipped:
            self.skipped += 1
            self.in_a_row += 1
            lr, samples = self.learning_rate(step), self.samples_of(step)
            self.event(step, "skipped", {"loss": repr(loss), "lr": lr, **samples})
            if self.in_a_row >= self.max_skipped:
                raise RunError(
                    f"loss or gradients are not finite for {self.in_a_row} steps in a row, the last at step {step + 1} "
                    f"(loss {loss}, lr {lr:g}), {described(samples)}. None of these steps was taken: the weights are "
                    "those before them. Look at these pictures, lower the learning rate or use more precision "
                    "(loop.precision=fp32)"
                )
            return
        self.in_a_row = 0
        if self.spike and len(self.recent) >= ENOUGH:
            median = statistics.median(self.recent)
            sigma = SIGMA * statistics.median(abs(value - median) for value in self.recent)
            if loss > median + self.spike * sigma > median:
                facts = {"loss": loss, "median": median, "sigmas": (loss - median) / sigma}
                self.event(step, "spike", facts | self.samples_of(step))
        self.recent.append(loss)

    def event(self, step: int, name: str, values: dict[str, Any]) -> None:
        self.tracker.event(step + 1, name, {"task": self.task, **values})


def samples_of_steps(
    row_of: Callable[[int], int], batch_size: int, pictures: Sequence[Row]
) -> Callable[[int], dict[str, Any]]:
    """step => the numbers of its samples, first and last, and where their pictures, of `row_of` each, come from."""

    def samples(step: int) -> dict[str, Any]:
        numbers = range(step * batch_size, (step + 1) * batch_size)
        rows = [pictures[row_of(n)].where for n in numbers]
        return {"samples": [numbers[0], numbers[-1]], "rows": rows}

    return samples


def described(samples: dict[str, Any], most: int = 8) -> str:
    """The samples of a step in a sentence."""
    first, last = samples["samples"]
    rows = samples["rows"]
    more = f" and {len(rows) - most} more (all in log.jsonl)" if len(rows) > most else ""
    return f"samples {first} to {last}: {'; '.join(rows[:most])}{more}"


def mean_of_finite(losses: list[float]) -> float | None:
    """The mean of the losses that are finite; None if there are none."""
    finite = [loss for loss in losses if abs(loss) < float("inf")]
    return sum(finite) / len(finite) if finite else None
