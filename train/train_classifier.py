"""Train a classifier of noisy latents, which steers what a model draws, and leave it in RUN/classifier.

    accelerate launch train/train_classifier.py --config configs/openmoji64.yaml data.label_column=group
    ldm sample runs/openmoji64/pipeline "pizza" --classifier runs/openmoji64/classifier --class-label food-drink

It reads the config of train_ldm.py: the same pictures, VAE and noise schedule, so that it sees what the U-Net sees.
Stopped, it goes on from its newest checkpoint when the same command is given again.
"""

from functools import partial

from ldm.cli.config import start
from ldm.training.run import train

main = partial(train, "classifier")

if __name__ == "__main__":
    start(main, __doc__)
