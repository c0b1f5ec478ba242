"""A pipeline in a folder of half the size: weights in fp16 on disk, computed in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from ldm.models.lora import in_order


def export(pipeline: Any, folder: Path) -> int:
    """Save an LDMPipeline with its weights in fp16; returns the bytes in the folder.

    It computes in float32 unless whoever loads it asks for another dtype, in stock diffusers as well: only the files
    are smaller. Rounding moves a weight by at most 1 / 2048 of itself, one below 6e-5 by at most 3e-8.

    Raises:
        ValueError: if the folder holds anything, or a weight is too large for fp16.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected an empty folder or none; it would be mixed with what is there")
    # not `pipeline.half()`, whose configs would have transformers compute in fp16, which diffusers' U-Net does not
    pipeline.save_pretrained(folder)
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        weights = load_file(path)
        halves = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
        for name, half in halves.items():
            if half.is_floating_point() and not bool(torch.isfinite(half).all()):
                raise ValueError(f"{path.relative_to(folder)}: {name} has values that fp16 can't hold")
        path.write_bytes(in_order(save(halves, metadata={"format": "pt", **notes})))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
