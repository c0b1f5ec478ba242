"""Draws with stock diffusers, in a process that never imports ldm: `python stock_draws.py CASES.json`.

Each case names a pipeline folder, a scheduler, the arguments of the call, a seed and the .npy to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch


def main() -> None:
    loaded: dict[tuple[str, str], tuple[Any, Any]] = {}
    for case in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        key = (case["class"], case["folder"])
        if key not in loaded:
            pipe = getattr(diffusers, case["class"]).from_pretrained(case["folder"], use_safetensors=True)
            assert type(pipe) is diffusers.StableDiffusionPipeline, type(pipe)
            pipe.set_progress_bar_config(disable=True)
            loaded[key] = pipe, pipe.scheduler
        pipe, saved = loaded[key]
        swapped = case["scheduler"] or type(saved).__name__
        pipe.scheduler = getattr(diffusers, swapped).from_config(saved.config)
        generator = torch.Generator().manual_seed(case["seed"])
        np.save(case["out"], pipe(generator=generator, output_type="np", **case["arguments"]).images)
    assert "ldm" not in sys.modules
    print("drawn without ldm")


if __name__ == "__main__":
    main()
