"""Training a student of few steps: guided consistency distillation (ldm.diffusion.distillation; Luo et al. 2023).

`init` names the teacher. The student begins as a copy of it, with a layer of zeros for the embedded guidance scale, so
at step 0 it predicts what the unguided teacher does, to the last bit. The average of its weights is both what it learns
from and what is exported: a pipeline with stock's LCMScheduler, whose U-Net has `time_cond_proj_dim`, by which stock
pipelines know that one evaluation a step is enough. With `distill.embedding=0` the student knows one guidance scale,
and may be a LoRA on its teacher (Luo et al. 2023, "LCM-LoRA").
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ldm.data.dataset import CaptionedPictures
from ldm.diffusion.distillation import consistency_loss, solver_pairs
from ldm.diffusion.guidance import guide
from ldm.diffusion.schedule import RectifiedFlow, beside
from ldm.evaluation.validation import CaptionLosses, ValidationSet, with_each_caption
from ldm.inference.defaults import Defaults
from ldm.models.conditioning import Conditioning, denoise, scale_embedding, together
from ldm.models.ema import averaged
from ldm.models.lora import LoRAFacts
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import choose_attention, student_of
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.training.config import Config
from ldm.training.initial_model import InitialModel
from ldm.training.samples import Batch, LatentSamples
from ldm.training.tasks.diffusion import Diffusion, validation_metrics
from ldm.training.tasks.lora import LoRA


@dataclass
class Distillation(Diffusion):
    """A student and its average, beside a frozen teacher.

    Attributes:
        null_context: [1,L,D] of the empty caption, which the teacher's guidance moves away from; known once samples
            can be encoded.
    """

    name = "distill"
    title = "student"

    null_context: Tensor | None = None

    @classmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Diffusion:
        teacher = InitialModel.open(config.init or "")
        steps = config.distill.solver_steps
        if isinstance(teacher.schedule, RectifiedFlow):
            raise ValueError(f"init: {config.init} is a rectified flow, which stock LCMScheduler can't sample")
        if teacher.schedule.T % steps:
            raise ValueError(
                f"distill.solver_steps: expected a divisor of init's {teacher.schedule.T} timesteps, got {steps}"
            )
        if teacher.text is None and teacher.labels is None and teacher.numbers is None:
            raise ValueError(
                f"init: {config.init} is not conditioned on captions, classes or numbers, so there is no guidance to "
                "distill; use `ldm train ldm` with diffusion.few_steps"
            )
        return super().create(config, accelerator, pictures)

    # --- networks ---------------------------------------------------------------------------------

    def build(self) -> None:
        torch.manual_seed(self.config.seed)
        self.teacher: Any = self.initial_unet().to(self.accelerator.device).eval().requires_grad_(False)
        choose_attention(self.teacher, self.accelerator.device)
        embedding = self.config.distill.embedding
        student = student_of(self.teacher, embedding) if embedding else copy.deepcopy(self.teacher).requires_grad_(True)
        kernel = choose_attention(student, self.accelerator.device)
        self.details = f", latents {list(self.latent_shape)}, attention by {kernel}"
        self.train(student)

    def weightless_unet(self) -> UNet2DConditionModel:
        teacher = super().weightless_unet()
        if not self.config.distill.embedding:
            return teacher
        with torch.device("meta"):
            return student_of(teacher, self.config.distill.embedding).eval()

    # --- samples ----------------------------------------------------------------------------------

    def batch(self, collated: dict[str, Any]) -> Batch:
        self.know_null_context()
        return super().batch(collated)

    def batches(self, numbers: Any) -> list[Batch]:
        self.know_null_context()
        return super().batches(numbers)

    def know_null_context(self) -> None:
        """Take the context of the empty caption from the cache, or encode it."""
        samples, encoders = self.samples, self.encoders
        if self.null_context is not None or encoders is None or not encoders.load_text:
            return
        if isinstance(samples, LatentSamples) and samples.cache is not None:
            with samples.cache.reading():
                context = samples.cache.context("")[None]
        else:
            assert encoders.text is not None
            context = encoders.text.encode([""])
        self.null_context = context.to(self.accelerator.device)

    def null(self, conditioning: Conditioning, count: int) -> Conditioning:
        """What guidance moves away from, [count]: no caption, class or numbers, but the same second picture."""
        context, classes = None, conditioning.class_labels
        if conditioning.context is not None and self.null_context is not None:
            context = self.null_context.to(conditioning.context).expand(count, -1, -1)
        if classes is not None and self.source is not None:
            classes = torch.as_tensor(self.source.null_input).to(classes).expand_as(classes)
        return Conditioning(context, classes, conditioning.channels)

    # --- one step ---------------------------------------------------------------------------------

    def output(
        self, unet: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, scale: Tensor | None = None
    ) -> Tensor:
        """A student's output [B,C,h,w] at guidance scales [B], by default the middle one."""
        distill, stock = self.config.distill, {}
        if distill.embedding:
            scale = torch.full((len(x_t),), distill.usual_scale) if scale is None else scale
            stock["timestep_cond"] = beside(scale_embedding(scale, distill.embedding), x_t)
        with self.accelerator.autocast():
            return denoise(unet, x_t, t, conditioning, **stock)

    def guided(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, scale: Tensor) -> Tensor:
        """The teacher's guided prediction [B,C,h,w] at guidance scales [B]."""
        both = together([self.null(conditioning, len(x_t)), conditioning])
        with self.accelerator.autocast():
            output = denoise(self.teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()
        negative, positive = output.chunk(2)
        return guide(positive, negative, beside(scale, x_t).reshape(-1, 1, 1, 1))

    def losses(
        self, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, scale: Tensor, conditioning: Conditioning,
        average: Any = nullcontext,
    ) -> Tensor:  # fmt: skip
        """The loss of each sample [B].

        Args:
            scale: float32 [B], on the CPU like t and s.
            average: a context in which the U-Net has its averaged weights.
        """

        def student(x_t: Tensor, t: Tensor) -> Tensor:
            return self.output(self.unet.module, x_t, t, conditioning, scale).float()

        def target(x_s: Tensor, s: Tensor) -> Tensor:
            with average():
                return student(x_s, s)

        def teacher(x_t: Tensor, t: Tensor) -> Tensor:
            return self.guided(x_t, t, conditioning, scale)

        return consistency_loss(
            student, target, teacher, self.schedule, self.config.diffusion.prediction, x0, eps, t, s,
            huber_c=self.config.distill.huber_c,
        )  # fmt: skip

    def loss(self, step: int, batch: Batch) -> dict[str, Tensor]:
        if step < self.config.loop.half_size_steps:
            batch = batch.halved()
        (low, high), ema = self.config.distill.guidance_scale, self.unet.ema
        assert ema is not None
        t, s, share = solver_pairs(batch.u, self.schedule.T, self.config.distill.solver_steps)
        scale = (low + share * (high - low)).float()
        average = partial(averaged, self.unet.module, ema)
        return {"unet": self.losses(batch.x0, batch.eps, t, s, scale, batch.conditioning, average)}

    def after_step(self, skipped: Tensor) -> None:
        """Nothing: the average follows in the loop, and t is uniform."""

    # --- validation, export -----------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """The loss of the average on held-out pictures by quarter of t, at the middle scale."""
        if not self.heldout:
            return {}
        T, steps = self.schedule.T, self.config.distill.solver_steps

        def errors(fixed: ValidationSet) -> Tensor:
            rows = []
            for at, eps in zip(fixed.t, fixed.eps, strict=True):
                t, s, _ = solver_pairs(at.double() / T, T, steps)
                scale = torch.full((len(t),), self.config.distill.usual_scale)
                found = [
                    self.losses(fixed.x0[part], eps[part], t[part], s[part], scale[part], fixed.conditioning[part])
                    for part in torch.arange(len(t)).split(self.config.loop.batch_size)
                ]
                rows.append(torch.cat(found).cpu())
            return torch.stack(rows)

        with self.evaluating():
            use = CaptionLosses.together([with_each_caption(errors, one) for one in self.heldout])
        return validation_metrics(use)

    @property
    def defaults(self) -> Defaults:
        distill = self.config.distill
        return Defaults(distill.steps, distill.usual_scale if distill.embedding else 1.0)

    @property
    def scheduler(self) -> dict[str, Any]:
        return super().scheduler | {"original_inference_steps": self.config.distill.solver_steps}

    def weightless_pipeline(self, vae: Any, text: TextEncoder | None) -> LDMPipeline:
        pipeline = super().weightless_pipeline(vae, text)
        pipeline.register_modules(scheduler=LCMScheduler.from_config({**self.scheduler, "steps_offset": 1}))
        return pipeline


class LoRADistillation(LoRA, Distillation):
    """A student that is adapters on its teacher, and their average, beside the teacher without them."""

    def build(self) -> None:
        super().build()
        self.teacher = self.initial_unet().to(self.accelerator.device).eval().requires_grad_(False)
        choose_attention(self.teacher, self.accelerator.device)

    @property
    def sampler(self) -> str | None:
        return "lcm"

    def facts(self) -> LoRAFacts:
        return replace(super().facts(), few_steps=self.config.distill.steps, sampler="lcm")
