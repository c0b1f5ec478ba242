"""`--lora FOLDER[:WEIGHT]`, for every command that generates."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY_LORA = ("models/*/pytorch_lora_weights.safetensors", "runs/*/lora/pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class Named:
    """A LoRA as it was typed: a run, a folder, a file or a Hub id, and how much it counts."""

    source: str
    scale: float = 1.0


def lora(text: str) -> Named:
    """FOLDER[:WEIGHT] => both."""
    source, colon, weight = text.rpartition(":")
    if not colon:
        return Named(os.path.expanduser(text))
    try:
        scale = float(weight)
    except ValueError:
        if os.path.exists(os.path.expanduser(source)) and not os.path.exists(os.path.expanduser(text)):
            raise argparse.ArgumentTypeError(f"{text!r}: the weight {weight!r} is no number") from None
        return Named(os.path.expanduser(text))  # the colon is part of the name
    if not source or not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FOLDER or FOLDER:WEIGHT, for example runs/ink/lora:0.8")
    return Named(os.path.expanduser(source), scale)


def add_lora_option(add: Callable[..., Any]) -> None:
    """Add --lora, which may be repeated."""
    add(
        "--lora",
        type=lora,
        action="append",
        metavar="FOLDER[:WEIGHT]",
        help="a LoRA beside the model (RUN/lora, a file or a Hub id), and how much it counts; may be repeated",
    )


def check_lora_engine(arguments: argparse.Namespace) -> None:
    """Refuse adapters with an engine that doesn't know them."""
    if arguments.lora and arguments.engine == "openvino":
        raise ValueError(
            "--lora: OpenVINO does not support adapters; merge them first: ldm export MODEL FOLDER --lora …"
        )


def load_loras(pipeline: Any, named: Sequence[Named] | None, steps: int | None = None) -> None:
    """Load LoRAs into a pipeline and set their scales; what there is to warn of is printed.

    Args:
        steps: the sampling steps that were named; None for a remark on what a LoRA of few steps wants.
    Raises:
        ValueError: for a LoRA of another model.
    """
    if not named:
        return
    from ldm.models.lora_files import OtherBaseWarning, find_lora, read_lora

    sources = [os.path.realpath(one.source) for one in named]
    twice = next((one.source for one in named if sources.count(os.path.realpath(one.source)) > 1), None)
    if twice is not None:
        raise ValueError(f"--lora: {twice} is named twice; give it one weight: --lora {twice}:2")
    names: dict[str, float] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OtherBaseWarning)
        for one in named:
            name = unused_name(one.source, names)
            pipeline.load_lora_weights(one.source, adapter_name=name)
            names[name] = one.scale
            facts = read_lora(find_lora(one.source)).facts
            if (trained := facts.get("few_steps")) and steps is None:
                print(
                    f"note: {one.source} is a LoRA of {trained} steps without guidance: --steps {trained} "
                    f"--guidance-scale 1 --sampler {facts.get('sampler', 'ddim')}",
                    file=sys.stderr,
                )
    for warning in caught:
        if issubclass(warning.category, OtherBaseWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    pipeline.set_adapters(list(names), list(names.values()))


def load_by_hash(pipeline: Any, wanted: Sequence[dict[str, Any]], picture: Path) -> None:
    """Load the adapters that a picture was made with, found by their hashes among models/ and runs/.

    Args:
        wanted: `Settings.adapters`.
        picture: for the errors.
    Raises:
        ValueError: naming the one that isn't there.
    """
    from ldm.models.lora import active_adapters

    files = [str(path) for pattern in EVERY_LORA for path in sorted(Path().glob(pattern))]
    for one in wanted:
        name = one["name"]
        if one["scale"] is None:
            raise ValueError(f"{picture}: its LoRA {name} counted otherwise in each layer, which the file doesn't hold")
        for file in files:
            try:
                pipeline.load_lora_weights(file, adapter_name=name)
            except ValueError:
                continue  # of another model
            pipeline.set_adapters([name], [1.0])
            if [adapter.sha256 for adapter in active_adapters(pipeline)] == [one["sha256"]]:
                break
            pipeline.delete_adapters([name])
        else:
            tried = ", ".join(files) or "there are none"
            raise ValueError(
                f"{picture}: it was made with the LoRA {name} (SHA-256 {one['sha256'][:12]}…), which is not in models/ "
                f"or runs/ ({tried}); name it with --lora"
            )
    pipeline.set_adapters([one["name"] for one in wanted], [one["scale"] for one in wanted])


def unused_name(source: str, taken: dict[str, float]) -> str:
    """A name for an adapter: that of its folder or run."""
    path = Path(source)
    path = path.parent if path.suffix == ".safetensors" else path
    path = path.resolve() if path.exists() else path
    name = (path.parent.name if path.name == "lora" else path.name).replace(".", "-") or "lora"
    return next(one for one in (name, *(f"{name}-{i}" for i in range(2, 100))) if one not in taken)
