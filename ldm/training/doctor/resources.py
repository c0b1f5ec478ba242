"""What a run needs of the machine, against what is there: room on its disks, memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ldm.data.cache.latents import context_kind, posterior_kind
from ldm.data.conditioned import ConditionedPictures
from ldm.system.files import gib
from ldm.system.memory import peak_bytes
from ldm.training.config import Config
from ldm.training.doctor.findings import Finding
from ldm.training.encoders import Encoders

FULL = 0.9  # of the memory that is there; what else runs needs some, too


def network_needs(config: Config, weights: int, moments: int, other: int, name: str) -> dict[str, int]:
    """Bytes that checkpoints and what is made of them take, one on its way counted in.

    Args:
        weights, other: of the network, and of those that are saved beside it, once.
        moments: how often a checkpoint holds the weights: itself, averages, moments of the optimizer.
    """
    return {"checkpoints": moments * weights * (config.loop.keep + 1), name: 2 * weights + other}


def cache_needs(
    config: Config, source: ConditionedPictures, encoders: Encoders, shape: tuple[int, int, int]
) -> dict[str, int]:
    """Bytes that the cache of latents and contexts takes."""
    if config.data.cache == "off":
        return {}
    text, told, data = encoders.text_outline, encoders.fingerprints, config.data
    posterior = posterior_kind(told["vae"], shape, data.size, data.background)
    size = len(source.train.all_pictures) * posterior.disk_size * (2 if data.flip else 1)
    if text:
        captions = {caption for row in source.train.pictures for caption in row.captions}
        of_caption = context_kind(told["text"], (text.tokenizer.model_max_length, text.dim))
        size += len(captions) * of_caption.disk_size
    return {"cache": size}


def disk(config: Config, needs: dict[str, int], check: str) -> Finding:
    """What is written, against what is free on the disk of the run and on that of the cache."""
    run, cache = nearest_folder(Path(config.run)), nearest_folder(config.cache_folder() or Path(config.run))
    shares: dict[Path, dict[str, int]] = {run: {}, cache: {}} if run.stat().st_dev != cache.stat().st_dev else {run: {}}
    for what, size in needs.items():
        shares[cache if what == "cache" and cache in shares else run][what] = size
    told, fits = [], True
    for folder, sizes in shares.items():
        free = shutil.disk_usage(folder).free
        each = ", ".join(f"{gib(size)} for {what}" for what, size in sizes.items())
        told.append(f"{gib(sum(sizes.values()))} ({each}); {gib(free)} are free in {folder}")
        fits = fits and sum(sizes.values()) <= free
    said = f"a run writes {' and '.join(told)}"
    if fits:
        return Finding("ok", check, said)
    return Finding("problem", check, f"{said}; name a folder on a larger disk as run, or as data.cache, or set "
                   "loop.keep lower")  # fmt: skip


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = path.absolute()
    return path if path.exists() else nearest_folder(path.parent)


def memory(device: torch.device, check: str, smaller: str) -> Finding:
    """The most that this process, which has taken real steps, has held; `smaller` says how to need less."""
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
    told = f"{gib(held)} at most, {gib(there)} are there {where}"
    if held <= FULL * there:
        return Finding("ok", check, told)
    return Finding("warning", check, f"{told}; {smaller}")
