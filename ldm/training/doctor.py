"""`ldm doctor`: a minute before a run of hours. Can this machine, this data and this recipe train a model at all?

It measures rather than guesses: real pictures through the real VAE, real steps of the very `Training.step` that `fit`
calls, and thirty steps on one batch, which a network that can learn must get better at (the oldest test there is).
Nothing is written.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.data.cache import context_kind, posterior_kind
from ldm.data.captioned import CaptionedPictures, read_captioned
from ldm.data.conditioned import ConditionedPictures
from ldm.data.duplicates import duplicates, named, thumbnails
from ldm.data.rows import BadDataError, count
from ldm.data.space import gib
from ldm.models.text import TextEncoder, load_text
from ldm.models.unet import build_unet
from ldm.models.vae import downsampling, load_vae
from ldm.training.captions import report_captions
from ldm.training.config import Config
from ldm.training.device import build_accelerator
from ldm.training.encoders import Encoders
from ldm.training.latents import check_scale, load_normalized, normalize_on, report_reconstruction
from ldm.training.loop import Training
from ldm.training.objective import build_schedule
from ldm.training.samples import batches, build_samples, numbers_of

TIMED = 3  # steps, after one that warms up
OVERFIT = 30  # steps on one batch
FALLS = 0.9  # to at most this share of the first loss
BLURRED = 20.0  # dB; below it a reconstruction is no longer its picture
CUT = 0.05  # share of captions


@dataclass(frozen=True)
class Finding:
    """What one check found; `told` names the key or file to change where it isn't ok."""

    state: Literal["ok", "warning", "problem"]
    check: str
    told: str


def examine(config: Config) -> Iterator[Finding]:
    """The findings, one after the other; the first that leaves nothing to go on with is the last."""
    try:
        pictures = read_captioned(config.data.source, **config.data.reading())
        source = ConditionedPictures.read(pictures, config.data.label_column, config.data.condition_column)
        train, heldout = count(len(pictures.train), "picture"), len(pictures.heldout)
        if not len(pictures.train):
            raise BadDataError(f"all of {config.data.source} is held out; lower data.holdout")
    except (BadDataError, OSError) as error:
        yield Finding("problem", "data", str(error))
        return
    yield Finding("ok", "data", f"{train} to train on, {heldout} held out")
    yield from _duplicates(pictures)

    accelerator = build_accelerator(config.loop)
    device = accelerator.device
    try:
        text = load_text(config.text, device)
        if text:
            yield _captions(text, pictures)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        yield Finding("problem", "captions", str(error))
        return
    if config.vae is None and not (Path(config.run) / "vae/config.json").exists():
        told = f"there is none in {config.run}/vae yet; run train/train_vae.py, or set vae; then ask again for the rest"
        yield Finding("warning", "VAE", told)
        return
    try:
        vae = load_normalized(config, device) if config.vae is None else load_vae(config.vae).to(device)
        if config.vae is not None:
            normalize_on(vae, pictures.train, config.data.size)
        check_scale(vae, pictures.train, config.data.size)
    except (ValueError, OSError) as error:
        yield Finding("problem", "VAE", str(error))
        return
    mean, told = report_reconstruction(vae, pictures, config.data.size)
    far = f"{told}; it is low: train longer (vae_training.steps) or with more vae_model.latent_channels"
    yield Finding("ok", "VAE", told) if mean >= BLURRED else Finding("warning", "VAE", far)
    yield from _training(config, accelerator, source, vae, text)


def _duplicates(pictures: CaptionedPictures) -> Iterator[Finding]:
    within, across = duplicates(pictures, thumbnails(pictures))
    if across:
        fix = "held-out figures will look too good; give such pictures one `split`, or delete one of each"
        yield Finding("problem", "leak", f"{count(len(across), 'held-out or training picture')} are in the other "
                      f"split as well: {named(across)}; {fix}")  # fmt: skip
    else:
        yield Finding("ok", "leak", "no picture is in both splits")
    if within:
        told = (
            f"{count(len(within), 'picture')} twice: {named(within)}; delete one of each, or give one all the captions"
        )
        yield Finding("warning", "duplicates", told)


def _captions(text: TextEncoder, pictures: CaptionedPictures) -> Finding:
    captions = sorted({caption for row in pictures for caption in row.captions})
    most = text.tokenizer.model_max_length
    cut = sum(length > most for length in text.lengths(captions)) / len(captions)
    told = f"{report_captions(text, pictures)}; {cut:.1%} are cut, {text.unknown_rate(captions):.1%} of tokens unknown"
    return Finding("warning" if cut > CUT else "ok", "captions", told)


def _training(
    config: Config, accelerator: Any, source: ConditionedPictures, vae: Any, text: TextEncoder | None
) -> Iterator[Finding]:
    """What real steps say, on a few real batches."""
    latent_size = config.data.size // downsampling(vae)
    latent_shape = (vae.config.latent_channels, latent_size, latent_size)
    data = replace(config.data, cache="off", workers=0)
    encoders = Encoders(lambda: vae, lambda: text)
    samples = build_samples(replace(config, data=data), source.train, latent_shape, None)
    loop = config.loop
    numbers = numbers_of(0, 1 + TIMED, loop.batch_size, loop.accumulation, 0, 1)
    parts = list(batches(samples, numbers, accelerator.device, encoders))

    def training(changed: Config) -> Training:
        torch.manual_seed(config.seed)
        unet = build_unet(
            config.unet,
            latent_shape=latent_shape,
            context_dim=text.dim if text else None,
            classes=len(source.labels.names) + 1 if source.labels else 0,
            condition_channels=latent_shape[0] if source.condition_column else 0,
            learned_variance=config.diffusion.variance == "learned",
        )
        return Training.prepare(changed, accelerator, build_schedule(config.diffusion), unet)

    real = training(config)
    weights = 4 * sum(p.numel() for p in real.unet.parameters())
    yield disk(config, source, encoders, text, latent_shape, weights)
    seconds = []
    for step in range(1 + TIMED):
        started = time.monotonic()
        float(real.step(step, parts[step * loop.accumulation : (step + 1) * loop.accumulation]))
        seconds.append(time.monotonic() - started)
    each = sorted(seconds[1:])[TIMED // 2]
    hours = each * loop.steps / 3600
    eta = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    yield Finding(
        "ok", "time", f"{each:.2f} s a step, {eta} for loop.steps={loop.steps}, drawing and saving not counted"
    )
    yield memory(accelerator.device)
    del real

    peak = replace(config, optim=replace(config.optim, warmup=0, decay="constant"))
    learner = training(peak)
    losses = [float(learner.step(step, parts[:1])) for step in range(OVERFIT)]
    first, last = losses[0], min(losses[-5:])
    told = f"on one batch the loss goes from {first:.3f} to {last:.3f} in {OVERFIT} steps"
    if last <= FALLS * first:
        yield Finding("ok", "learning", told)
    else:
        rate = config.optim.lr
        yield Finding("problem", "learning", f"{told}; expected at most {FALLS:.0%} of it: set optim.lr={rate:g} "
                      f"{'higher' if last <= 1.05 * first else 'lower'}, or unet.channels wider")  # fmt: skip


def disk(
    config: Config,
    source: ConditionedPictures,
    encoders: Encoders,
    text: TextEncoder | None,
    latent_shape: tuple[int, int, int],
    weights: int,
) -> Finding:
    """What a run writes, against what is free: checkpoints (weights, average, two moments) and one on its way."""
    vae, _ = encoders.load()
    frozen = sum(4 * p.numel() for network in (vae, text.model if text else None) if network is not None
                 for p in network.parameters())  # fmt: skip
    needs = {"checkpoints": 4 * weights * (config.loop.keep + 1), "pipeline": 2 * (weights + frozen)}
    if config.data.cache != "off":
        told, rows = encoders.fingerprints, source.train.all_pictures
        posterior = posterior_kind(told["vae"], latent_shape, config.data.size, config.data.background)
        needs["cache"] = len(rows) * posterior.record.itemsize * (2 if config.data.flip else 1)
        if text:
            captions = {caption for row in source.train.pictures for caption in row.captions}
            shape = (text.tokenizer.model_max_length, text.dim)
            needs["cache"] += len(captions) * context_kind(told["text.encoder"], shape).record.itemsize
    where = Path(config.run).absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    shares = ", ".join(f"{gib(size)} for {what}" for what, size in needs.items())
    told_sizes = f"a run writes {gib(sum(needs.values()))} ({shares}); {gib(free)} are free"
    if sum(needs.values()) <= free:
        return Finding("ok", "disk", told_sizes)
    return Finding("problem", "disk", f"{told_sizes}: set run, or data.cache, to a folder on a larger disk")


def memory(device: torch.device) -> Finding:
    """The most that this process, which has taken real steps, has held."""
    if device.type == "cuda":
        free, all_of_it = torch.cuda.mem_get_info(device)
        held = torch.cuda.max_memory_allocated(device)
        return _fits(held, free + torch.cuda.memory_reserved(device), f"of {gib(all_of_it)} on the GPU")
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
    except OSError:  # not Linux
        return Finding("ok", "memory", f"{gib(held)} at most")
    return _fits(held, int(lines["MemAvailable"].split()[0]) * 1024 + held, "with what this process holds")


def _fits(held: int, there: int, what: str) -> Finding:
    told = f"{gib(held)} at most, {gib(there)} are there {what}"
    if held <= 0.9 * there:
        return Finding("ok", "memory", told)
    return Finding("warning", "memory", f"{told}: raise loop.accumulation, or set loop.gradient_checkpointing=true")


def run(config: Config) -> list[Finding]:
    """Print each finding as it is made and the verdict at the end."""
    findings = []
    for found in examine(config):
        findings.append(found)
        print(f"{found.state:8} {found.check:11} {found.told}", flush=True)
    states = [found.state for found in findings]
    print(f"\n{count(states.count('problem'), 'problem')}, {count(states.count('warning'), 'warning')}")
    return findings
