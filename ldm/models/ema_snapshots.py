"""Snapshots of power-function averages, and the average of any width that is rebuilt from them (power_ema.py).

    RUN/ema_snapshots/step_0001000/
        0.05.safetensors  0.1.safetensors  manifest.json

Weights are kept in float32: an average narrower than those that were kept is a difference of snapshots, which
multiplies the rounding of fp16 by ten and more.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.models.power_ema import WIDEST, coefficients, exponent
from ldm.models.unet import without_variance
from ldm.system.files import check_room, put_in_place, temporary_beside
from ldm.system.hashing import fault, write_manifest

FOLDER = "ema_snapshots"
MANIFEST_ROOM = 1 << 16  # bytes, generously


def snapshots(run: Path) -> dict[int, Path]:
    """The folders of a run's snapshots by their steps, ascending."""
    found = {path: re.fullmatch(r"step_(\d{7,})", path.name) for path in (run / FOLDER).glob("step_*")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def write_snapshot(run: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a snapshot, whole or not at all.

    Args:
        averages: {width: {weight: tensor}}.
    Raises:
        OSError, SafetensorError: if the disk is full or fails; nothing is left.
    """
    final = run / FOLDER / f"step_{step:07d}"
    temporary = temporary_beside(final)
    try:
        check_room(run, sum(t.nbytes for weights in averages.values() for t in weights.values()) + MANIFEST_ROOM)
        for width, weights in averages.items():
            tensors = {name: weight.float().contiguous() for name, weight in weights.items()}
            save_file(tensors, temporary / f"{width}.safetensors")
        write_manifest(temporary)
        put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def drop_snapshots(run: Path, after: int) -> None:
    """Delete those of steps that a resumed run takes again, and what a killed process left."""
    for step, path in snapshots(run).items():
        if step > after:
            shutil.rmtree(path)
    for left in (run / FOLDER).glob(".step_*"):
        shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class Rebuilt:
    """The average of a width.

    Attributes:
        weights: by name, float32.
        width: that was wanted.
        step: that it ends at.
        left: how much of its profile the snapshots miss, as a share; above some 0.1 it is another average.
    """

    weights: dict[str, Tensor]
    width: float
    step: int
    left: float


def rebuild(run: Path, width: float) -> Rebuilt:
    """The average of any width at the last snapshot of a run (Karras et al. 2024, algorithm 3).

    One weight after the other is read of all snapshots, so it takes little memory.

    Raises:
        FileNotFoundError: without snapshots.
        ValueError: for a width that no average has, or a snapshot that is damaged.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"--ema: a width is above 0 and at most {WIDEST:.4f}, got {width:g}")
    folders = snapshots(run)
    if not folders:
        raise FileNotFoundError(
            f"--ema: {run} has no snapshots of averages in {FOLDER}; train it with 'optim.ema_widths=[0.05, 0.1]'"
        )
    for path in folders.values():
        wrong = fault(path)
        if wrong is not None:
            raise ValueError(f"--ema: the snapshot {path} is damaged: {wrong}; delete it, the others will do")
    files = {
        (step, exponent(float(file.stem))): file
        for step, folder in folders.items()
        for file in sorted(folder.glob("*.safetensors"))
    }
    step = max(folders)
    shares, left = coefficients(list(files), step, exponent(width))
    opened = [_open(file) for file in files.values()]
    weights = {}
    for name in opened[0].keys():  # noqa: SIM118 (no dict)
        total = torch.zeros(opened[0].get_slice(name).get_shape(), dtype=torch.float64)
        for share, file in zip(shares.tolist(), opened, strict=True):
            total.add_(file.get_tensor(name), alpha=share)
        weights[name] = total.float()
    return Rebuilt(weights, width, step, left)


def put_into(unet: Any, rebuilt: Rebuilt) -> None:
    """Give a pipeline's U-Net these weights; channels that learn a variance are left out, as in pipelines.

    Raises:
        ValueError: if they are another network's.
    """
    weights = without_variance(rebuilt.weights, unet.config.out_channels)
    shapes = {name: weight.shape for name, weight in unet.state_dict().items()}
    if {name: weight.shape for name, weight in weights.items()} != shapes:
        raise ValueError("--ema: the snapshots are of another network than the pipeline's U-Net")
    unet.load_state_dict(weights)


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")
