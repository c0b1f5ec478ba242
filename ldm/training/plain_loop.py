"""The loop of the trainings that draw nothing: the VAE's and the classifier's.

A training says what one step is; the steps, their learning rate, checkpoints, resume and the log are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.data.dataset import Row
from ldm.training.checkpoint import resume, save_checkpoint
from ldm.training.config import Config, to_dict
from ldm.training.distributed import Peers
from ldm.training.learning_rate import learning_rate
from ldm.training.logging import Tracker
from ldm.training.monitor import Watch, batch_of, mean_of_finite, telling, update
from ldm.training.samples import numbers_of
from ldm.training.signals import Stopped, ignore_in_worker, noted
from ldm.training.train_state import Trainee


class Recipe(Protocol):
    """What the loop reads of a section such as `vae_training`."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def log_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...


@dataclass
class PlainTraining(ABC):
    """Networks, what steps them, and the recipe.

    Attributes:
        name: of the log's values, and of the folder of checkpoints.
    """

    name: ClassVar[str]
    config: Config
    accelerator: Accelerator
    trainees: dict[str, Trainee] = field(default_factory=dict)

    @property
    @abstractmethod
    def recipe(self) -> Recipe: ...

    @abstractmethod
    def step(self, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One step on this process's share of a batch, which lies on the CPU.

        Returns:
            Its mean loss, detached, and 1.0 if a gradient was not finite and a network left as it was, else 0.0.
        """

    def add(self, name: str, module: nn.Module, weight_decay: float = 0.0) -> None:
        """Hand a network over to accelerate and make its optimizer."""
        fused = self.accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
        )
        self.trainees[name] = Trainee(*self.accelerator.prepare(module.train(), optimizer))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.recipe.lr, step, self.recipe.steps, self.recipe.warmup, "cosine")

    def update(self, trainee: Trainee, loss: Tensor, step: int) -> Tensor:
        """Back-propagate and step at this step's learning rate; returns 1.0 if that was skipped, else 0.0."""
        assert trainee.optimizer is not None
        self.accelerator.backward(telling(loss))
        return update(self.accelerator, trainee.module, trainee.optimizer, self.learning_rate(step), 1.0)


class PlainSamples(Protocol):
    """Sample n of a run, a dict of tensors, and the pictures that the samples are of."""

    @property
    def pictures(self) -> Sequence[Row]: ...
    def __getitem__(self, n: int) -> dict[str, Any]: ...


def fit_plain(
    training: PlainTraining,
    samples: PlainSamples,
    tracker: Tracker,
    *,
    workers: int,
    at_checkpoint: Callable[[int], None] | None = None,
) -> list[float]:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        workers: processes that read samples.
        at_checkpoint: what else to do after each checkpoint, the last included, with the number of steps done; every
            rank calls it.
    Returns:
        The loss of each step that this call trained, averaged over all processes.
    Raises:
        Stopped: by a signal, with this step saved.
        RunError: if too many steps in a row were not finite, or the last checkpoint can't be saved.
    """
    config, accelerator, recipe, name = training.config, training.accelerator, training.recipe, training.name.lower()
    folder, facts = Path(config.run) / f"{name}_checkpoints", {"pictures": len(samples.pictures)}
    first = resume(folder, training.trainees, accelerator, recipe.steps, to_dict(config), facts, name)
    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(first, recipe.steps, recipe.batch_size, 1, rank, processes)
    loader: DataLoader[Any] = DataLoader(
        cast(Dataset[Any], samples),
        batch_sampler=cast(Any, numbers),
        num_workers=workers,
        worker_init_fn=ignore_in_worker,
    )
    watch = Watch(
        accelerator,
        tracker,
        batch_of(config.seed, recipe.batch_size, samples.pictures),
        training.learning_rate,
        max_skipped=config.loop.max_skipped,
        spike=config.loop.spike,
    )
    history: list[float] = []
    steps = zip(range(first, recipe.steps), loader, strict=True)
    bar = tqdm(steps, initial=first, total=recipe.steps, unit="step", desc=training.name)
    with noted() as signal, Peers(accelerator) as peers:
        for step, batch in bar:
            watch.hear(step, *training.step(step, batch), signal.number)
            done = step + 1
            last = done == recipe.steps or watch.signal != 0
            if done % recipe.log_every == 0 or last:
                history += log_losses(training, watch, done, bar, tracker)
            if done % recipe.checkpoint_every == 0 or last:
                save_checkpoint(
                    folder, done, to_dict(config), training.trainees, accelerator, config.loop.keep, facts, must=last
                )
                if at_checkpoint is not None and not watch.signal:
                    at_checkpoint(done)
            if watch.signal:
                break
        peers.close()
        accelerator.wait_for_everyone()
    if watch.signal:
        tracker.close()
        raise Stopped(watch.signal, f"step {done} of {recipe.steps} is saved in {folder}")
    return history


def log_losses(training: PlainTraining, watch: Watch, done: int, bar: Any, tracker: Tracker) -> list[float]:
    """Tell the losses since the last line; returns each of them, NaN and infinities of skipped steps included."""
    losses, name = watch.take_losses(), training.name.lower()
    rate = (bar.format_dict["rate"] or 0.0) * training.recipe.batch_size
    values = {"lr": training.learning_rate(done - 1), "images_per_second": rate}
    if watch.skipped:
        values["skipped"] = watch.skipped
    mean = mean_of_finite(losses)
    if mean is not None:
        values["loss"] = mean
    tracker.scalars(done, {f"{name}/{key}": value for key, value in values.items()})
    told = "no step was finite" if mean is None else f"loss {mean:.4f}"
    bar.set_postfix_str(f"{told}, {rate:.1f} images/s")
    return losses
