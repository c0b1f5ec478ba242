"""One step, and the loop around it. The mathematics is in ldm.diffusion, chance in draws.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.heldout import HeldOut, heldout_loss
from ldm.models.ema import averaged, build_ema
from ldm.training.checkpoint import resume, save_checkpoint
from ldm.training.config import Config, to_dict
from ldm.training.export import BuildPipeline, draw_prompts, export
from ldm.training.health import Watch, batch_of, mean_of_finite, telling, update
from ldm.training.learning_rate import learning_rate
from ldm.training.peers import Peers
from ldm.training.samples import Batch, Samples, batches, numbers_of
from ldm.training.signals import Noted, Stopped, noted
from ldm.training.tracking import Tracker
from ldm.training.trainee import Trainee

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
        return cls(config, accelerator, schedule, unet, optimizer, build_ema(unet, optim.ema_decay))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        optim = self.config.optim
        return learning_rate(optim.lr, step, self.config.loop.steps, optim.warmup, optim.decay)

    def predict(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net's answer; t may lie on the CPU."""
        with self.accelerator.autocast():
            output: Tensor = self.unet(x_t, t.to(x_t.device), encoder_hidden_states=context).sample
        return output

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        diffusion = self.config.diffusion
        return diffusion_loss(
            lambda x_t, t: self.predict(x_t, t, batch.context),
            self.schedule,
            batch.x0,
            batch.t,
            batch.eps,
            prediction=diffusion.prediction,
            min_snr_gamma=diffusion.min_snr_gamma,
        ).mean()

    def step(self, step: int, parts: list[Batch]) -> tuple[Tensor, Tensor]:
        """One optimizer step on the accumulated parts of this process's share.

        Returns:
            Its mean loss, detached, and 1.0 if the step was skipped because a gradient was not finite, else 0.0.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.unet):
                loss = self.loss(batch) / len(parts)
                self.accelerator.backward(telling(loss))
            total += loss.detach()
        lr = self.learning_rate(step)
        skipped = update(self.accelerator, self.unet, self.optimizer, lr, self.config.optim.clip)
        self.ema.step(self.unet.parameters())
        return total, skipped

    def heldout(self, questions: HeldOut) -> dict[str, float]:
        """The held-out loss of the averaged weights."""
        self.unet.eval()
        with averaged(self.unet, self.ema):
            losses = heldout_loss(self.predict, self.schedule, self.config.diffusion.prediction, questions)
        self.unet.train()
        return losses

    @torch.no_grad()
    def averaged_loss(self, batch: Batch) -> float:
        """The loss of the averaged weights on a batch. Every rank must call it."""
        self.unet.eval()
        with averaged(self.unet, self.ema):
            loss = float(self.loss(batch))
        self.unet.train()
        return loss


def fit(
    training: Training,
    samples: Samples,
    questions: HeldOut | None,
    build_pipeline: BuildPipeline,
    tracker: Tracker,
    encoders: tuple[Any, Any] | None = None,
) -> list[float]:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        samples: sample n of the run.
        questions: held-out pictures, or None if there are none.
        build_pipeline: makes what is saved in RUN/pipeline and draws the prompts.
        encoders: (VAE, text encoder), needed if the samples have no cache.
    Returns:
        The loss of each step that this call trained, averaged over all processes.
    """
    config, accelerator, loop = training.config, training.accelerator, training.config.loop
    folder = Path(config.run) / "checkpoints"
    trainees = {"unet": Trainee(training.unet, training.optimizer, training.ema)}
    facts = {"pictures": len(samples.pictures)}
    first = resume(folder, trainees, accelerator, loop.steps, to_dict(config), facts)

    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(first, loop.steps, loop.batch_size, loop.accumulation, rank, processes)
    stream = batches(samples, numbers, accelerator.device, encoders)
    stored = next(batches(samples, [list(range(STORED))], accelerator.device, encoders))
    watch = Watch(
        accelerator,
        tracker,
        batch_of(config.seed, loop.batch_size, samples.pictures),
        training.learning_rate,
        max_skipped=loop.max_skipped,
        spike=loop.spike,
    )
    history: list[float] = []

    def save(done: int) -> None:
        last = done == loop.steps or watch.signal != 0
        save_checkpoint(folder, done, to_dict(config), trainees, accelerator, loop.keep, facts, must=last)

    def show(done: int, signal: Noted) -> None:
        """What follows a checkpoint; a run that was killed in it does it again."""
        if questions is not None and due(done, loop.evaluate_every, loop.steps):
            log_heldout(training, questions, done, bar, tracker)
        drawing = due(done, loop.sample_every, loop.steps)
        if drawing or due(done, loop.checkpoint_every, loop.steps) or done == loop.steps:
            pipeline = export(training, build_pipeline, stored, done)
            if pipeline is not None and drawing and loop.prompts:
                grid = draw_prompts(pipeline, config, signal)
                if grid is not None:
                    tracker.picture("samples", done, grid)
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
