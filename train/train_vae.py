"""Train an autoencoder on a folder of pictures and leave it, normalized, in RUN/vae.

    accelerate launch train/train_vae.py --config configs/demo.yaml
    accelerate launch train/train_vae.py --config configs/demo.yaml data.source=my_pictures run=runs/mine

train/train_ldm.py takes the same config and trains on this VAE's latents. Stopped, it goes on from its
newest checkpoint when the same command is given again; a finished run trains no further.
"""

from functools import partial

from ldm.cli.config import start
from ldm.training.run import train

main = partial(train, "vae")

if __name__ == "__main__":
    start(main, __doc__)
