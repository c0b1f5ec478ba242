"""Training LoRA adapters beside a frozen model: the diffusion task, of which only small matrices learn.

`init` names the model, `lora` the adapters. What is left behind is RUN/lora, a file of a megabyte that stock
`load_lora_weights` puts into that model. There is no RUN/pipeline: it would be the model once more.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from PIL import Image
from torch import Tensor, nn

from ldm.data.cache.latents import LatentCache
from ldm.data.dataset import CaptionedPictures
from ldm.data.rows import count
from ldm.diffusion.forward import q_sample
from ldm.diffusion.parameterization import to_eps, to_x0
from ldm.inference import samplers
from ldm.models.fingerprint import base_fingerprints
from ldm.models.lora import (
    NAME,
    LoRAFacts,
    adapter_weights,
    add_adapters,
    alpha_of,
    require_peft,
    save_adapters,
)
from ldm.models.unet import choose_attention
from ldm.pipelines.loading import find_pipeline
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.memory import give_back
from ldm.training.checkpoint import has_begun
from ldm.training.config import Config
from ldm.training.distributed import Tick
from ldm.training.encoders import Encoders
from ldm.training.export import check_adapters, export, quiet
from ldm.training.facts import RunFacts
from ldm.training.previews import generate_grid
from ldm.training.prior import Prior, build_prior
from ldm.training.samples import Batch, LatentSamples
from ldm.training.tasks.diffusion import Diffusion
from ldm.training.text_adapters import TokenEncoders, UNetWithText
from ldm.training.trigger import find_trigger, plain_captions, trigger_of

EXAMPLES = 8  # captions in the file


class LoRA(Diffusion):
    """Adapters and their average, beside a frozen U-Net and, with lora.text_encoder, a frozen text encoder."""

    title = "LoRA"
    result = "lora"
    prior: Prior | None = None

    def __post_init__(self) -> None:
        require_peft()
        if self.config.lora.keep and self.encoders is not None and self.encoders.text_outline is None:
            raise ValueError(f"lora.keep: {self.config.init} takes no captions; set it to 0")
        if self.config.lora.text_encoder and not isinstance(self.encoders, TokenEncoders | None):
            self.encoders = TokenEncoders.of(self.encoders)
        super().__post_init__()

    @classmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Diffusion:
        lora = config.lora
        if lora.trigger or lora.keep:  # now, not after minutes of encoding
            trigger = trigger_of(pictures.train, lora.trigger)
            plain = plain_captions(pictures.train, trigger) if lora.keep else ()
            if plain and not has_begun(config.run, cls.name):
                accelerator.print(
                    f'lora.keep: prompts without "{trigger}" stay what the model makes of them: its example prompts '
                    f'and {count(len(plain), "caption")}, such as "{plain[0]}"'
                )
        return super().create(config, accelerator, pictures)

    @cached_property
    def trigger(self) -> str:
        """The words that call what is learned; "" if there are none."""
        assert self.source is not None
        if self.config.lora.trigger:
            return self.config.lora.trigger
        captions = [row.captions for row in self.source.train.pictures if row.captions]
        return find_trigger(itertools.chain(*captions)) or find_trigger(first for first, *_ in captions)

    # --- networks ---------------------------------------------------------------------------------

    def build(self) -> None:
        torch.manual_seed(self.config.seed)
        unet, text, config = self.initial_unet(), None, self.config.lora
        if config.text_encoder:
            assert self.encoders is not None and self.encoders.load_text is not None
            text = self.encoders.load_text().model
        self.base_weights = base_fingerprints(unet)
        kernel = choose_attention(unet, self.accelerator.device)
        add_adapters(unet, text, config)
        both = "U-Net and text encoder" if config.text_encoder else "U-Net"
        self.details = f" of {both} learn, latents {list(self.latent_shape)}, attention by {kernel}"
        self.train(unet if text is None else UNetWithText(unet, text))

    @cached_property
    def base(self) -> Path:
        """The folder of the model that the adapters belong to."""
        return find_pipeline(self.config.init or "")

    def load_base(self, **left_out: None) -> LDMPipeline:
        """That model, on the run's device, in float32."""
        with quiet():
            return LDMPipeline.from_pretrained(self.base, **left_out).to(self.accelerator.device)

    def save_frozen(self, encoders: Encoders) -> None:
        """Nothing: the encoders are the base's."""

    def other_needs(self) -> dict[str, int]:
        return {name: size for name, size in super().other_needs().items() if name == "cache"}

    # --- samples, one step ------------------------------------------------------------------------

    def prepare(self) -> None:
        config, source = self.config, self.source
        if config.lora.keep:
            assert self.initial is not None and source is not None
            model = self.initial.fingerprint(RunFacts(config.run))
            captions = plain_captions(source.train.pictures, self.trigger)
            self.prior = build_prior(config.lora.keep, Path(config.run), model, captions, self.load_base, config.seed)
            give_back()
        super().prepare()

    def latent_samples(self, cache: LatentCache | None = None) -> LatentSamples:
        return replace(super().latent_samples(cache), prior=self.prior)

    @torch.no_grad()
    def learned(self, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0, t, eps; those of kept samples are what the model itself predicts from their x_t, which stays the same."""
        x0, eps = batch.x0, batch.eps
        if batch.kept is None or not batch.kept.any():
            return x0, t, eps
        kept, kind = batch.kept.nonzero()[:, 0], self.config.diffusion.prediction
        times, x_t = t[kept], q_sample(self.schedule, x0[kept], t[kept], eps[kept])
        unet = networks_of(self.unet.module)["unet"]
        unet.disable_adapters()
        output = self.output(unet, x_t, times, batch.conditioning[kept]).to(x_t.dtype)
        unet.enable_adapters()
        both = self.schedule.at(times, x_t)
        rows = kept.to(x0.device)
        x0 = x0.index_copy(0, rows, to_x0(kind, output, x_t, *both))
        return x0, t, eps.index_copy(0, rows, to_eps(kind, output, x_t, *both))

    # --- export, preview --------------------------------------------------------------------------

    def export(self, step: int) -> Path | None:
        """Save RUN/lora with the averaged adapters, as the base loads them with the same loss."""
        give_back()
        with self.evaluating() as module:
            weights = {
                name: {key: tensor.detach().cpu().clone() for key, tensor in adapter_weights(network).items()}
                for name, network in networks_of(module).items()
            }
            expected = self.error(module)
        configs = {name: network.peft_config[NAME] for name, network in networks_of(self.unet.module).items()}

        def error(pipeline: LDMPipeline) -> float:
            text = pipeline.text_encoder
            return self.error(
                (UNetWithText(pipeline.unet, text) if "text_encoder" in weights else pipeline.unet).eval()
            )

        def write(folder: Path, _: Tick) -> None:
            save_adapters(folder, weights["unet"], weights.get("text_encoder", {}), configs, self.facts())
            text = {} if "text_encoder" in weights else {"text_encoder": None}
            loaded = self.load_base(vae=None, **text)
            check_adapters(folder, loaded, weights, expected, error, self.accelerator.mixed_precision)

        self.exported = export(Path(self.config.run) / self.result, step, write, must=step == self.recipe.steps)
        return self.exported

    def facts(self) -> LoRAFacts:
        """What is written beside the adapters."""
        assert self.source is not None
        config, captions = self.config.lora, [row.captions[0] for row in self.source.train.pictures if row.captions]
        every = max(1, len(captions) // EXAMPLES)
        return LoRAFacts(
            base=base_name(self.config.init or ""),
            base_weights=self.base_weights,
            trigger=self.trigger,
            prompts=captions[::every][:EXAMPLES],
            rank=config.rank,
            alpha=alpha_of(config),
            dora=config.dora,
            text_encoder=config.text_encoder,
            few_steps=self.config.diffusion.few_steps,
        )

    def preview(self, step: int, interrupted: Callable[[], bool]) -> Image.Image | None:
        """The prompt set, generated by the base with RUN/lora as it was just saved."""
        if self.exported is None or not self.prompts:
            return None
        pipeline = self.load_base()
        pipeline.load_lora_weights(self.exported)
        if self.sampler:  # as `summary` has it sampled
            pipeline.scheduler = samplers.build(self.sampler, pipeline.scheduler.config)
        grid = generate_grid(pipeline, self.prompts_at(step), self.config, interrupted)
        del pipeline
        give_back()
        return grid

    @property
    def sampler(self) -> str | None:
        """What a LoRA of few steps is sampled with; None is the base's own."""
        return "ddim" if self.used else None

    def summary(self) -> str:
        folder = Path(self.config.run) / self.result
        prompt, settings = next(iter(self.facts().prompts), "a prompt"), ""
        if self.sampler:
            settings = f" --steps {self.facts().few_steps} --guidance-scale 1 --sampler {self.sampler}"
        elif self.config.lora.keep:
            settings = " --steps 20 --guidance-scale 2"
        words = f"{self.config.init} {shlex.quote(prompt)} --lora {folder}{settings}"
        return f"LoRA: done; sample it with: ldm sample {words}"


def networks_of(module: nn.Module) -> dict[str, Any]:
    """The networks that have adapters, by their names in a pipeline."""
    network: Any = extract_model_from_parallel(module, keep_torch_compile=False)
    if isinstance(network, UNetWithText):
        return {"unet": network.unet, "text_encoder": network.text_encoder}
    return {"unet": network}


def base_name(init: str) -> str:
    """A model's name without folders of this machine: a Hub id, or a folder's last name, for RUN/pipeline the run's."""
    path = Path(init)
    if not path.exists():
        return init
    path = path.resolve()
    return path.parent.name if path.name == "pipeline" else path.name
