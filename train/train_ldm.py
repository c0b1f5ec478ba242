"""Train a text-to-image model on a folder of captioned pictures.

    accelerate launch train/train_ldm.py --config configs/demo.yaml
    accelerate launch train/train_ldm.py --config configs/demo.yaml data.source=my_pictures run=runs/mine optim.lr=3e-4

It needs a VAE: train/train_vae.py with the same config makes one, or vae=<folder or Hub id> names one.
Stopped, it goes on from its newest checkpoint when the same command is given again. RUN/pipeline can be
loaded at any time, by LDMPipeline and by stock diffusers.
"""

from functools import partial

from ldm.cli.config import start
from ldm.training.run import train

main = partial(train, "ldm")

if __name__ == "__main__":
    start(main, __doc__)
