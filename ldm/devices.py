"""Which device draws, and in which numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.defaults import DTYPES


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
        fast = device.type == "cpu" and cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (amx_bf16 or avx512_bf16); without it bf16 is slower than fp32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:  # not Linux
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16"})
