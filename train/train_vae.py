"""Train the autoencoder: the same as `ldm train vae`, for `accelerate launch`.

accelerate launch train/train_vae.py --config configs/demo.yaml data.source=my_pictures run=runs/mine
"""

from functools import partial

from ldm.cli.train import start, train

main = partial(train, "vae")

if __name__ == "__main__":
    start("vae")
