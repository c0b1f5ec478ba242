"""The whole recipe of a model: one frozen dataclass, one YAML file.

train_vae.py and train_ldm.py read the same one; command_line.py makes it from what people type.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.diffusion.prediction import Prediction
from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig


@dataclass(frozen=True)
class DataConfig:
    """The captioned pictures.

    Attributes:
        source: a folder with metadata.csv, .jsonl or .parquet; a folder with a .txt beside each picture;
            WebDataset shards ("shards/{000..007}.tar"); or a Hub data set's name.
        image_column, hub_config, hub_split: where the pictures are, in a Hub data set.
        caption_columns: where the captions are; a picture may have several, and each epoch draws one.
        size: edge in pixels that the model learns and draws.
        crop: which square is taken of a picture that isn't one.
        flip: mirror half of the pictures. Not for letters, flags or anything that has a left and a right.
        background: the color behind transparent pictures.
        holdout: share kept out of training, by a hash of the caption, where no column `split` says it.
        on_bad: stop at bad pictures and captions, or skip, count and list them.
        cache: encode once and keep latents and context in memory, or encode anew each time ("off").
            Random crops need "off".
        workers: processes that read pictures when the cache is off.
    """

    source: str = "data/openmoji"
    image_column: str = "image"
    hub_config: str | None = None
    hub_split: str = "train"
    caption_columns: tuple[str, ...] = ("text",)
    size: int = 64
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    background: str = "white"
    holdout: float = 0.05
    on_bad: Literal["error", "skip"] = "error"
    cache: Literal["memory", "off"] = "memory"
    workers: int = 2

    def __post_init__(self) -> None:
        check("data.size", self.size, at_least=8)
        if self.size % 8:
            raise ValueError(f"data.size: expected a multiple of 8, as stock pipelines draw, got {self.size}")
        check("data.holdout", self.holdout, at_least=0, below=1)
        check("data.workers", self.workers, at_least=0)
        if self.crop == "random" and self.cache == "memory":
            raise ValueError("data.crop: random crops can't be encoded once; set data.cache=off or data.crop=center")

    def reading(self) -> dict[str, Any]:
        """The arguments of `read_captioned` besides the source."""
        names = ("image_column", "caption_columns", "hub_config", "hub_split", "background", "holdout", "on_bad")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class VAETrainingConfig:
    """How train_vae.py trains the autoencoder.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures per step, over all processes.
        lr: peak learning rate; it warms up over `warmup` steps and falls to zero along a cosine.
        l1, mse: weights of the mean absolute and mean squared error of the pixels.
        gradient: weight of the L1 error of the picture's differences to its right and lower neighbor (edges).
        kl: weight of KL(posterior || N(0, I)), per pixel value.
        perceptual: weight of LPIPS; above 0 it needs `pip install lpips` and its VGG weights.
        adversarial: weight of a PatchGAN's verdict, from step `adversarial_start` on.
        log_every, checkpoint_every: in steps.
    """

    steps: int = 20_000
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 50
    l1: float = 1.0
    mse: float = 1.0
    gradient: float = 0.5
    kl: float = 1e-4
    perceptual: float = 0.0
    adversarial: float = 0.0
    adversarial_start: int = 10_000
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        check("vae_training.steps", self.steps, at_least=1)
        check("vae_training.checkpoint_every", self.checkpoint_every, at_least=1)
        check("vae_training.batch_size", self.batch_size, at_least=1)
        check("vae_training.lr", self.lr, above=0)
        check("vae_training.log_every", self.log_every, at_least=1)


@dataclass(frozen=True)
class DiffusionConfig:
    """The process and the objective; the defaults are the epsilon-loss of DDPM.

    Attributes:
        schedule: linear (Ho et al. 2020), scaled_linear (Rombach et al. 2022) or cosine (Nichol & Dhariwal 2021).
        timesteps: T.
        zero_terminal_snr: rescale the schedule so that its last step holds no signal; not with eps (Lin et al. 2024).
        prediction: what the U-Net predicts.
        min_snr_gamma: weight the loss by min-SNR (Hang et al. 2023; 5 is usual), or null for L_simple.
        caption_dropout: share of captions replaced by "" for classifier-free guidance (Ho & Salimans 2022).
    """

    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    prediction: Prediction = "eps"
    min_snr_gamma: float | None = None
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        check("diffusion.timesteps", self.timesteps, at_least=1)
        check("diffusion.caption_dropout", self.caption_dropout, at_least=0, at_most=1)
        if self.min_snr_gamma is not None:
            check("diffusion.min_snr_gamma", self.min_snr_gamma, above=0)
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "diffusion.prediction: eps says nothing about x0 where there is no signal; "
                "with zero_terminal_snr use v or x0"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: peak learning rate.
        warmup: steps over which it rises from zero.
        decay: then it stays, or falls to zero along a cosine by the last step.
        betas, weight_decay: AdamW's.
        clip: largest global norm of the gradient.
        ema_decay: of the averaged weights, which are the ones that draw.
    """

    lr: float = 1e-4
    warmup: int = 500
    decay: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        check("optim.lr", self.lr, above=0)
        check("optim.warmup", self.warmup, at_least=0)
        check("optim.clip", self.clip, above=0)
        check("optim.ema_decay", self.ema_decay, at_least=0, below=1)


@dataclass(frozen=True)
class LoopConfig:
    """How long, how large, how precise, and what to show on the way.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures per step, over all processes and accumulated batches.
        accumulation: batches per process whose gradients are added up before a step.
        precision: auto means bf16 where the device computes it fast, else fp32.
        threads: CPU threads per process; 0 shares the cores among the processes of this machine.
        gradient_checkpointing: recompute activations in the backward pass; less memory, more time.
        compile: torch.compile the U-Net; pays on a GPU over long runs.
        log_every, sample_every, evaluate_every, checkpoint_every: in steps; 0 is never (log_every excepted).
        keep: checkpoints kept.
        prompts: drawn every `sample_every` steps and at the end.
        guidance_scale, num_inference_steps: how they are drawn.
        evaluation_pictures: held-out pictures whose loss is taken at fixed (t, eps).
        max_skipped: a step whose loss or gradients are not finite is skipped; so many in a row end the run.
        spike: a loss so many robust standard deviations above the running median is written to log.jsonl with the
            pictures of its batch; 0 is never.
    """

    steps: int = 100_000
    batch_size: int = 64
    accumulation: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 50
    sample_every: int = 2000
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    prompts: tuple[str, ...] = ("red heart", "pizza", "rocket", "cat face")
    guidance_scale: float = 3.0
    num_inference_steps: int = 20
    evaluation_pictures: int = 64
    max_skipped: int = 20
    spike: float = 8.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "keep", "num_inference_steps", "max_skipped"):
            check(f"loop.{name}", getattr(self, name), at_least=1)
        for name in ("threads", "sample_every", "evaluate_every", "checkpoint_every", "evaluation_pictures", "spike"):
            check(f"loop.{name}", getattr(self, name), at_least=0)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"loop.batch_size: {self.batch_size} can't be divided into loop.accumulation={self.accumulation} parts"
            )


@dataclass(frozen=True)
class ResumeConfig:
    """What a stopped run may be resumed with.

    Attributes:
        allow: keys that may differ from the checkpoint's config although they change what is learned.
    """

    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """A whole recipe.

    Attributes:
        run: the folder that everything is written to: vae/, checkpoints/, samples/, pipeline/, log.jsonl.
        seed: of every random number.
        vae: a pretrained VAE, as a folder or a Hub id; null means the one that train_vae.py leaves in RUN/vae.
        vae_model: the autoencoder that train_vae.py builds.
    """

    run: str = "runs/ldm"
    seed: int = 0
    vae: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    vae_model: VAEConfig = field(default_factory=VAEConfig)
    vae_training: VAETrainingConfig = field(default_factory=VAETrainingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)


def check(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a ValueError that names the key and what it allows, unless `value` is finite and within the bounds."""
    bounds = [
        (at_least, lambda bound: value >= bound, "at least"),
        (above, lambda bound: value > bound, "above"),
        (at_most, lambda bound: value <= bound, "at most"),
        (below, lambda bound: value < bound, "below"),
    ]
    set_bounds = [(bound, holds, words) for bound, holds, words in bounds if bound is not None]
    if not math.isfinite(value) or not all(holds(bound) for bound, holds, _ in set_bounds):
        allowed = " and ".join(f"{words} {bound:g}" for bound, _, words in set_bounds)
        raise ValueError(f"{name}: expected a number {allowed}, got {value}")


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and numbers, as YAML and JSON hold it."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert isinstance(plain, dict)
    return plain
