"""The whole recipe of a model: one frozen dataclass, one YAML file.

All trainings read the same one; ldm/cli/config.py makes it from a command line.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.models.classifier import ClassifierConfig
from ldm.models.lora import LoRAConfig
from ldm.models.power_ema import WIDEST
from ldm.models.text_encoder import TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.system.checks import check
from ldm.system.files import typed_path
from ldm.training.objective import DiffusionConfig
from ldm.training.upscale_config import UpscaleConfig

PREVIEW_STEPS, PREVIEW_SCALE = 20, 3.0


@dataclass(frozen=True)
class DataConfig:
    """The captioned pictures.

    Attributes:
        source: a folder with metadata.csv, .jsonl or .parquet; a folder with a .txt beside each picture;
            WebDataset shards ("shards/{000..007}.tar"); or a Hub data set's name.
        image_column, hub_config, hub_split: where the pictures are, in a Hub data set.
        caption_columns: where the captions are; a picture may have several, and each epoch uses one. Without any,
            for a model that knows no text, pictures need no captions.
        label_column: the column of a class that the model is conditioned on, beside captions or instead of them, and
            that the classifier learns.
        number_columns: columns of numbers, such as a size, that the model is conditioned on, beside captions or instead
            of them; not beside a class, for which stock U-Nets have the same input.
        condition_column: the column of a second picture, which the model is conditioned on: its latents are
            concatenated to x_t. In a folder the column holds its name; in shards `sketch` is the picture
            `000123.sketch.png`; in a Hub set it is another column of pictures. It may have any resolution.
        repeats_column: the column of how often an epoch shows a picture, a whole number; 1 where it is empty. For
            pictures that are rare among many of a kind.
        inpaint: learn to fill in masked parts of pictures: a mask, and the latents of the picture without what it
            masks, are concatenated to x_t (`ldm.training.masks`).
        size: edge in pixels of the pictures that the model learns and generates.
        buckets: bring each picture to the size whose aspect ratio is nearest to its own, of about the area of a square
            of `size`, instead of cropping that (`ldm.data.buckets`). A batch has one size.
        bucket_ratio: of the longest bucket, its longer side to its shorter one.
        crop: which square, or which part of its bucket's aspect ratio, is taken of a picture.
        flip: mirror half of the pictures. Not for letters, flags or anything that has a left and a right.
        background: the color behind transparent pictures.
        holdout: share kept out of training, by a hash of the caption, where no column `split` sets it.
        on_bad: stop at bad pictures and captions, or skip, count and list them.
        cache: the folder that keeps what VAE and text encoder made of pictures and captions; "auto" is RUN/cache.
            Runs can share one: things are found by their content and by the networks' weights. "off" keeps nothing
            and encodes at every step; random crops need it.
        limit: train on at most so many pictures, those of `loop.prompts` among them; 0 is all.
        workers: processes that read pictures when the cache is off, or to mask them.
    """

    source: str = "data/openmoji"
    image_column: str = "image"
    hub_config: str | None = None
    hub_split: str = "train"
    caption_columns: tuple[str, ...] = ("text",)
    label_column: str | None = None
    number_columns: tuple[str, ...] = ()
    condition_column: str | None = None
    repeats_column: str | None = None
    inpaint: bool = False
    size: int = 64
    buckets: bool = False
    bucket_ratio: float = 2.0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    background: str = "white"
    holdout: float = 0.05
    on_bad: Literal["error", "skip"] = "error"
    cache: str | Literal[False] = "auto"  # YAML reads a bare off as false
    limit: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", typed_path(self.source))
        check("data.size", self.size, at_least=8, at_most=4096)
        if self.size % 8:
            raise ValueError(f"data.size: expected a multiple of 8, as stock pipelines generate, got {self.size}")
        check("data.bucket_ratio", self.bucket_ratio, above=1, at_most=16)
        check("data.holdout", self.holdout, at_least=0, below=1)
        check("data.limit", self.limit, at_least=0)
        check("data.workers", self.workers, at_least=0)
        if not self.cache:
            object.__setattr__(self, "cache", "off")
        object.__setattr__(self, "cache", typed_path(str(self.cache)))
        if self.crop == "random" and self.cache != "off":
            raise ValueError("data.crop: random crops can't be encoded once; set data.cache=off or data.crop=center")
        if self.number_columns and self.label_column is not None:
            raise ValueError("data.number_columns: a stock U-Net takes a class or numbers; leave data.label_column out")
        if len(set(self.number_columns)) < len(self.number_columns):
            raise ValueError(f"data.number_columns: a column is named twice: {', '.join(self.number_columns)}")
        if self.inpaint and self.condition_column is not None:
            raise ValueError("data.inpaint: the masked picture is the second one; leave data.condition_column out")

    @property
    def most_ratio(self) -> float:
        """Of a picture that is not cropped, its longer side to its shorter one."""
        return self.bucket_ratio if self.buckets else 1.0

    def reading(self) -> dict[str, Any]:
        """The arguments of `read_captioned` besides the source."""
        names = ("image_column", "caption_columns", "hub_config", "hub_split", "background", "holdout", "on_bad")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class VAETrainingConfig:
    """How the autoencoder is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures per step, over all processes.
        lr: peak learning rate; it warms up over `warmup` steps and falls to zero along a cosine.
        l1, mse: weights of the mean absolute and mean squared error of the pixels.
        gradient: weight of the L1 error of the picture's differences to its right and lower neighbor (edges).
        kl: weight of KL(posterior || N(0, I)), per pixel value.
        crops: share of samples that are a piece of `data.size` pixels at the picture's full resolution, instead of the
            whole picture shrunk: for a VAE that also encodes large pictures.
        perceptual: weight of LPIPS; above 0 it needs `pip install lpips` and its VGG weights.
        adversarial: weight of a PatchGAN discriminator's loss, from step `adversarial_start` on.
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
    crops: float = 0.0
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
        check("vae_training.crops", self.crops, at_least=0, at_most=1)
        for name in ("warmup", "l1", "mse", "gradient", "kl", "perceptual", "adversarial", "adversarial_start"):
            check(f"vae_training.{name}", getattr(self, name), at_least=0)


@dataclass(frozen=True)
class ClassifierTrainingConfig:
    """How the classifier of noisy latents is trained, on data.label_column.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures per step, over all processes.
        lr: peak learning rate; it warms up over `warmup` steps and falls to zero along a cosine.
        weight_decay: AdamW's.
        log_every, checkpoint_every: in steps; the accuracy on held-out pictures is logged at every checkpoint.
    """

    steps: int = 5000
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    log_every: int = 50
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            check(f"classifier_training.{name}", getattr(self, name), at_least=1)
        check("classifier_training.lr", self.lr, above=0)
        for name in ("warmup", "weight_decay"):
            check(f"classifier_training.{name}", getattr(self, name), at_least=0)


@dataclass(frozen=True)
class DistillConfig:
    """How `ldm train distill` makes a student of few steps out of the model that init names.

    Attributes:
        steps: sampling steps of the previews, and the pipeline's default, 4 if it is 0; the student is trained for any
            number. Other trainings want 0.
        guidance_scale: lowest and highest scale that the teacher is guided with; the middle is the pipeline's default.
            Without an embedding it is one scale.
        solver_steps: steps from noise to picture that the teacher would take; it must divide the timesteps.
        embedding: channels of the embedded scale, an input of the student; 0 is for none, as a LoRA needs it.
        huber_c: where the pseudo-Huber distance goes over from a square to an absolute value.
    """

    steps: int = 0
    guidance_scale: tuple[float, float] = (1.0, 5.0)
    solver_steps: int = 50
    embedding: int = 256
    huber_c: float = 0.001

    def __post_init__(self) -> None:
        check("distill.solver_steps", self.solver_steps, at_least=1)
        check("distill.steps", self.steps, at_least=0, at_most=self.solver_steps)
        low, high = self.guidance_scale
        check("distill.guidance_scale", low, at_least=1, at_most=high)
        check("distill.guidance_scale", high, at_most=100)
        check("distill.embedding", self.embedding, at_least=0)
        check("distill.huber_c", self.huber_c, above=0)
        if not self.embedding and low != high:
            raise ValueError(
                f"distill.guidance_scale: without distill.embedding the student knows one scale; got {low:g} and "
                f"{high:g}, name one twice"
            )
        if self.embedding % 2 or self.embedding == 2:
            raise ValueError(f"distill.embedding: half of it are sines, half cosines; got the odd {self.embedding}")

    @property
    def usual_scale(self) -> float:
        """The guidance scale of validation, previews and the pipeline's default."""
        return sum(self.guidance_scale) / 2


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate.

    Attributes:
        name: adamw; muon (Jordan et al. 2024) for the U-Net's matrices, adamw beside it; schedule_free (Defazio et al.
            2024), which needs no decay and has its own average; or adamw8bit (Dettmers et al. 2022) on CUDA.
        lr: peak learning rate.
        warmup: steps over which it rises from zero.
        decay: then it stays, or falls to zero along a cosine by the last step.
        cooldown: the last steps, over which a constant rate falls to zero. Until they begin, a stopped run may be given
            more steps or fewer.
        betas, weight_decay: the optimizer's; Muon has no betas.
        clip: largest global norm of the gradient.
        ema_decay: of the averaged weights, which are exported; schedule_free exports its own average instead.
        ema_widths: of power-function averages kept beside it, as shares of the training, such as [0.05, 0.1]; of these
            any width can be rebuilt after training (Karras et al. 2024): ldm evaluate RUN --ema 0.02:0.2.
        ema_snapshot_every: steps between two snapshots of them, in RUN/ema_snapshots.
    """

    name: Literal["adamw", "muon", "schedule_free", "adamw8bit"] = "adamw"

    lr: float = 1e-4
    warmup: int = 500
    decay: Literal["constant", "cosine"] = "constant"
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.9999
    ema_widths: tuple[float, ...] = ()
    ema_snapshot_every: int = 1000

    def __post_init__(self) -> None:
        check("optim.lr", self.lr, above=0)
        check("optim.warmup", self.warmup, at_least=0)
        check("optim.cooldown", self.cooldown, at_least=0)
        if self.cooldown and self.decay != "constant":
            raise ValueError(f"optim.cooldown: a rate that falls along a {self.decay} has none; set it to 0")
        check("optim.weight_decay", self.weight_decay, at_least=0)
        for beta in self.betas:
            check("optim.betas", beta, at_least=0, below=1)
        check("optim.clip", self.clip, above=0)
        check("optim.ema_decay", self.ema_decay, at_least=0, below=1)
        for width in self.ema_widths:
            check("optim.ema_widths", width, above=0, at_most=WIDEST)
        if len(set(self.ema_widths)) < len(self.ema_widths):
            raise ValueError(f"optim.ema_widths: expected different widths, got {list(self.ema_widths)}")
        check("optim.ema_snapshot_every", self.ema_snapshot_every, at_least=1)
        if self.name == "schedule_free":
            for name, off in (("decay", "constant"), ("cooldown", 0), ("ema_widths", ())):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"optim.{name}: schedule_free needs no decay and has its own average; set it to {off or '[]'}"
                    )


@dataclass(frozen=True)
class LoopConfig:
    """How long, how large, how precise, and what to show on the way.

    Attributes:
        steps: optimizer steps.
        minutes: time in place of steps: the run measures its step and scales steps, half-size steps, warm-up and the
            number of pictures to it (`ldm.training.budget`); 0 takes the numbers as they are.
        half_size_steps: the first so many of them learn from latents of half the edge, in less than half the time
            (progressive resizing). Until then previews are of half the size, too.
        batch_size: pictures per step, over all processes and accumulated batches.
        accumulation: batches per process whose gradients are added up before a step.
        precision: auto means bf16 where the device computes faster in it, else fp32. The encoders compute in it as
            well, but not in fp16.
        threads: CPU threads per process; 0 shares the cores among the processes of this machine.
        gradient_checkpointing: recompute activations in the backward pass; less memory, more time.
        compile: torch.compile the U-Net; pays on a GPU over long runs.
        log_every, sample_every, evaluate_every, checkpoint_every: in steps; 0 is never (log_every excepted).
        keep: checkpoints kept.
        prompts: of the previews, every `sample_every` steps and at the end; without any, some training captions.
        guidance_scale, num_inference_steps: of the previews; null is a scale of 3 and 20 steps, or diffusion.timesteps
            if fewer; of a model of few steps what its pipeline does by default; an upscaler's scale is 1, and its
            pipeline has these steps by default.
        evaluation_pictures: held-out pictures whose loss is taken at fixed (t, eps).
        max_skipped: a step whose loss or gradients are not finite is skipped; so many in a row end the run.
        spike: a loss so many robust standard deviations above the running median is written to log.jsonl with the
            pictures of its batch; 0 is never.
    """

    steps: int = 100_000
    minutes: float = 0.0
    half_size_steps: int = 0
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
    prompts: tuple[str, ...] = ()
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    evaluation_pictures: int = 64
    max_skipped: int = 20
    spike: float = 8.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "keep", "max_skipped"):
            check(f"loop.{name}", getattr(self, name), at_least=1)
        every = ("sample_every", "evaluate_every", "checkpoint_every")
        for name in ("minutes", "half_size_steps", "threads", *every, "evaluation_pictures", "spike"):
            check(f"loop.{name}", getattr(self, name), at_least=0)
        check("loop.threads", self.threads, at_most=4096)
        if self.guidance_scale is not None:
            check("loop.guidance_scale", self.guidance_scale, at_least=0, at_most=100)
        if self.num_inference_steps is not None:
            check("loop.num_inference_steps", self.num_inference_steps, at_least=1)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"loop.batch_size: {self.batch_size} can't be divided into loop.accumulation={self.accumulation} parts"
            )


@dataclass(frozen=True)
class ResumeConfig:
    """What a stopped run may be resumed with.

    Attributes:
        allow: keys that may differ from the checkpoint's config although they change what is learned; "pictures",
            "data" and "encoders" are what is not in the config.
    """

    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    """A whole recipe.

    Attributes:
        run: the folder that everything is written to: vae/, classifier/, checkpoints/, samples/, pipeline/, log.jsonl.
        seed: of every random number.
        init: the model that the U-Net's training starts from, as a folder of a Stable Diffusion pipeline or a Hub id;
            null means random weights. VAE, text encoder, U-Net, noise schedule and prediction type are the model's.
        vae: a pretrained VAE, as a folder or a Hub id; null means the one that `ldm train vae` saves in RUN/vae.
        vae_model: the autoencoder that `ldm train vae` builds.
        distill: the student that `ldm train distill` trains.
        classifier: the classifier that `ldm train classifier` builds.
        doctor: before a run's first step, check disk and memory, and take a few steps to measure how long they take and
            whether anything is learned. `ldm doctor` does that and more, and trains nothing.
    """

    run: str = "runs/ldm"
    seed: int = 0
    init: str | None = None
    vae: str | None = None
    doctor: bool = True
    data: DataConfig = field(default_factory=DataConfig)
    vae_model: VAEConfig = field(default_factory=VAEConfig)
    vae_training: VAETrainingConfig = field(default_factory=VAETrainingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    upscale: UpscaleConfig = field(default_factory=UpscaleConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    classifier_training: ClassifierTrainingConfig = field(default_factory=ClassifierTrainingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", typed_path(self.run))
        for name in ("init", "vae"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        check("seed", self.seed, at_least=0)
        self.upscale.check_beside(self)
        if self.lora.rank and self.init is None:
            raise ValueError("lora.rank: adapters stand beside a model; name it with init, or set lora.rank=0")
        if self.lora.rank and self.optim.ema_widths:
            raise ValueError(
                "optim.ema_widths: averages are rebuilt into pipelines, and adapters make none; set it to []"
            )
        data = self.data
        names = ("label_column", "number_columns", "condition_column", "inpaint", "buckets")
        others = [f"data.{name}" for name in names if getattr(data, name)]
        others += ["diffusion.few_steps"] if self.diffusion.few_steps else []
        if self.lora.keep and others:
            raise ValueError(f"lora.keep: it can't be combined with {' and '.join(others)}; set it to 0")
        if self.lora.keep and not data.caption_columns:
            raise ValueError("lora.keep: it needs captions; name their columns in data.caption_columns, or set it to 0")
        if self.lora.keep and data.cache == "off":
            raise ValueError(
                "lora.keep: the model's own pictures are latents, as a cache has them; leave out data.cache"
            )
        if self.text.encoder is not None and not self.data.caption_columns:
            raise ValueError(
                "data.caption_columns: a model that knows text needs captions; name their columns, or set "
                "text.encoder=null"
            )
        if self.preview_steps > self.diffusion.timesteps:
            raise ValueError(
                f"loop.num_inference_steps: expected at most diffusion.timesteps={self.diffusion.timesteps}, got "
                f"{self.preview_steps}"
            )

    @property
    def preview_steps(self) -> int:
        """Sampling steps of previews."""
        steps = self.loop.num_inference_steps or self.diffusion.few_steps
        return steps or min(PREVIEW_STEPS, self.diffusion.timesteps)

    @property
    def preview_scale(self) -> float:
        """Guidance scale of previews."""
        scale = self.loop.guidance_scale
        unguided = self.diffusion.few_steps or self.upscale.factor
        return scale if scale is not None else 1.0 if unguided else PREVIEW_SCALE

    def cache_folder(self) -> Path | None:
        """Where latents and contexts are kept; None if they aren't."""
        if self.data.cache == "off":
            return None
        return Path(self.run) / "cache" if self.data.cache == "auto" else Path(str(self.data.cache))

    def facts_folder(self) -> Path:
        """Where it is remembered what is known of the pictures, for the run's next start."""
        return self.cache_folder() or Path(self.run)


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and numbers, as YAML and JSON hold it."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert isinstance(plain, dict)
    return plain
