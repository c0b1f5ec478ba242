"""Train the diffusion model: the same as `ldm train ldm`, for `accelerate launch`.

accelerate launch train/train_ldm.py --config configs/demo.yaml data.source=my_pictures run=runs/mine
"""

from functools import partial

from ldm.cli.train import start, train

main = partial(train, "ldm")

if __name__ == "__main__":
    start("ldm")
