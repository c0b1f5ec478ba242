"""Generate pictures: prompts, seeds, settings, samplers.

python examples/sample.py [MODEL] [FOLDER]
"""

import sys
from pathlib import Path

from ldm import LDMPipeline


def main(model: str = "models/emoji", folder: str = "samples") -> None:
    pipe = LDMPipeline.from_pretrained(model).to_best_device()
    Path(folder).mkdir(parents=True, exist_ok=True)

    # the model's own defaults; picture i has seed + i
    for i, picture in enumerate(pipe(["red heart", "cat face"], seed=7).images):
        picture.save(f"{folder}/default-{i}.png")

    # once a setting is named, the call is that of stock diffusers, and so is the picture
    named = pipe("red heart", num_inference_steps=20, guidance_scale=3.0, negative_prompt="blue", seed=7)
    named.images[0].save(f"{folder}/named.png")

    # four pictures of one prompt
    for i, picture in enumerate(pipe("cat face", num_images_per_prompt=4, seed=0).images):
        picture.save(f"{folder}/seed-{i}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
