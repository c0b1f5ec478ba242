"""Training the U-Net: the diffusion loss on cached latents, conditioned on captions, classes or pictures.

    x_t = alpha_t x0 + sigma_t eps,   loss = |prediction(x_t, t, conditioning) - target|**2   (ldm.diffusion.losses)

What is trained and how is the config's `unet` and `diffusion` sections, or what `init` brings; what it is conditioned
on follows from the data (`text.encoder`, `data.label_column`, `data.number_columns`, `data.condition_column`,
`data.inpaint`). The averaged weights are validated, exported and used for previews. The latents of half the size in the
first `loop.half_size_steps` are progressive resizing. With `diffusion.few_steps` only the timesteps of a sampler of so
few steps are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm.data.cache.latents import LatentCache
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import CaptionedPictures
from ldm.diffusion.losses import diffusion_loss
from ldm.diffusion.schedule import beside, scheduler_config
from ldm.diffusion.timesteps import LossSecondMoment, at_share
from ldm.evaluation.validation import CaptionedValidationSet, CaptionLosses, by_quarter, by_timestep, caption_losses
from ldm.inference.defaults import Defaults
from ldm.models.conditioning import Conditioning, denoise
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import build_unet, choose_attention, without_variance
from ldm.models.vae import latent_shape
from ldm.pipelines.inputs import check_prompts
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.memory import give_back
from ldm.training.checkpoint import has_begun
from ldm.training.config import Config
from ldm.training.distributed import Tick, encoding_dtype, on_rank_0
from ldm.training.encoder_report import report_captions, report_reconstruction
from ldm.training.encoder_sources import build_encoders
from ldm.training.encoders import Encoders
from ldm.training.export import export, quiet, save_frozen, write_pipeline
from ldm.training.facts import RunFacts, stamp, written_stamp
from ldm.training.initial_model import InitialModel
from ldm.training.latent_cache import buckets_of_all, build_cache, cache_bytes
from ldm.training.normalization import check_scale
from ldm.training.objective import build_objective, build_schedule, build_timesteps
from ldm.training.previews import Prompt, build_prompt_set, generate_grid, halved
from ldm.training.samples import (
    Batch,
    LatentSamples,
    has_pixels,
    to_device,
    validation_sets,
    with_context,
    with_latents,
)
from ldm.training.sizes import buckets_of
from ldm.training.task import Recipe, Task, float32_bytes
from ldm.training.train_state import TrainState, whole_weights
from ldm.version import __version__

STOCK_CHANNELS = 4  # of latents, which stock diffusers can inpaint
STORED = 8  # samples in the batch that exported pipelines are checked with


@dataclass
class Diffusion(Task):
    """A U-Net and its average, behind frozen encoders.

    Attributes:
        source: pictures, captions, classes; without them (and the encoders) the task has a step and no samples.
        encoders: VAE and text encoder.
    """

    name = "ldm"
    title = "U-Net"
    optim_section, loop_section, result = "optim", "loop", "pipeline"
    pipeline_class: ClassVar[Any] = LDMPipeline

    source: ConditionedPictures | None = None
    encoders: Encoders | None = None
    heldout: Sequence[CaptionedValidationSet] = field(default=(), init=False)
    prompts: Sequence[Prompt] = field(default=(), init=False)
    exported: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.initial = InitialModel.of(config)
        self.schedule = self.initial.schedule if self.initial else build_schedule(config.diffusion)
        self.timesteps = build_timesteps(config.diffusion, self.schedule)
        few = config.diffusion.few_steps
        self.used: Sequence[int] = self.schedule.timesteps(few) if few else ()
        self.objective = build_objective(config.diffusion, self.schedule)
        if self.encoders is not None and self.source is not None:
            self.latent_shape = latent_shape(self.encoders.vae_outline, config.data.size)
            self.samples = self.latent_samples()
            self.workers = config.data.workers

    @classmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Diffusion:
        data, device, dtype = config.data, accelerator.device, encoding_dtype(accelerator)
        main, facts = accelerator.is_main_process, config.facts_folder()
        source = ConditionedPictures.read(
            pictures,
            data.label_column,
            data.condition_column,
            number_columns=data.number_columns,
            repeats_column=data.repeats_column,
            facts=facts,
            progress=main,
        )
        initial = InitialModel.of(config)
        if initial:
            source = initial.with_its_labels(source)
        encoders = build_encoders(config, pictures.train, device, dtype)
        text = encoders.text_outline
        if text:
            check_prompts("loop.prompts", config.loop.prompts or ("",), text.tokenizer)  # now, not hours later
        if not has_begun(config.run, cls.name):
            if text:
                accelerator.print(report_captions(text, pictures))
            if initial:
                accelerator.print(f"init: starting from {config.init}, which predicts {initial.prediction}")
            else:
                check_scale(encoders.vae, pictures.train, data.size)
            if data.buckets:
                accelerator.print(buckets_of(config, pictures.train))
            accelerator.print(report_reconstruction(encoders.vae, pictures, data.size)[1])
        return cls(config, accelerator, source, encoders)

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.of(self.config.optim, self.config.loop)

    # --- networks ---------------------------------------------------------------------------------

    def build(self) -> None:
        torch.manual_seed(self.config.seed)
        unet = self.initial_unet()
        kernel = choose_attention(unet, self.accelerator.device)
        self.details = f", latents {list(self.latent_shape)}, attention by {kernel}"
        self.train(unet)

    def initial_unet(self) -> UNet2DConditionModel:
        """The U-Net at step 0: init's, or one with random weights."""
        if self.initial:
            return self.initial.load_unet(self.latent_shape[1], self.condition_channels, RunFacts(self.config.run))
        return self.fresh_unet(learned_variance=self.config.diffusion.variance == "learned")

    @property
    def condition_channels(self) -> int:
        """Input channels of the U-Net that follow those of x_t."""
        channels = self.latent_shape[0]
        if self.config.data.inpaint:
            return 1 + channels
        return channels if self.source and self.source.condition_column else 0

    @property
    def classes(self) -> int:
        """Class embeddings of the U-Net, the null class among them; 0 for a model without classes."""
        return len(self.source.labels.names) + 1 if self.source and self.source.labels else 0

    def fresh_unet(self, *, learned_variance: bool = False) -> UNet2DConditionModel:
        """A U-Net with random weights."""
        config, source, encoders = self.config, self.source, self.encoders
        assert source is not None and encoders is not None
        text = encoders.text_outline
        return build_unet(
            config.unet,
            latent_shape=self.latent_shape,
            context_dim=text.dim if text else None,
            classes=self.classes,
            numbers=source.numbers.width if source.numbers else 0,
            condition_channels=self.condition_channels,
            learned_variance=learned_variance,
        )

    def train(self, unet: Any) -> None:
        """Train this U-Net."""
        if self.config.loop.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.add("unet", cast(nn.Module, torch.compile(unet)) if self.config.loop.compile else unet)
        if isinstance(self.timesteps, LossSecondMoment):
            self.train_state["timesteps"] = TrainState(self.timesteps)
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def unet(self) -> TrainState:
        """The U-Net's weights, optimizer and average."""
        return self.train_state["unet"]

    # --- samples ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        config, source, encoders, shape = self.config, self.source, self.encoders, self.latent_shape
        assert source is not None and encoders is not None
        self.prompts = build_prompt_set(config, source, encoders.text_outline)
        if config.cache_folder() is not None:
            buckets = buckets_of_all(config, source.train)
            cache = build_cache(config, source.train.all_pictures, encoders, shape, buckets=buckets)
            self.samples = self.latent_samples(cache)
            self.workers = config.data.workers if config.data.inpaint else 0
        self.heldout = self.validation_sets()
        if config.cache_folder() is not None:
            encoders.free()
        self.save_frozen(encoders)
        (self.stored,) = self.batches([range(min(STORED, config.loop.batch_size))])  # of one step: of one size

    def latent_samples(self, cache: LatentCache | None = None) -> LatentSamples:
        """The samples of the run, from a cache or from the pictures."""
        assert self.source is not None
        return LatentSamples.of(self.config, self.source.train, self.latent_shape, cache)

    def validation_sets(self) -> list[CaptionedValidationSet]:
        """The held-out pictures at fixed (t, eps), by bucket. Every rank must call it."""
        assert self.source is not None and self.encoders is not None
        device = self.accelerator.device
        return validation_sets(self.config, self.source.heldout, self.encoders, self.latent_shape, device, self.used)

    def load_vae(self) -> Any:
        """The VAE of pipelines, in float32."""
        assert self.encoders is not None
        return self.encoders.load_vae()

    def save_frozen(self, encoders: Encoders) -> None:
        """Save RUN/frozen, unless it is there as it was saved, and of the same."""
        folder, facts = Path(self.config.run) / "frozen", RunFacts(self.config.run)
        labels = self.source.labels.names if self.source and self.source.labels else None
        sampling = [self.scheduler, *astuple(self.defaults)]
        prompts = [prompt.prompt for prompt in self.prompts]
        numbers = [asdict(self.source.numbers)] if self.source and self.source.numbers else []
        made_of = [__version__, encoders.identity, sampling, prompts, labels, *numbers]

        def state() -> str:
            return stamp(made_of, written_stamp(folder))

        if on_rank_0(lambda _: int(encoders.identity is None or not facts.recall("frozen", state()))):
            encoders.free()  # pipelines have them in float32
            save_frozen(folder, self.load_vae, encoders.load_text, self.weightless_pipeline)
            facts.keep("frozen", state(), True)

    def batch(self, collated: dict[str, Any]) -> Batch:
        collated = to_device(collated, self.accelerator.device)
        encoders = self.encoders
        if encoders is not None and has_pixels(collated):
            collated = with_latents(collated, encoders.vae)
        if encoders is not None and "caption" in collated:
            collated = with_context(collated, encoders.text)
        return Batch.of(collated)

    def batches(self, numbers: Sequence[Sequence[int]]) -> list[Batch]:
        """A few batches; all pictures are encoded, then all captions: the encoders take turns in memory."""
        device, encoders = self.accelerator.device, self.encoders
        collated = [to_device(default_collate([self.samples[n] for n in part]), device) for part in numbers]
        if encoders is not None and has_pixels(collated[0]):
            collated = [with_latents(batch, encoders.vae) for batch in collated]
        if encoders is not None and "caption" in collated[0]:
            collated = [with_context(batch, encoders.text) for batch in collated]
        return [Batch.of(batch) for batch in collated]

    def frozen_facts(self) -> dict[str, str]:
        identity = self.encoders.identity if self.encoders else None
        facts = {"encoders": identity[:16]} if identity else {}
        if self.initial:
            facts["init_weights"] = self.initial.fingerprint(RunFacts(self.config.run))[:16]
        return facts

    def free(self) -> None:
        if self.encoders is not None:
            self.encoders.free()

    def other_needs(self) -> dict[str, int]:
        source, encoders = self.source, self.encoders
        assert source is not None and encoders is not None
        networks = [encoders.vae_outline, *([encoders.text_outline.model] if encoders.text_outline else [])]
        cache = cache_bytes(self.config, source, encoders, self.latent_shape)
        return {"pipeline": sum(float32_bytes(network) for network in networks), **({"cache": cache} if cache else {})}

    # --- one step ---------------------------------------------------------------------------------

    def output(self, unet: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """A U-Net's whole output, [B,C,h,w] or, with learned variance, [B,2C,h,w]; t may lie on the CPU."""
        with self.accelerator.autocast():
            return denoise(unet, x_t, t, conditioning)

    def loss(self, step: int, batch: Batch) -> dict[str, Tensor]:
        if step < self.config.loop.half_size_steps:
            batch = batch.halved()

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            return self.output(self.unet.module, x_t, t, batch.conditioning)

        t, weight = self.timesteps(batch.u)
        losses = self.objective(network, *self.learned(batch, t))  # (B,)
        self.seen.append((t, losses.detach()))
        return {"unet": beside(weight, losses) * losses}  # the weight corrects for the choice of t

    def learned(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the objective takes besides the network: x0, t, eps. They determine x_t and the target."""
        return batch.x0, t, batch.eps

    def after_step(self, skipped: Tensor) -> None:
        seen, self.seen = self.seen, []
        if isinstance(self.timesteps, LossSecondMoment) and not skipped.item():
            t, losses = (torch.cat(each).to(self.accelerator.device) for each in zip(*seen, strict=True))
            everyone = self.accelerator.gather((t, losses))
            self.timesteps.update(*(tensor.cpu() for tensor in everyone))

    # --- validation, export, preview --------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Inside, the U-Net has its averaged weights. Every rank must enter."""
        self.unet.module.eval()
        with torch.no_grad(), self.unet.averaged() as module:
            yield module
        self.unet.module.train()

    def validate(self) -> dict[str, float]:
        """The held-out loss by quarter of t, and by how much shuffled captions and none raise it."""
        if not self.heldout:
            return {}
        with self.evaluating() as unet:

            def prediction(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
                return self.output(unet, x_t, t, conditioning)[:, : x_t.shape[1]]

            of: Literal["eps", "x0"] = "x0" if self.used else "eps"  # of few steps, each shows its x0
            kind = self.config.diffusion.prediction
            use = CaptionLosses.together(
                [caption_losses(prediction, self.schedule, kind, one, of) for one in self.heldout]
            )
        return validation_metrics(use, self.used)

    @torch.no_grad()
    def error(self, unet: nn.Module) -> float:
        """The squared error of a U-Net's prediction on the stored batch, whatever loss it is trained with."""
        batch, kind = self.stored, self.config.diffusion.prediction

        def prediction(x_t: Tensor, t: Tensor) -> Tensor:
            return self.output(unet, x_t, t, batch.conditioning)[:, : x_t.shape[1]]

        t = at_share(batch.u, self.schedule.T)
        return float(diffusion_loss(prediction, self.schedule, batch.x0, t, batch.eps, prediction=kind).mean())

    def export(self, step: int) -> Path | None:
        """Save RUN/pipeline with the averaged weights."""
        run, precision = Path(self.config.run), self.accelerator.mixed_precision
        give_back()  # what steps have freed: the pipeline's U-Net is in memory beside the one in training
        with self.evaluating() as unet:
            weights = {name: tensor.clone() for name, tensor in whole_weights(unet).items()}
            expected = self.error(unet)

        def write(folder: Path, _: Tick) -> None:
            averaged = self.weightless_unet()
            averaged.load_state_dict(without_variance(weights, self.latent_shape[0]), assign=True)

            def error(loaded: Any) -> float:
                return self.error(loaded.to(self.accelerator.device).eval())

            write_pipeline(folder, run / "frozen", averaged, expected, error, precision, self.pipeline_class)

        self.exported = export(run / "pipeline", step, write, must=step == self.recipe.steps)
        return self.exported

    def weightless_unet(self) -> UNet2DConditionModel:
        """The U-Net of pipelines, its weights on the meta device."""
        if self.initial:
            return self.initial.weightless_unet(self.latent_shape[1], self.condition_channels).eval()
        with torch.device("meta"):
            return self.fresh_unet().eval()

    @property
    def scheduler(self) -> dict[str, Any]:
        """The config of the pipeline's scheduler, of first order for few steps, whose timesteps are no ODE's grid."""
        order = {"solver_order": 1} if self.used else {}
        return scheduler_config(self.schedule, self.config.diffusion.prediction) | order

    @property
    def defaults(self) -> Defaults:
        """The pipeline's sampling settings: of few steps those that were learned, unguided."""
        return Defaults(len(self.used), guidance_scale=1.0) if self.used else Defaults()

    def weightless_pipeline(self, vae: Any, text: TextEncoder | None) -> Any:
        """A pipeline of these encoders, with all but the U-Net's weights."""
        assert self.source is not None
        pipeline = LDMPipeline.from_components(vae, text, self.weightless_unet(), self.scheduler)
        pipeline.defaults = self.defaults
        pipeline.example_prompts = tuple(prompt.prompt for prompt in self.prompts if prompt.prompt)
        pipeline.labels, pipeline.numbers = self.source.labels, self.source.numbers
        return pipeline

    def preview(self, step: int, interrupted: Callable[[], bool]) -> Image.Image | None:
        """The prompt set, generated by RUN/pipeline as it was just saved."""
        if self.exported is None or not self.prompts:
            return None
        with quiet():
            pipeline = LDMPipeline.from_pretrained(self.exported).to(self.accelerator.device)
        grid = generate_grid(pipeline, self.prompts_at(step), self.config, interrupted)
        del pipeline
        give_back()
        return grid

    def prompts_at(self, step: int) -> Sequence[Prompt]:
        """The prompt set of the size that the U-Net has learned by this step."""
        return halved(self.prompts, self.config) if step <= self.config.loop.half_size_steps else self.prompts

    def summary(self) -> str:
        folder, labels = Path(self.config.run) / "pipeline", self.source.labels if self.source else None
        prompt = ' "a prompt"' if self.config.text.encoder else f" --class-label {labels.names[0]}" if labels else ""
        done = f"{self.title}: done; {folder} can be loaded"
        if not self.config.data.inpaint:
            return f"{done}; sample it with: ldm sample {folder}{prompt}"
        known = "" if self.latent_shape[0] == STOCK_CHANNELS else (
            f". Stock StableDiffusionInpaintPipeline takes latents of {STOCK_CHANNELS} channels alone, these have "
            f"{self.latent_shape[0]}: use LDMPipeline"
        )  # fmt: skip
        return f"{done}; edit with it: ldm edit {folder} PICTURE{prompt} --mask PICTURE{known}"


def validation_metrics(use: CaptionLosses, timesteps: Sequence[int] = ()) -> dict[str, float]:
    """What is logged of held-out pictures: the loss, by timestep or by quarter of t, and what other captions add."""
    names = {"shuffled": "text_gap", "null": "null_gap"}
    gaps = {names[name]: float(gap.mean()) for name, gap in use.gaps().items()}
    parts = by_timestep(use.true, timesteps) if timesteps else by_quarter(use.true)
    return {f"heldout/{name}": value for name, value in {**parts, **gaps}.items()}
