"""A minute before a run of hours: can this machine, this data and this recipe train a model at all?

It measures rather than guesses: real pictures through the real VAE, real steps (trial.py) on real batches. `examine`
is `ldm doctor`, which looks at everything and writes nothing. `before_vae`, `before_unet` and `before_classifier` are
what a run looks at before its first step; what it has read and checked itself by then isn't looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm.data.batches import evenly
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import CaptionedPictures, read_captioned, require_training
from ldm.data.duplicates import alike, duplicates, named
from ldm.data.rows import count
from ldm.models.classifier import NoisyClassifier
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import build_vae, latent_shape, load_vae, normalize
from ldm.training.checkpoint import checkpoints
from ldm.training.config import Config
from ldm.training.context import measure_captions, report_captions
from ldm.training.denoiser import denoiser
from ldm.training.distributed import build_accelerator, encoding_dtype
from ldm.training.doctor.findings import Finding, tell
from ldm.training.doctor.resources import cache_needs, disk, network_needs
from ldm.training.doctor.trial import FEW, TIMED, try_steps
from ldm.training.encoders import Encoders
from ldm.training.latents import MEASURED, check_scale, load_normalized, measure_latents, report_reconstruction
from ldm.training.objective import build_schedule
from ldm.training.plain_loop import PlainSamples, PlainTraining
from ldm.training.samples import build_samples, few_batches, numbers_of
from ldm.training.tasks.autoencoder import PixelSamples, VAETraining
from ldm.training.tasks.classifier import ClassifierTraining, LabelledSamples
from ldm.training.trainer import Training

BLURRED = 20.0  # dB; below it a reconstruction is no longer its picture
CUT = 0.05  # share of captions
LOOKED_AT = 8192  # pictures compared with each other: a minute for photographs


def before_first_step(
    config: Config, accelerator: Accelerator, folder: Path, look: Callable[[], Iterable[Finding]]
) -> None:
    """Look before a run's first step and tell what was found; a run that has checkpoints in `folder` isn't looked at.

    Every rank must call it.

    Raises:
        ValueError: naming the keys, if a problem was found. doctor=false goes on without looking.
    """
    if not config.doctor or checkpoints(folder):
        return
    problems = []
    for found in look():
        accelerator.print(found)
        problems += [found.told] if found.state == "problem" else []
    if float(accelerator.reduce(torch.tensor(float(len(problems)), device=accelerator.device))):
        told = "; ".join(problems) or "rank 0 says why"
        raise ValueError(f"{told}. Nothing was trained; doctor=false trains without looking first")


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything, in the order of a run; an error that leaves nothing to go on with is the last finding."""
    try:
        yield from _examine(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        yield Finding("problem", "stopped", str(error))


def _examine(config: Config) -> Iterator[Finding]:
    pictures = read_captioned(config.data.source, **config.data.reading())
    source = ConditionedPictures.read(pictures, config.data.label_column, config.data.condition_column)
    require_training(pictures)
    told = f"{count(len(pictures.train), 'picture')} to train on, {len(pictures.heldout)} held out"
    if pictures.skipped:
        named = "".join(f"\n{problem}" for problem in pictures.skipped[:3])
        yield Finding("warning", "data", f"{told}, {len(pictures.skipped)} left out (data.on_bad=skip):{named}")
    else:
        yield Finding("ok", "data", told)
    for warning in pictures.unfit(config.data.size):
        yield Finding("warning", "sizes", warning)
    yield from repeated(pictures)

    accelerator = build_accelerator(config.loop)
    device, size = accelerator.device, config.data.size
    text_scale: tuple[Tensor, Tensor] | None = None
    vae_scale: tuple[Tensor, Tensor] | None = None

    def load_text() -> TextEncoder:
        text = TextEncoder.load(config.text, device)
        if text_scale is not None:
            text.standardize(*text_scale)
        return text

    if config.text.encoder is not None:
        text = load_text()
        yield captions(text, pictures)
        if config.text.standardize:
            text_scale = measure_captions(text, pictures.train)
        del text

    unlearned = config.vae is None and not (Path(config.run) / "vae/config.json").exists()

    def load_the_vae() -> Any:
        if unlearned:
            torch.manual_seed(config.seed)
            vae = build_vae(config.vae_model).eval().requires_grad_(False)
        else:
            vae = load_vae(config.vae) if config.vae is not None else load_normalized(config, device)
        if vae_scale is not None:
            normalize(vae, *vae_scale)
        return vae.to(device)

    vae = load_the_vae()
    if unlearned:
        yield Finding("ok", "VAE", f"there is none in {config.run}/vae yet: train/train_vae.py comes first; what "
                      "follows is measured with one that has learned nothing")  # fmt: skip
        samples = PixelSamples(pictures.train, config.data, config.seed, latent_shape(vae, size))
        yield from before_vae(config, accelerator, samples)
    if unlearned or config.vae is not None:
        vae_scale = measure_latents(vae, pictures.train, size, MEASURED)
        normalize(vae, *vae_scale)
    if not unlearned:
        check_scale(vae, pictures.train, size)
        mean, told = report_reconstruction(vae, pictures, size)
        far = "; that is low: raise vae_training.steps or vae_model.latent_channels"
        yield Finding("ok", "VAE", told) if mean >= BLURRED else Finding("warning", "VAE", told + far)
    del vae
    encoders = Encoders(load_the_vae, load_text if config.text.encoder else None, encoding_dtype(accelerator))
    yield from before_unet(config, accelerator, source, encoders)


def repeated(pictures: CaptionedPictures) -> Iterator[Finding]:
    """Pictures that are there twice, in one split or in both."""
    within, across = duplicates(evenly(pictures, LOOKED_AT))
    looked = f" ({LOOKED_AT:,} of {len(pictures):,} looked at)" if len(pictures) > LOOKED_AT else ""
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
    said = sorted({caption for row in pictures for caption in row.captions})
    cut = sum(length > text.tokenizer.model_max_length for length in text.lengths(said)) / len(said)
    told = f"{cut:.1%} are cut, {text.unknown_rate(said):.1%} of tokens unknown; {report_captions(text, pictures)}"
    return Finding("warning" if cut > CUT else "ok", "captions", told)


def before_vae(config: Config, accelerator: Accelerator, samples: PixelSamples) -> Iterator[Finding]:
    """Room for the VAE's training, and a trial of it."""

    def prepare(config: Config) -> PlainTraining:
        torch.manual_seed(config.seed)
        return VAETraining.prepare(config, accelerator, build_vae(config.vae_model))

    weights = float32_bytes(build_vae(config.vae_model))
    yield disk(config, network_needs(config, weights, 3, 0, "vae"), "VAE disk")
    yield from try_plain(config, "vae_training", prepare, samples, accelerator, "VAE")


def before_classifier(
    config: Config, accelerator: Accelerator, samples: LabelledSamples, build: Callable[[], NoisyClassifier], vae: Any
) -> Iterator[Finding]:
    """Room for the classifier's training, and a trial of it, on samples that have no cache."""

    def prepare(config: Config) -> PlainTraining:
        torch.manual_seed(config.seed)
        return ClassifierTraining.prepare(config, accelerator, build(), vae)

    yield disk(config, network_needs(config, float32_bytes(build()), 3, 0, "classifier"), "classifier disk")
    yield from try_plain(config, "classifier_training", prepare, samples, accelerator, "classifier")


def before_unet(
    config: Config, accelerator: Accelerator, source: ConditionedPictures, encoders: Encoders
) -> Iterator[Finding]:
    """Room for the U-Net's training, and a trial of it on samples encoded for it alone."""
    vae, text, loop, data = encoders.vae_outline, encoders.text_outline, config.loop, config.data
    shape = latent_shape(vae, data.size)
    build = denoiser(config, source, text, shape)
    learned = config.diffusion.variance == "learned"

    def prepare(config: Config) -> Training:
        torch.manual_seed(config.seed)
        return Training.prepare(config, accelerator, build_schedule(config.diffusion), build(learned_variance=learned))

    frozen = float32_bytes(vae) + (float32_bytes(text.model) if text else 0)
    needs = network_needs(config, float32_bytes(build()), 4, frozen, "pipeline")
    yield disk(config, needs | cache_needs(config, source, encoders, shape), "U-Net disk")
    fresh = replace(config, data=replace(data, cache="off", workers=0))
    samples = build_samples(fresh, source.train, shape, None)
    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(0, 1 + TIMED, loop.batch_size, loop.accumulation, rank, processes)
    *parts, few = few_batches(samples, [*numbers, range(FEW)], accelerator.device, encoders)
    encoders.free()  # as they are while the run takes its steps
    steps = [parts[i : i + loop.accumulation] for i in range(0, len(parts), loop.accumulation)]
    yield from try_steps(config, "optim", prepare, steps, [few], accelerator, "U-Net")


def try_plain(
    config: Config,
    section: str,
    prepare: Callable[[Config], PlainTraining],
    samples: PlainSamples,
    accelerator: Accelerator,
    name: str,
) -> list[Finding]:
    """A trial of a training that draws nothing."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(0, 1 + TIMED, getattr(config, section).batch_size, 1, rank, processes)
    *steps, few = (default_collate([samples[n] for n in part]) for part in [*numbers, range(FEW)])
    return try_steps(config, section, prepare, steps, few, accelerator, name)


def float32_bytes(network: nn.Module) -> int:
    """What its weights take in a pipeline's files, whatever they are in now."""
    return 4 * sum(p.numel() for p in network.parameters())


def run(config: Config) -> bool:
    """`ldm doctor`: print what was found; returns whether there is no problem."""
    return not any(found.state == "problem" for found in tell(examine(config)))
