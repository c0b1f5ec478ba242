"""What a number of the config may be."""

from __future__ import annotations

import math


def check(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a ValueError that names the key and what it allows, unless `value` is finite and within the bounds."""
    bounds = [
        (at_least, lambda bound: value >= bound, "at least"),
        (above, lambda bound: value > bound, "above"),
        (at_most, lambda bound: value <= bound, "at most"),
        (below, lambda bound: value < bound, "below"),
    ]
    set_bounds = [(bound, holds, words) for bound, holds, words in bounds if bound is not None]
    if not math.isfinite(value) or not all(holds(bound) for bound, holds, _ in set_bounds):
        allowed = " and ".join(f"{words} {bound:g}" for bound, _, words in set_bounds)
        raise ValueError(f"{name}: expected a number {allowed}, got {value}")
