"""`ldm export`: a model into a folder of half the size, to keep or to give away."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.pipelines import import_networks

if TYPE_CHECKING:
    from ldm.pipelines.text_to_image import LDMPipeline

EXAMPLE = "ldm export runs/demo models/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm export`."""
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run or a pipeline folder")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the folder to make")


def run(arguments: argparse.Namespace) -> None:
    """Export."""
    import_networks()
    from ldm.cli.evaluate import find_model, run_of
    from ldm.evaluation.run_record import record_run
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.sharing.redaction import without_places

    folder, _, config = find_model(arguments.model)
    size = export(LDMPipeline.from_pretrained(folder), arguments.out)
    if config:
        config = without_places(config, [config.get("run"), config.get("data", {}).get("source")])
    record_run(arguments.out, *run_of(folder), config)  # for `ldm evaluate` to tell
    print(f"{arguments.out} holds {size / 1e6:.1f} MB; draw with: ldm sample {arguments.out}")


def export(pipeline: LDMPipeline, folder: Path) -> int:
    """Save a pipeline with its weights in fp16; returns the bytes in the folder.

    What it computes in stays float32 unless the one who loads it asks for another dtype, in stock diffusers as well:
    only the files are smaller. Rounding moves a weight by at most 1 / 2048 of itself, one below 6e-5 by at most 3e-8.

    Raises:
        ValueError: if the folder holds anything, or a weight is too large for fp16.
    """
    import torch
    from safetensors.torch import load_file, save_file

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected an empty folder or none; it would be mixed with what is there")
    # not `pipeline.half()`, whose configs would have transformers compute in fp16, which diffusers' U-Net does not
    pipeline.save_pretrained(folder)
    for path in sorted(folder.rglob("*.safetensors")):
        weights = load_file(path)
        halves = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
        for name, half in halves.items():
            if half.is_floating_point() and not bool(torch.isfinite(half).all()):
                raise ValueError(f"{path.relative_to(folder)}: {name} has values that fp16 can't hold")
        save_file(halves, path, metadata={"format": "pt"})
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
