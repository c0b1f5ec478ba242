"""Train a student of few steps: the same as `ldm train distill`, for `accelerate launch`.

accelerate launch train/train_distill.py --config configs/distill.yaml init=my_model data.source=my_pictures
"""

from functools import partial

from ldm.cli.train import start, train

main = partial(train, "distill")

if __name__ == "__main__":
    start("distill")
