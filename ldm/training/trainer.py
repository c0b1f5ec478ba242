"""The training loop, the same for every task (task.py): one step, and what happens around it.

    samples -> batch -> loss -> gradients -> update -> average -> log -> checkpoint -> validate, export, preview

The mathematics is in ldm.diffusion, randomness in randomness.py, skipped steps in optimizer.py and monitor.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.models.ema import learning
from ldm.training.checkpoint import checkpoint_folder, save_checkpoint
from ldm.training.config import to_dict
from ldm.training.distributed import Peers, on_rank_0
from ldm.training.ema_snapshots import drop_later_snapshots, keep_snapshot
from ldm.training.facts import RunFacts
from ldm.training.logging import Tracker
from ldm.training.monitor import Monitor, mean_of_finite, samples_of_steps
from ldm.training.optimizer import update, with_nan_gradients
from ldm.training.randomness import sample_numbers
from ldm.training.resume import data_facts, resume
from ldm.training.signals import Received, Stopped, deferred, ignore_in_worker
from ldm.training.task import Task


class Trainer:
    """Trains a task that has been built (its networks) and, for `fit`, prepared (all else)."""

    def __init__(self, task: Task) -> None:
        self.task, self.config, self.accelerator, self.recipe = task, task.config, task.accelerator, task.recipe

    # --- one step ---------------------------------------------------------------------------------

    def step(self, step: int, parts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One optimizer step on the accumulated batches of this process's share.

        Returns:
            The mean loss of the first network, detached, and 1.0 if a gradient was not finite and a network therefore
            stayed as it was, else 0.0; both on the device.
        """
        task, recipe, accelerator = self.task, self.recipe, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for i, part in enumerate(parts):
            with contextlib.ExitStack() as unsynchronized:
                if i < len(parts) - 1:  # ranks add up their gradients once, with the last part
                    for state in task.train_state.values():
                        unsynchronized.enter_context(accelerator.no_sync(state.module))
                losses = task.loss(step, part)  # {name: (B,)}
                means = {name: loss.mean() / len(parts) for name, loss in losses.items()}
                for mean in means.values():
                    accelerator.backward(with_nan_gradients(mean))
            total += next(iter(means.values())).detach()
        lr, skipped = recipe.learning_rate(step), torch.zeros((), device=accelerator.device)
        for name in losses:
            state = task.train_state[name]
            assert state.optimizer is not None
            skipped = torch.maximum(skipped, update(accelerator, state.module, state.optimizer, lr, recipe.clip))
            for average in state.averages.values():
                average.step(learning(state.module))
        task.after_step(skipped)
        return total, skipped

    def batches(self, numbers: Sequence[Sequence[int]]) -> Iterator[Any]:
        """The batches of these sample numbers, one after the other; worker processes read ahead if the task has any."""
        loader: DataLoader[dict[str, Any]] = DataLoader(
            cast(Any, self.task.samples),
            batch_sampler=cast(Any, numbers),  # whose stubs want lists, of which a long run's would be 250 MB
            num_workers=self.task.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=ignore_in_worker,
        )
        for collated in loader:
            yield self.task.batch(collated)

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self) -> list[float]:
        """Train from the newest checkpoint, or from the start, to the last step.

        Returns:
            The loss of each step that this call trained, averaged over all processes.
        Raises:
            Stopped: by a signal, with its step saved.
            RunError: if too many steps in a row were not finite, or what must be saved can't be.
        """
        task, config, recipe, accelerator = self.task, self.config, self.recipe, self.accelerator
        folder, pictures = checkpoint_folder(config.run, task.name), task.samples.pictures
        facts = data_facts(task.samples) | task.frozen_facts()
        first = resume(folder, task.name, task.train_state, accelerator, recipe.steps, to_dict(config), facts)
        drop_later_snapshots(Path(config.run), first, task.train_state)
        self.tracker = Tracker(Path(config.run), silent=not accelerator.is_main_process)
        self.monitor = Monitor(
            accelerator, self.tracker, samples_of_steps(task.samples.row_of, recipe.batch_size, pictures),
            recipe.learning_rate, task=task.name, max_skipped=config.loop.max_skipped, spike=config.loop.spike,
        )  # fmt: skip
        stream = self.batches(
            sample_numbers(
                first, recipe.steps, recipe.batch_size, recipe.accumulation, accelerator.process_index,
                accelerator.num_processes, key=f"{task.loop_section}.batch_size",
            )
        )  # fmt: skip
        self.bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, unit="step", desc=task.title)
        history: list[float] = []
        done, saved = first, f"all {recipe.steps} steps are done"
        with deferred() as received, Peers(accelerator) as peers:
            if first and not self.followed_up(first):  # the run was killed in what follows a checkpoint
                self.follow_up(first, received)
            for step in self.bar:
                loss, skipped = self.step(step, [next(stream) for _ in range(recipe.accumulation)])
                self.monitor.record(step, loss, skipped, received.number)
                done = step + 1
                if due(done, recipe.log_every, recipe.steps) or self.monitor.signal:
                    history += self.log_losses(done)
                if due(done, recipe.ema_snapshot_every, recipe.steps):  # before the checkpoint, which counts on it
                    keep_snapshot(Path(config.run), done, task.train_state)
                if due(done, recipe.checkpoint_every, recipe.steps) or self.monitor.signal:
                    must, keep = done == recipe.steps or self.monitor.signal != 0, config.loop.keep
                    save_checkpoint(
                        folder, done, to_dict(config), task.train_state, accelerator, keep, facts, must=must
                    )
                    saved = f"step {done} of {recipe.steps} is saved in {folder}"
                if self.monitor.signal:
                    break
                self.follow_up(done, received)
            peers.close()
            accelerator.wait_for_everyone()
            self.tracker.close()
        if self.monitor.signal or received:
            raise Stopped(self.monitor.signal or received.number, saved)
        return history

    def log_losses(self, done: int) -> list[float]:
        """Log the losses since the last call; returns each of them, NaN and infinities of skipped steps included."""
        losses = self.monitor.take_losses()
        rate = (self.bar.format_dict["rate"] or 0.0) * self.recipe.batch_size
        values = {"lr": self.recipe.learning_rate(done - 1), "images_per_second": rate}
        if self.monitor.skipped:
            values["skipped"] = self.monitor.skipped
        mean = mean_of_finite(losses)
        if mean is not None:
            values["loss"] = mean
        self.log(done, values)
        shown = "no step was finite" if mean is None else f"loss {mean:.4f}"
        self.bar.set_postfix_str(f"{shown}, {rate:.1f} images/s")
        return losses

    def log(self, done: int, values: dict[str, float]) -> None:
        """Log values under the task's name: one run can hold a VAE's training and a U-Net's."""
        self.tracker.scalars(done, {f"{self.task.name}/{name}": value for name, value in values.items()})

    def follow_up(self, done: int, received: Received) -> None:
        """Validate, export and preview where they are due. Every rank must call it."""
        task, recipe = self.task, self.recipe
        if due(done, recipe.evaluate_every, recipe.steps):
            metrics = task.validate()
            if metrics:
                self.log(done, metrics)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                if self.accelerator.is_main_process:
                    self.bar.write(f"step {done}: {shown}")
        previewing = due(done, recipe.sample_every, recipe.steps)
        if previewing or due(done, recipe.checkpoint_every, recipe.steps) or done == recipe.steps:
            task.export(done)
            picture = task.preview(done, lambda: bool(received)) if previewing else None
            if picture is not None:
                self.tracker.picture(task.preview_folder, done, picture)
            self.accelerator.wait_for_everyone()
            if due(done, recipe.checkpoint_every, recipe.steps) and not received:
                RunFacts(self.config.run).keep(f"{task.name}: followed up", str(done), True)

    def followed_up(self, done: int) -> bool:
        """Whether nothing is left to do of what follows a checkpoint. Every rank must call it."""
        run, name = Path(self.config.run), f"{self.task.name}: followed up"
        finished = RunFacts(run).recall(name, str(done)) is True and (run / self.task.result).exists()
        return on_rank_0(lambda _: int(finished)) == 1


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; 0 is never."""
    return every > 0 and (done % every == 0 or done == steps)
