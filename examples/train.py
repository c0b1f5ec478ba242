"""Train from Python: captioned pictures => RUN/pipeline, which LDMPipeline and stock diffusers open.

    python examples/train.py my_pictures runs/mine --config demo loop.steps=500

What follows the two folders is what `ldm train` takes. Run it again to resume.
"""

import sys

from ldm import LDMPipeline
from ldm.cli.config import parse_config
from ldm.training.run import train


def main(source: str, run: str, *words: str) -> None:
    config = parse_config([*words, f"data.source={source}", f"run={run}"])
    train("vae", config)  # pictures => RUN/vae, finished at once if it is there
    losses = train("ldm", config)  # its latents and captions => RUN/pipeline
    print(f"{len(losses)} steps, the last loss {losses[-1]:.3f}" if losses else "nothing was left to train")

    pipe = LDMPipeline.from_pretrained(f"{config.run}/pipeline")
    pictures = pipe(config.loop.prompts or pipe.example_prompts[:4], seed=0).images
    for i, picture in enumerate(pictures):
        picture.save(f"{config.run}/example-{i}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
