"""What the device can do, and which precision follows from it."""

from __future__ import annotations

import os
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from ldm.devices import cpu_is_faster_in_bf16
from ldm.training.config import LoopConfig
from ldm.training.heap import keep_freed_memory

Precision = Literal["no", "bf16", "fp16"]


def build_accelerator(config: LoopConfig) -> Accelerator:
    """An Accelerator for the device it finds, with the config's precision and threads resolved for that device."""
    # told `cpu`, accelerate makes torchrun's processes a gloo group; not told, each would believe it is alone
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    if cpu:
        # `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1, which leaves all cores but one idle
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(config.threads or max(1, usable_cores() // processes))
        keep_freed_memory()
    precision = choose_precision(config.precision, state.device)
    if cpu:  # where it was measured, by processes in each other's way
        [precision] = broadcast_object_list([precision])
    return Accelerator(cpu=cpu, mixed_precision=precision)


def encoding_dtype(accelerator: Accelerator) -> torch.dtype:
    """What VAE and text encoder encode in: bf16 where the run's steps multiply in it, else float32.

    Never fp16: what trained networks hold inside stays within its range only by luck (best_dtype).
    """
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """`loop.precision` => accelerate's mixed_precision.

    auto is bf16 where the hardware multiplies it faster (on a CPU that is measured), else fp16 on older GPUs, else
    fp32.

    Raises:
        ValueError: if fp16 is asked for on a CPU, which can't train in it.
    """
    if wanted == "fp32":
        return "no"
    if wanted == "bf16":
        return "bf16"
    if wanted == "fp16":
        if device.type == "cpu":
            raise ValueError("loop.precision: fp16 can't train on a CPU; use bf16, fp32 or auto")
        return "fp16"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if device.type == "cpu" and cpu_is_faster_in_bf16():
        return "bf16"
    return "no"
