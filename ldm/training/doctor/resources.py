"""What a run needs of the machine, against what is there: room on its disks, memory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ldm.system.files import gib
from ldm.system.memory import peak_bytes
from ldm.training.doctor.findings import Finding
from ldm.training.task import Task, float32_bytes

FULL = 0.9  # of the memory that is there; what else runs needs some, too


def needs(task: Task) -> dict[str, int]:
    """Bytes that a run of a task writes, by what for; of what replaces itself, two at the moment of writing."""
    trial = replace(task)
    trial.build()
    sizes = [float32_bytes(state.module, learned=True) for state in trial.train_state.values()]
    kept = [1 + 2 * (state.optimizer is not None) + len(state.averages) for state in trial.train_state.values()]
    widths, recipe = len(next(iter(trial.train_state.values())).powers), task.recipe
    task.accelerator.free_memory()
    found = {
        "checkpoints": sum(size * times for size, times in zip(sizes, kept)) * (task.config.loop.keep + 1),
        task.result: 2 * sizes[0],
    }
    if widths:
        found["averages"] = sizes[0] * widths * (recipe.steps // recipe.ema_snapshot_every + 1)
    for name, size in task.other_needs().items():
        found[name] = found.get(name, 0) + size
    return found


def disk(task: Task) -> Finding:
    """What is written, against what is free on the disk of the run and on that of the cache."""
    config, check = task.config, f"{task.title} disk"
    run, cache = nearest_folder(Path(config.run)), nearest_folder(config.cache_folder() or Path(config.run))
    shares: dict[Path, dict[str, int]] = {run: {}, cache: {}} if run.stat().st_dev != cache.stat().st_dev else {run: {}}
    for what, size in needs(task).items():
        shares[cache if what == "cache" and cache in shares else run][what] = size
    message, fits = [], True
    for folder, sizes in shares.items():
        free = shutil.disk_usage(folder).free
        each = ", ".join(f"{gib(size)} for {what}" for what, size in sizes.items())
        message.append(f"{gib(sum(sizes.values()))} ({each}); {gib(free)} are free in {folder}")
        fits = fits and sum(sizes.values()) <= free
    written = f"a run writes {' and '.join(message)}"
    if fits:
        return Finding("ok", check, written)
    return Finding("problem", check, f"{written}; name a folder on a larger disk as run, or as data.cache, or set "
                   "loop.keep lower")  # fmt: skip


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = path.absolute()
    return path if path.exists() else nearest_folder(path.parent)


def memory(device: torch.device, check: str, smaller: str) -> Finding:
    """The peak memory of this process, which has taken real steps; `smaller` is how to need less."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        held = torch.cuda.max_memory_allocated(device)
        return _fits(held, free + torch.cuda.memory_reserved(device), f"of {gib(whole)} on the GPU", check, smaller)
    held = peak_bytes()
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
    except OSError:  # not Linux
        return Finding("ok", check, f"{gib(held)} at most")
    return _fits(held, int(lines["MemAvailable"].split()[0]) * 1024 + held, "on this machine", check, smaller)


def _fits(held: int, there: int, where: str, check: str, smaller: str) -> Finding:
    message = f"{gib(held)} at most, {gib(there)} are there {where}"
    if held <= FULL * there:
        return Finding("ok", check, message)
    return Finding("warning", check, f"{message}; {smaller}")
