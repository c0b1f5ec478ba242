"""Edit a picture: noise it by `strength`, then denoise it towards another prompt (SDEdit, Meng et al. 2022).

python examples/edit.py [MODEL] [FOLDER]
"""

import sys
from pathlib import Path

from ldm import LDMPipeline


def main(model: str = "models/emoji", folder: str = "edited") -> None:
    pipe = LDMPipeline.from_pretrained(model)
    before = pipe("red heart", seed=7).images[0]
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "seed": 7}
    after = pipe("blue heart", image=before, strength=0.9, **settings).images[0]  # as stock's img2img, bit for bit
    Path(folder).mkdir(parents=True, exist_ok=True)
    before.save(f"{folder}/before.png")
    after.save(f"{folder}/after.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
