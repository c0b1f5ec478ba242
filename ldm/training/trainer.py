"""One step, and the loop around it. The mathematics is in ldm.diffusion, chance in draws.py."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.diffusion.losses import diffusion_loss
from ldm.diffusion.schedule import NoiseSchedule, beside
from ldm.diffusion.timesteps import LossSecondMoment, TimestepSampler, at_share
from ldm.evaluation.validation import CaptionedValidationSet, by_quarter, caption_losses
from ldm.models.conditioning import Conditioning, denoise
from ldm.models.ema import averaged, build_ema
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.memory import give_back
from ldm.training.checkpoint import resume, save_checkpoint
from ldm.training.config import Config, to_dict
from ldm.training.distributed import Peers
from ldm.training.encoders import Encoders
from ldm.training.export import BuildUNet, export
from ldm.training.learning_rate import learning_rate
from ldm.training.logging import Tracker
from ldm.training.monitor import Watch, batch_of, mean_of_finite, telling, update
from ldm.training.objective import Objective, build_objective, build_timesteps
from ldm.training.previews import Wish, draw_wishes
from ldm.training.samples import Batch, Samples, batches, numbers_of
from ldm.training.selfcheck import quiet
from ldm.training.signals import Noted, Stopped, noted
from ldm.training.train_state import Trainee

STORED = 8  # samples in the batch that exported pipelines are asked


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
        return learning_rate(optim.lr, step, self.config.loop.steps, optim.warmup, optim.decay, optim.cooldown)

    def answer(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """All that the U-Net says, [B,C,h,w] or, with learned variance, [B,2C,h,w]; t may lie on the CPU."""
        with self.accelerator.autocast():
            return denoise(self.unet, x_t, t, conditioning)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """t of each sample, its loss there, and the weight that corrects for the choice of t; each [B]."""
        t, weight = self.timesteps(batch.u)
        losses = self.objective(lambda x_t, t: self.answer(x_t, t, batch.conditioning), batch.x0, t, batch.eps)
        return t, losses, beside(weight, losses)

    def prediction(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction [B,C,h,w], without the variance if it is learned."""
        return self.answer(x_t, t, conditioning)[:, : x_t.shape[1]]

    def step(self, step: int, parts: list[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step on the accumulated parts of this process's share.

        Returns:
            Its mean loss, detached, and 1.0 if the step was skipped because a gradient was not finite, else 0.0.
        """
        if step < self.config.loop.half_size_steps:
            parts = [batch.halved() for batch in parts]
        total = torch.zeros((), device=self.accelerator.device)
        seen = []
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.unet):
                t, losses, weight = self.losses(batch)
                loss = (weight * losses).mean() / len(parts)
                self.accelerator.backward(telling(loss))
            total += loss.detach()
            seen.append((t, losses.detach()))
        lr = self.learning_rate(step)
        skipped = update(self.accelerator, self.unet, self.optimizer, lr, self.config.optim.clip)
        self.ema.step(self.unet.parameters())
        if isinstance(self.timesteps, LossSecondMoment) and not skipped.item():
            t, losses = (torch.cat(each).to(self.accelerator.device) for each in zip(*seen, strict=True))
            everyone = self.accelerator.gather((t, losses))
            self.timesteps.update(*(tensor.cpu() for tensor in everyone))
        return total, skipped

    @torch.no_grad()
    def heldout(self, questions: CaptionedValidationSet) -> dict[str, float]:
        """The held-out loss of the averaged weights, and by how much wrong captions and none raise it."""
        self.unet.eval()
        with averaged(self.unet, self.ema):
            use = caption_losses(self.prediction, self.schedule, self.config.diffusion.prediction, questions)
        self.unet.train()
        names = {"shuffled": "text_gap", "null": "null_gap"}
        return {**by_quarter(use.true), **{names[name]: float(gap.mean()) for name, gap in use.gaps().items()}}

    def error(self, batch: Batch) -> Tensor:
        """The plain squared error of the prediction on a batch, whatever is minimized; a scalar."""
        t, kind = at_share(batch.u, self.schedule.T), self.config.diffusion.prediction
        return diffusion_loss(
            lambda x_t, t: self.prediction(x_t, t, batch.conditioning),
            self.schedule, batch.x0, t, batch.eps, prediction=kind,
        ).mean()  # fmt: skip

    @torch.no_grad()
    def averaged_error(self, batch: Batch) -> float:
        """The error of the averaged weights on a batch. Every rank must call it."""
        self.unet.eval()
        with averaged(self.unet, self.ema):
            error = float(self.error(batch))
        self.unet.train()
        return error


def fit(
    training: Training,
    samples: Samples,
    questions: CaptionedValidationSet | None,
    wishes: Sequence[Wish],
    build_unet: BuildUNet,
    tracker: Tracker,
    encoders: Encoders,
) -> list[float]:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        samples: sample n of the run.
        questions: held-out pictures, or None if there are none.
        wishes: what to draw on the way.
        build_unet: makes what is saved in RUN/pipeline, beside what lies in RUN/frozen.
        encoders: of the samples, if they have no cache.
    Returns:
        The loss of each step that this call trained, averaged over all processes.
    Raises:
        Stopped: by a signal, with this step saved.
        RunError: if too many steps in a row were not finite, or what must be saved can't be.
    """
    config, accelerator, loop = training.config, training.accelerator, training.config.loop
    folder, facts = Path(config.run) / "checkpoints", {"pictures": len(samples.source)}
    first = resume(folder, training.trainees, accelerator, loop.steps, to_dict(config), facts)

    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(first, loop.steps, loop.batch_size, loop.accumulation, rank, processes)
    stream = batches(samples, numbers, accelerator.device, encoders)
    stored = next(batches(samples, [range(STORED)], accelerator.device, encoders))
    watch = Watch(
        accelerator,
        tracker,
        batch_of(config.seed, loop.batch_size, samples.source.pictures),
        training.learning_rate,
        max_skipped=loop.max_skipped,
        spike=loop.spike,
    )
    history: list[float] = []

    def save(done: int) -> None:
        last = done == loop.steps or watch.signal != 0
        save_checkpoint(folder, done, to_dict(config), training.trainees, accelerator, loop.keep, facts, must=last)

    def show(done: int, signal: Noted) -> None:
        """What follows a checkpoint; a run that was killed in it does it again."""
        if questions is not None and due(done, loop.evaluate_every, loop.steps):
            log_heldout(training, questions, done, bar, tracker)
        drawing = due(done, loop.sample_every, loop.steps)
        if drawing or due(done, loop.checkpoint_every, loop.steps) or done == loop.steps:
            save_and_draw(training, wishes if drawing else (), build_unet, stored, done, tracker, signal)
            accelerator.wait_for_everyone()

    bar = tqdm(range(first, loop.steps), initial=first, total=loop.steps, unit="step", desc="U-Net")
    with noted() as signal, Peers(accelerator) as peers:
        if first:
            show(first, signal)
        for step in bar:
            loss, skipped = training.step(step, [next(stream) for _ in range(loop.accumulation)])
            watch.hear(step, loss, skipped, signal.number)
            done = step + 1
            if due(done, loop.log_every, loop.steps) or watch.signal:
                history += log_losses(training, watch, done, bar, tracker)
            saving = due(done, loop.checkpoint_every, loop.steps)
            if saving or watch.signal:
                save(done)
            if watch.signal:
                peers.close()
                accelerator.wait_for_everyone()
                tracker.close()
                raise Stopped(watch.signal, f"step {done} of {loop.steps} is saved in {folder}")
            show(done, signal)
        peers.close()
        accelerator.wait_for_everyone()
    tracker.close()
    return history


def save_and_draw(
    training: Training,
    wishes: Sequence[Wish],
    build_unet: BuildUNet,
    stored: Batch,
    done: int,
    tracker: Tracker,
    signal: Noted,
) -> None:
    """Save RUN/pipeline and draw the wishes with it. Every rank must call it."""
    folder = export(training, build_unet, stored, done)
    if folder is not None and wishes:
        with quiet():
            pipeline = LDMPipeline.from_pretrained(folder).to(training.accelerator.device)
        grid = draw_wishes(pipeline, wishes, training.config, signal)
        if grid is not None:
            tracker.picture("samples", done, grid)
        del pipeline
        give_back()


def log_losses(training: Training, watch: Watch, done: int, bar: Any, tracker: Tracker) -> list[float]:
    """Tell the losses since the last line; returns each of them, NaN and infinities of skipped steps included."""
    losses = watch.take_losses()
    scalars = {
        "lr": training.learning_rate(done - 1),
        "images_per_second": (bar.format_dict["rate"] or 0.0) * training.config.loop.batch_size,
    }
    if watch.skipped:
        scalars["skipped"] = watch.skipped
    mean = mean_of_finite(losses)
    if mean is not None:
        scalars["loss"] = mean
    tracker.scalars(done, scalars)
    told = "no step was finite" if mean is None else f"loss {mean:.4f}"
    bar.set_postfix_str(f"{told}, {scalars['images_per_second']:.1f} images/s")
    return losses


def log_heldout(training: Training, questions: CaptionedValidationSet, done: int, bar: Any, tracker: Tracker) -> None:
    """Tell the loss on the held-out pictures, in total and by quarter of t."""
    heldout = training.heldout(questions)
    tracker.scalars(done, {f"heldout/{name}": value for name, value in heldout.items()})
    if training.accelerator.is_main_process:
        told = ", ".join(f"{name} {value:.4f}" for name, value in heldout.items())
        bar.write(f"step {done}: held-out loss {told}")


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; 0 is never."""
    return every > 0 and (done % every == 0 or done == steps)
