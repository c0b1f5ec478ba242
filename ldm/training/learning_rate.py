"""The learning rate is a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    peak: float, step: int, steps: int, warmup: int, decay: Literal["constant", "cosine"], cooldown: int = 0
) -> float:
    """The learning rate of a step in [0, steps): a linear rise over `warmup` steps, times a fall.

    It falls along a cosine to zero, or not at all but over the last `cooldown` steps, there as 1 - sqrt(share of them
    that is over), which leaves as good a model as the cosine does and need not know the last step from the first
    (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations", section 3).
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay == "cosine":
        return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
    over = (step - (steps - cooldown)) / cooldown if cooldown else 0.0
    return peak * rise * (1 - math.sqrt(min(1.0, max(0.0, over))))
