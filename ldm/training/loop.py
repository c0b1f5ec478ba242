"""One step, and the loop around it. The mathematics is in ldm.diffusion, chance in draws.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.timesteps import LossSecondMoment, TimestepSampler
from ldm.evaluation.heldout import HeldOut, heldout_loss
from ldm.models.conditioning import Conditioning, denoise
from ldm.models.ema import averaged, build_ema
from ldm.training.checkpoint import (
    Trainee,
    averaged_weights,
    put_in_place,
    resume,
    save_checkpoint,
    temporary_beside,
)
from ldm.training.config import Config, to_dict
from ldm.training.drawing import Wish, draw_wishes
from ldm.training.encoders import Encoders
from ldm.training.learning_rate import learning_rate
from ldm.training.objective import Objective, build_objective, build_timesteps
from ldm.training.samples import Batch, Samples, batches, numbers_of
from ldm.training.tracking import Tracker

#: U-Net weights on the CPU => the pipeline they make.
BuildPipeline = Callable[[dict[str, Tensor]], Any]


@dataclass
class Training:
    """Everything that a run trains with. `fit` runs it; `step` is one batch."""

    config: Config
    accelerator: Accelerator
    schedule: NoiseSchedule
    unet: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    timesteps: TimestepSampler
    objective: Objective

    @classmethod
    def prepare(cls, config: Config, accelerator: Accelerator, schedule: NoiseSchedule, unet: Any) -> Training:
        """Hand a fresh U-Net over to accelerate (DDP, FSDP, mixed precision) and make its optimizer and average."""
        if config.loop.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if config.loop.compile:
            unet = torch.compile(unet)
        optim = config.optim
        device_type = accelerator.device.type
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=device_type in ("cpu", "cuda"),  # on a CPU the default is a loop over tensors
        )
        unet, optimizer = accelerator.prepare(unet.train(), optimizer)
        return cls(
            config,
            accelerator,
            schedule,
            unet,
            optimizer,
            ema=build_ema(unet, optim.ema_decay),
            timesteps=build_timesteps(config.diffusion),
            objective=build_objective(config.diffusion, schedule),
        )

    @property
    def trainees(self) -> dict[str, Trainee]:
        """What a checkpoint holds."""
        found = {"unet": Trainee(self.unet, self.optimizer, self.ema)}
        if isinstance(self.timesteps, LossSecondMoment):
            found["timesteps"] = Trainee(self.timesteps)
        return found

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        optim = self.config.optim
        return learning_rate(optim.lr, step, self.config.loop.steps, optim.warmup, optim.decay)

    def answer(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """All that the U-Net says, [B,C,h,w] or, with learned variance, [B,2C,h,w]; t may lie on the CPU."""
        with self.accelerator.autocast():
            return denoise(self.unet, x_t, t, conditioning)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """t of each sample, its loss there, and the weight that corrects for the choice of t; each [B]."""
        t, weight = self.timesteps(batch.u)
        losses = self.objective(lambda x_t, t: self.answer(x_t, t, batch.conditioning), batch.x0, t, batch.eps)
        return t, losses, weight.to(losses)

    def step(self, step: int, parts: list[Batch]) -> Tensor:
        """One optimizer step on the accumulated parts of this process's share; returns its mean loss, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        total = torch.zeros((), device=self.accelerator.device)
        seen = []
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.unet):
                t, losses, weight = self.losses(batch)
                loss = (weight * losses).mean() / len(parts)
                self.accelerator.backward(loss)
            total += loss.detach()
            seen.append((t.to(losses.device), losses.detach()))
        self.accelerator.clip_grad_norm_(self.unet.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        if isinstance(self.timesteps, LossSecondMoment):
            everyone = self.accelerator.gather(tuple(map(torch.cat, zip(*seen, strict=True))))
            self.timesteps.update(*(tensor.cpu() for tensor in everyone))
        return total

    def heldout(self, questions: HeldOut) -> dict[str, float]:
        """The held-out loss of the averaged weights."""
        self.unet.eval()
        with averaged(self.unet, self.ema):
            losses = heldout_loss(
                lambda x_t, *told: self.answer(x_t, *told)[:, : x_t.shape[1]],  # without the variance, if it is learned
                self.schedule,
                self.config.diffusion.prediction,
                questions,
            )
        self.unet.train()
        return losses


def fit(
    training: Training,
    samples: Samples,
    questions: HeldOut | None,
    wishes: Sequence[Wish],
    build_pipeline: BuildPipeline,
    tracker: Tracker,
    encoders: Encoders,
) -> list[float]:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        samples: sample n of the run.
        questions: held-out pictures, or None if there are none.
        wishes: what to draw on the way.
        build_pipeline: makes what is saved in RUN/pipeline and draws.
        encoders: of the samples if they have no cache; else let go as soon as a pipeline is saved and has drawn.
    Returns:
        The loss of each step that this call trained, averaged over all processes.
    """
    config, accelerator, loop = training.config, training.accelerator, training.config.loop
    folder = Path(config.run) / "checkpoints"
    first = resume(folder, training.trainees, accelerator, loop.steps)

    numbers = numbers_of(
        first, loop.steps, loop.batch_size, loop.accumulation, accelerator.process_index, accelerator.num_processes
    )
    stream = batches(samples, numbers, accelerator.device, encoders)
    losses: list[Tensor] = []
    history: list[float] = []
    bar = tqdm(range(first, loop.steps), initial=first, total=loop.steps, unit="step", desc="U-Net")
    for step in bar:
        losses.append(training.step(step, [next(stream) for _ in range(loop.accumulation)]))
        done = step + 1
        if due(done, loop.log_every, loop.steps):
            history += log_losses(training, losses, done, bar, tracker)
            losses = []
        if questions is not None and due(done, loop.evaluate_every, loop.steps):
            log_heldout(training, questions, done, bar, tracker)
        saving, drawing = due(done, loop.checkpoint_every, loop.steps), due(done, loop.sample_every, loop.steps)
        if saving:
            save_checkpoint(folder, done, to_dict(config), training.trainees, accelerator, loop.keep)
        if saving or drawing or done == loop.steps:
            show(training, wishes, build_pipeline, tracker, done, drawing)
            if samples.cache is not None:
                encoders.free()
            accelerator.wait_for_everyone()
    tracker.close()
    return history


def log_losses(training: Training, losses: list[Tensor], done: int, bar: Any, tracker: Tracker) -> list[float]:
    """Average the last steps' losses over all processes and tell them: one synchronization a line, none a step."""
    loop = training.config.loop
    mean: list[float] = training.accelerator.reduce(torch.stack(losses), "mean").tolist()
    scalars = {
        "loss": sum(mean) / len(mean),
        "lr": training.learning_rate(done - 1),
        "images_per_second": (bar.format_dict["rate"] or 0.0) * loop.batch_size,
    }
    tracker.scalars(done, scalars)
    bar.set_postfix_str(f"loss {scalars['loss']:.4f}, {scalars['images_per_second']:.1f} images/s")
    return mean


def log_heldout(training: Training, questions: HeldOut, done: int, bar: Any, tracker: Tracker) -> None:
    """Tell the loss on the held-out pictures, in total and by quarter of t."""
    heldout = training.heldout(questions)
    tracker.scalars(done, {f"heldout/{name}": value for name, value in heldout.items()})
    if training.accelerator.is_main_process:
        told = ", ".join(f"{name} {value:.4f}" for name, value in heldout.items())
        bar.write(f"step {done}: held-out loss {told}")


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; 0 is never."""
    return every > 0 and (done % every == 0 or done == steps)


def export(training: Training, build_pipeline: BuildPipeline) -> Any:
    """Save RUN/pipeline with the averaged weights; returns it on rank 0, None elsewhere. Every rank must call it."""
    weights = averaged_weights(training.unet, training.ema)
    if not training.accelerator.is_main_process:
        return None
    pipeline = build_pipeline(weights)
    final = Path(training.config.run) / "pipeline"
    temporary = temporary_beside(final)
    pipeline.save_pretrained(temporary)
    put_in_place(temporary, final)
    return pipeline


def show(
    training: Training,
    wishes: Sequence[Wish],
    build_pipeline: BuildPipeline,
    tracker: Tracker,
    done: int,
    drawing: bool,
) -> None:
    """Save RUN/pipeline and, if asked, draw the wishes with it. Every rank must call it."""
    pipeline = export(training, build_pipeline)
    if pipeline is not None and drawing and wishes:
        tracker.picture("samples", done, draw_wishes(pipeline, wishes, training.config))
