"""The learning rate is a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(peak: float, step: int, steps: int, warmup: int, decay: Literal["constant", "cosine"]) -> float:
    """The learning rate of a step in [0, steps): a linear rise over `warmup` steps, times 1 or a cosine to zero."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = 1.0 if decay == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * rise * fall
