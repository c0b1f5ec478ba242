"""Train a classifier of noisy latents, which steers what a model draws, and leave it in RUN/classifier.

    accelerate launch train/train_classifier.py --config configs/openmoji64.yaml data.label_column=group
    ldm sample runs/openmoji64/pipeline "pizza" --classifier runs/openmoji64/classifier --class-label food-drink

It reads the config of train_ldm.py: the same pictures, VAE and noise schedule, so that it sees what the U-Net sees.
Stopped, it goes on from its newest checkpoint when the same command is given again.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from ldm.cli.config import start
from ldm.training.config import Config


def main(config: Config) -> list[float]:
    """Train and save the classifier; returns the loss of each step that this call trained."""
    import numpy as np
    import torch

    from ldm.data.dataset import read_captioned
    from ldm.data.labels import Labels
    from ldm.data.rows import count
    from ldm.models.classifier import build_classifier
    from ldm.models.vae import latent_shape
    from ldm.training.caching import build_cache
    from ldm.training.distributed import build_accelerator, encoding_dtype
    from ldm.training.doctor.examine import before_classifier, before_first_step
    from ldm.training.encoders import Encoders
    from ldm.training.latents import check_scale, load_normalized, measure_pretrained
    from ldm.training.logging import Tracker
    from ldm.training.objective import build_schedule
    from ldm.training.plain_loop import fit_plain
    from ldm.training.tasks.classifier import ClassifierTraining, LabelledSamples, labelled_questions

    data = config.data
    if data.label_column is None:
        raise ValueError("data.label_column: the classifier needs to know which column holds the classes; set it")
    accelerator = build_accelerator(config.loop)
    say, told = accelerator.print, accelerator.is_main_process

    # folder => pictures and labels, all of them checked
    pictures = read_captioned(data.source, **data.reading(), progress=told)
    labels = Labels.read(pictures, data.label_column)
    ids = labels.ids(pictures.train)
    say(f"{data.source}: {count(len(ids), 'picture')} to train on, {len(pictures.heldout)} held out")
    per_label = np.bincount(ids, minlength=len(labels.names))
    frequent, share = labels.names[per_label.argmax()], per_label.max() / len(ids)
    say(f"{labels.column}: {len(labels.names)} classes, the most frequent {frequent} with {share:.1%} of the pictures")

    # the frozen VAE, the process, and the classifier
    device, dtype = accelerator.device, encoding_dtype(accelerator)
    measure_pretrained(config, pictures.train, device, dtype)
    encoders = Encoders(lambda: load_normalized(config, device), None, dtype)
    vae = encoders.vae
    check_scale(vae, pictures.train, data.size)
    schedule = build_schedule(config.diffusion)
    shape = latent_shape(vae, data.size)
    build = partial(build_classifier, config.classifier, latent_shape=shape, names=labels.names, schedule=schedule)
    fresh = LabelledSamples(pictures.train, ids, data, config.seed, schedule.T, shape, None)
    look = partial(before_classifier, config, accelerator, fresh, build, vae)
    before_first_step(config, accelerator, Path(config.run) / "classifier_checkpoints", look)
    torch.manual_seed(config.seed)
    classifier = build()
    say(
        f"classifier: {sum(p.numel() for p in classifier.parameters()) / 1e6:.1f} M parameters, latents "
        f"{list(shape)}, {accelerator.mixed_precision} mixed precision on {accelerator.device.type}"
    )

    # what it learns from, and what it is asked on the way
    questions = labelled_questions(config, pictures.heldout, labels, vae)
    folder = config.cache_folder()
    cache = build_cache(config, folder, pictures.train, encoders, shape, "classifier") if folder else None
    samples = replace(fresh, cache=cache)

    tracker = Tracker(Path(config.run), silent=not told)
    training = ClassifierTraining.prepare(config, accelerator, classifier, vae)

    def save_and_ask(done: int) -> None:
        training.export()
        if questions is not None:
            answers = training.accuracy(questions)
            tracker.scalars(done, {f"classifier/heldout/{name}": value for name, value in answers.items()})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in answers.items())
            say(f"step {done}: held-out accuracy {shown}")

    workers = data.workers if cache is None else 0
    losses = fit_plain(training, samples, tracker, workers=workers, at_checkpoint=save_and_ask)
    tracker.close()
    example = f"--classifier {Path(config.run) / 'classifier'} --class-label {labels.names[0]}"
    say(f"done: steer with: ldm sample MODEL PROMPT {example}")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    start(main, __doc__)
