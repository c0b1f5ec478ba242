"""Which device draws, and in which numbers."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch

from ldm.system.checks import DTYPES

BF16_GAIN = 1.25  # how many times as fast a matrix product in bf16 must be for bf16 to be worth its casts
GAIN_TURNS = 10


def best_device() -> torch.device:
    """CUDA or Apple's GPU where there is one, else the CPU."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return torch.device("cuda" if cuda else "mps" if mps else "cpu")


def dtype(name: str) -> torch.dtype:
    """The dtype of a name; raises a ValueError for one that pictures aren't drawn in."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)  # type: ignore[no-any-return]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it faster, else float32.

    Pictures drawn in bfloat16 differ a little from those drawn in float32 (docs/experiments.md, 13). float16 is
    never chosen: its range is that of a trained network's activations only by luck.
    """
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        fast = device.type == "cpu" and cpu_is_faster_in_bf16()
    return torch.bfloat16 if fast else torch.float32


@cache
def cpu_is_faster_in_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware, and measurably faster than float32.

    There is the first without the second: on a Xeon with avx512_bf16 whose AMX was switched off, products in bf16 ran
    at half the speed of float32 (docs/experiments.md, 30). Looking takes some 30 ms, once in a process.
    """
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:  # not Linux
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16"}) and bf16_gain() >= BF16_GAIN


def bf16_gain() -> float:
    """How many times as fast as in float32 a square matrix product is in bf16 on this CPU.

    The fastest of several, in turns: other programs can only make one slower. It is as large as torch's threads make
    it, 512 x 512 for two, so that each of many has enough to do.
    """
    dtypes = (torch.float32, torch.bfloat16)
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in dtypes}
    edge = 64 * round(6.4 * torch.get_num_threads() ** (1 / 3))
    factors = {kind: torch.ones(edge, edge, dtype=kind) for kind in dtypes}
    for _ in range(GAIN_TURNS):
        for kind in dtypes:
            started = time.perf_counter()
            torch.mm(factors[kind], factors[kind])
            seconds[kind].append(time.perf_counter() - started)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])
