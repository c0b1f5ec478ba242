"""A minute before a run of hours: can this machine, this data and this recipe train a model at all?

It measures rather than guesses: real pictures through the real VAE, real steps (trial.py) on real batches. `examine`
is `ldm doctor`, which checks everything and writes nothing. `before_first_step` is what a run checks by itself, besides
what it has read and checked by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.batches import evenly
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import CaptionedPictures, read_captioned, require_training
from ldm.data.duplicates import alike, duplicates, named
from ldm.data.rows import count
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import build_vae, normalize
from ldm.training.budget import split_sizes
from ldm.training.checkpoint import has_begun
from ldm.training.config import Config
from ldm.training.distributed import build_accelerator, encoding_dtype
from ldm.training.doctor.findings import Finding, report
from ldm.training.doctor.resources import disk
from ldm.training.doctor.trial import FEW, trial_numbers, try_steps
from ldm.training.encoder_report import report_captions, report_reconstruction
from ldm.training.encoder_sources import TextSource, VAESource
from ldm.training.encoders import Encoders
from ldm.training.initial_model import InitialModel, resolved
from ldm.training.normalization import (
    MEASURED,
    check_scale,
    measure_captions,
    measure_latents,
)
from ldm.training.optimizers import check_optimizer
from ldm.training.sizes import check_sizes
from ldm.training.task import Task
from ldm.training.tasks import task_of_unet
from ldm.training.tasks.autoencoder import Autoencoder
from ldm.training.tasks.diffusion import Diffusion

BLURRED = 20.0  # dB; below it a reconstruction is no longer its picture
CUT = 0.05  # share of captions
COMPARED = 8192  # pictures compared with each other: a minute for photographs


def before_first_step(task: Task, pictures: CaptionedPictures) -> None:
    """Check a task before its first step and print what was found; a resumed run is not checked again.

    Every rank must call it.

    Raises:
        ValueError: naming the keys, if a problem was found. doctor=false skips all of it.
    """
    config, accelerator = task.config, task.accelerator
    if not config.doctor or has_begun(config.run, task.name):
        return
    problems = []
    repeats = repeated(pictures) if isinstance(task, Diffusion) and accelerator.is_main_process else ()
    for found in chain(repeats, try_out(task)):
        accelerator.print(found)
        problems += [found.message] if found.state == "problem" else []
    if float(accelerator.reduce(torch.tensor(float(len(problems)), device=accelerator.device))):
        listed = "; ".join(problems) or "see the message of rank 0"
        raise ValueError(f"{listed}. Nothing was trained; doctor=false trains without these checks")


def examine(config: Config) -> Iterator[Finding]:
    """Check everything, in the order of a run; an error that ends it is the last finding."""
    try:
        yield from _examine(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        yield Finding("problem", "stopped", str(error))


def _examine(config: Config) -> Iterator[Finding]:
    task = "distill" if config.distill.steps else "ldm"
    config = resolved(config, task)
    check_sizes(config, task)
    pictures = read_captioned(config.data.source, **config.data.reading())
    require_training(pictures)
    data = config.data
    source = ConditionedPictures.read(
        pictures,
        data.label_column,
        data.condition_column,
        number_columns=data.number_columns,
        repeats_column=data.repeats_column,
    )
    message = split_sizes(pictures, data.limit)
    if pictures.skipped:
        named = "".join(f"\n{problem}" for problem in pictures.skipped[:3])
        yield Finding("warning", "data", f"{message}, {len(pictures.skipped)} left out (data.on_bad=skip):{named}")
    else:
        yield Finding("ok", "data", message)
    for warning in pictures.unfit(config.data.size, config.data.most_ratio):
        yield Finding("warning", "sizes", warning)
    yield from repeated(pictures)

    accelerator = build_accelerator(config.loop)
    check_optimizer(config.optim.name, accelerator)
    device, size = accelerator.device, config.data.size
    text_scale: tuple[Tensor, Tensor] | None = None
    vae_scale: tuple[Tensor, Tensor] | None = None

    def load_text() -> TextEncoder:
        text = TextSource(config, device).read()
        text.model.to(device)
        if text_scale is not None:
            text.standardize(*text_scale)
        return text

    if config.text.encoder is not None:
        text = load_text()
        yield captions(text, pictures)
        if config.text.standardize:
            text_scale = measure_captions(text, pictures.train)
        del text

    initial = InitialModel.of(config)
    if initial:
        source = initial.with_its_labels(source)
    unlearned = config.vae is None and not (Path(config.run) / "vae/config.json").exists()

    def load_the_vae() -> Any:
        if unlearned:
            torch.manual_seed(config.seed)
            vae = build_vae(config.vae_model).eval().requires_grad_(False)
        else:
            vae = VAESource(config, device).read()
        if vae_scale is not None:
            normalize(vae, *vae_scale)
        return vae.to(device)

    vae = load_the_vae()
    if unlearned:
        yield Finding("ok", "VAE", f"there is none in {config.run}/vae yet: train/train_vae.py comes first; what "
                      "follows is measured with one that has learned nothing")  # fmt: skip
        yield from try_out(Autoencoder(config, accelerator, pictures))
    if unlearned or (config.vae is not None and not initial):
        vae_scale = measure_latents(vae, pictures.train, size, MEASURED)
        normalize(vae, *vae_scale)
    if not unlearned:
        if not initial:
            check_scale(vae, pictures.train, size)
        mean, message = report_reconstruction(vae, pictures, size)
        far = "; that is low: raise vae_training.steps or vae_model.latent_channels"
        yield Finding("ok", "VAE", message) if mean >= BLURRED else Finding("warning", "VAE", message + far)
    del vae
    encoders = Encoders(load_the_vae, load_text if config.text.encoder else None, encoding_dtype(accelerator))
    yield from try_out(task_of_unet(config)(config, accelerator, source, encoders))


def repeated(pictures: CaptionedPictures) -> Iterator[Finding]:
    """Pictures that are there twice, in one split or in both."""
    within, across = duplicates(evenly(pictures, COMPARED))
    looked = f" ({COMPARED:,} of {len(pictures):,} looked at)" if len(pictures) > COMPARED else ""
    if across:
        yield Finding("warning", "leak", f"{count(len(across), 'pair')} of a training and a held-out picture "
                      f"{alike(across)}{looked}: held-out figures will look too good; give both one `split`, or delete "
                      f"one:{named(across)}")  # fmt: skip
    else:
        yield Finding("ok", "leak", f"no picture is in both splits{looked}")
    if within:
        yield Finding("warning", "duplicates", f"{count(len(within), 'pair')} within a split {alike(within)}{looked}; "
                      f"delete one of each, or give one of them both captions:{named(within)}")  # fmt: skip


def captions(text: TextEncoder, pictures: CaptionedPictures) -> Finding:
    """What the text encoder makes of the captions. Raises ValueError if most of it is unknown to it."""
    texts = sorted({caption for row in pictures for caption in row.captions})
    cut = sum(length > text.tokenizer.model_max_length for length in text.lengths(texts)) / len(texts)
    message = f"{cut:.1%} are cut, {text.unknown_rate(texts):.1%} of tokens unknown; {report_captions(text, pictures)}"
    return Finding("warning" if cut > CUT else "ok", "captions", message)


def try_out(task: Task) -> Iterator[Finding]:
    """Room for a task's run, and a trial of it, on samples that are read and encoded for it alone."""
    yield disk(task)
    numbers = trial_numbers(task)
    *parts, few = task.batches([*numbers, range(min(FEW, task.recipe.batch_size))])
    task.free()  # as it is while the run takes its steps
    size = task.recipe.accumulation
    yield from try_steps(task, [parts[i : i + size] for i in range(0, len(parts), size)], [few])


def run(config: Config) -> bool:
    """`ldm doctor`: print what was found; returns whether there is no problem."""
    return not any(found.state == "problem" for found in report(examine(config)))
