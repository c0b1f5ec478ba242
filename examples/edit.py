"""Edit a picture: noise it by `strength`, then denoise it towards another prompt (SDEdit, Meng et al. 2022).

python examples/edit.py [MODEL] [FOLDER]
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image

from ldm import LDMPipeline


def main(model: str = "models/openmoji64", folder: str = "edited") -> None:
    pipe = LDMPipeline.from_pretrained(model)
    before = pipe("red heart", seed=7).images[0]
    edit = AutoPipelineForImage2Image.from_pipe(pipe)  # a stock pipeline of the same networks
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    after = edit("blue heart", image=before, strength=0.7, **settings).images[0]
    Path(folder).mkdir(parents=True, exist_ok=True)
    before.save(f"{folder}/before.png")
    after.save(f"{folder}/after.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
