"""The sweep: which guidance scale, in which interval of t, and how many steps?

Guidance trades variety for fidelity to the prompt, and steps cost time, so no setting is best at everything. Three
rules are applied in turn; each keeps the settings that can't be distinguished from the best:

    1. retrieval    top-5 recall, of held-out captions, then of training captions. All settings use the same prompts
                    and seeds, so one is worse if it loses significantly more prompts than it wins (McNemar 1947,
                    exact, one-sided)
    2. KID          within one standard error of the smallest of the remaining settings
    3. cost         the fewest evaluations of the U-Net, then the smallest guidance scale
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ldm.evaluation.evaluated_model import SamplingSettings
from ldm.inference.defaults import EVERYWHERE

GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0)
STEPS = (8, 12, 20)
INTERVALS = (EVERYWHERE, (0.2, 1.0), (0.2, 0.8))
SIGNIFICANCE = 0.05
#: Settings => {"evaluations": U-Net evaluations per picture, "retrieval": {prompt set: recall}, "kid": estimate,
#: "found": {prompt set: for each prompt, whether its real picture is among the nearest five}}.
Measure = Callable[[SamplingSettings], dict[str, Any]]


def sweep(
    measure: Measure,
    guidance: Sequence[float],
    steps: Sequence[int],
    intervals: Sequence[tuple[float, float]],
    seed: int,
) -> list[dict[str, Any]]:
    """Measure every setting of the grid, unguided ones (scale up to 1) once, since the interval has no effect there."""
    grid = [
        SamplingSettings(count, scale, seed, interval if scale > 1 else EVERYWHERE)
        for count, interval, scale in itertools.product(steps, intervals, guidance)
    ]
    return [
        {
            "steps": each.steps,
            "guidance_scale": each.guidance_scale,
            "guidance_interval": list(each.guidance_interval),
            **measure(each),
        }
        for each in dict.fromkeys(grid)
    ]


def choose(rows: Sequence[dict[str, Any]], on: Sequence[str]) -> dict[str, Any]:
    """The setting that remains after the three rules.

    Args:
        on: the prompt sets whose retrieval counts, one after the other.
    """
    remaining = list(rows)
    for name in on:
        best = max((row["found"][name] for row in remaining), key=sum)
        remaining = [row for row in remaining if mcnemar_p_value(row["found"][name], best) > SIGNIFICANCE]
    smallest = min((row["kid"] for row in remaining), key=lambda kid: kid["value"])
    limit = smallest["value"] + smallest["standard_error"]
    remaining = [row for row in remaining if row["kid"]["value"] <= limit]
    chosen = min(remaining, key=lambda row: (row["evaluations"], row["guidance_scale"], row["steps"]))
    names = {"num_inference_steps": "steps", **{name: name for name in ("guidance_scale", "guidance_interval")}}
    return {name: chosen[key] for name, key in names.items()}


def mcnemar_p_value(found: Sequence[bool], best: Sequence[bool]) -> float:
    """The probability that a setting as good as the best loses this many of the prompts found by one of both only."""
    lost = sum(b and not a for a, b in zip(found, best, strict=True))
    discordant = sum(a != b for a, b in zip(found, best, strict=True))
    return sum(math.comb(discordant, k) for k in range(lost, discordant + 1)) / 2**discordant
