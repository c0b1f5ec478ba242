"""`ldm train vae | ldm | distill | classifier`: run a training, or resume it.

train/train_vae.py, train_ldm.py, train_distill.py and train_classifier.py are the same, for `accelerate launch`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from ldm.cli.parser import Command
from ldm.cli.recipes import recipes
from ldm.pipelines import import_networks
from ldm.system.importing import quiet_libraries

TASKS = {
    "vae": "Train the autoencoder on the pictures of data.source and save it, normalized, in RUN/vae.",
    "ldm": "Train the diffusion model on the captioned pictures of data.source and save it in RUN/pipeline. It needs a "
    "VAE: `ldm train vae` with the same recipe trains one, vae=<folder or Hub id> names a pretrained one.",
    "distill": "Train a student of the model that init names, which generates in one to four evaluations of the U-Net, "
    "and save it in RUN/pipeline.",
    "classifier": "Train a classifier of noisy latents on data.label_column and save it in RUN/classifier. It steers "
    "sampling: ldm sample … --classifier RUN/classifier --class-label NAME.",
}
RESUMING = "A stopped run resumes from its newest checkpoint when the same command is run again."


def train(task: str, config: Any) -> list[float]:
    """Run the training of this name with a Config; returns the loss of each step that this call trained."""
    from ldm.training import run

    return run.train(task, config)


def start(task: str, words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train as the command line (by default sys.argv) says, and end the program as `ldm.cli.config.start` does."""
    quiet_libraries()
    import_networks()
    from ldm.cli import config

    config.start(partial(train, task), f"{TASKS[task]} {RESUMING}", words, prog)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS, help="what to train; `ldm train TASK --help` lists every key")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="--config RECIPE [KEY=VALUE …]",
        help=f"a YAML file or the name of a recipe that comes with ldm ({', '.join(recipes())}), and dotted keys that "
        "override it",
    )


def run(arguments: argparse.Namespace) -> None:
    start(arguments.task, arguments.words, f"ldm train {arguments.task}")


COMMAND = Command(
    "train the autoencoder, the diffusion model, a student of few steps, or a classifier; run it again to resume",
    """
ldm train vae --config demo
ldm train ldm --config demo
ldm train ldm --config my_recipe.yaml data.source=~/pictures run=runs/mine optim.lr=3e-4
ldm train ldm --config demo --print_config                                (the whole recipe)
accelerate launch --num_processes 4 --module ldm.cli.main train ldm --config base256   (several GPUs)""",
    add_arguments,
    run,
)
