"""What a value of the config may be."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

DTYPES = ("float32", "bfloat16", "float16")  # that networks may compute in
LONGEST = 4096  # characters of a text
LARGEST = 2**63 - 1  # what C and torch call an int
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


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


def check_plain(cls: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a ValueError for what no key of this dataclass may be, whatever its meaning.

    A section is a mapping; null is for keys that say so; numbers are finite and fit in 64 bits; texts are short and
    hold nothing that ends a path, steers a terminal or can't be encoded.
    """
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        name, kind, value = prefix + item.name, hints[item.name], values[item.name]
        if dataclasses.is_dataclass(kind):
            if not hasattr(value, "__dict__") and not isinstance(value, Mapping):
                raise ValueError(f"{name}: expected keys below it, such as {name}.{dataclasses.fields(kind)[0].name}")
            check_plain(kind, value if isinstance(value, Mapping) else vars(value), f"{name}.")
        elif value is None:
            if NoneType not in get_args(kind):
                raise ValueError(f"{name}: expected a value, got null")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                _check_value(name, one)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {value}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name}: expected a number of at most 64 bits, got one of {len(str(value))} digits")
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"{name}: expected at most {LONGEST} characters, got {len(value):,}")
        if found := _UNPRINTABLE.search(value):
            raise ValueError(f"{name}: holds U+{ord(found.group()):04X}, which no name or prompt can hold")
