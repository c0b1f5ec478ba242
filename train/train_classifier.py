"""Train a classifier of noisy latents: the same as `ldm train classifier`, for `accelerate launch`.

accelerate launch train/train_classifier.py --config configs/openmoji64.yaml data.label_column=group
"""

from functools import partial

from ldm.cli.train import start, train

main = partial(train, "classifier")

if __name__ == "__main__":
    start("classifier")
