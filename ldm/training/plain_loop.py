"""The loop of the trainings that draw nothing: the VAE's and the classifier's.

A training says what one step is; the steps, their learning rate, checkpoints, resume and the log are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.training.checkpoint import Trainee, resume, save_checkpoint
from ldm.training.config import Config, to_dict
from ldm.training.learning_rate import learning_rate
from ldm.training.samples import numbers_of
from ldm.training.tracking import Tracker


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
    def step(self, step: int, batch: dict[str, Tensor]) -> Tensor:
        """One step on this process's share of a batch, which lies on the CPU; returns its mean loss, detached."""

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

    def update(self, trainee: Trainee, loss: Tensor, step: int) -> None:
        """Back-propagate and step at this step's learning rate."""
        optimizer = trainee.optimizer
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(trainee.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fit_plain(
    training: PlainTraining,
    samples: Dataset[dict[str, Any]],
    tracker: Tracker,
    *,
    workers: int,
    at_checkpoint: Callable[[int], None] | None = None,
) -> list[float]:
    """Train from the newest checkpoint, or from the start, to the last step.

    Args:
        samples: sample n of the run, a dict of tensors.
        workers: processes that read samples.
        at_checkpoint: what else to do after each checkpoint, the last included, with the number of steps done; every
            rank calls it.
    Returns:
        The loss of each step that this call trained, averaged over all processes.
    """
    accelerator, recipe, name = training.accelerator, training.recipe, training.name
    folder = Path(training.config.run) / f"{name.lower()}_checkpoints"
    first = resume(folder, training.trainees, accelerator, recipe.steps)
    rank, processes = accelerator.process_index, accelerator.num_processes
    numbers = numbers_of(first, recipe.steps, recipe.batch_size, 1, rank, processes)
    loader = DataLoader(samples, batch_sampler=numbers, num_workers=workers)
    losses: list[Tensor] = []
    history: list[float] = []
    steps = zip(range(first, recipe.steps), loader, strict=True)
    bar = tqdm(steps, initial=first, total=recipe.steps, unit="step", desc=name)
    for step, batch in bar:
        losses.append(training.step(step, batch))
        done = step + 1
        if done % recipe.log_every == 0 or done == recipe.steps:
            mean = accelerator.reduce(torch.stack(losses), "mean").tolist()
            history, losses = history + mean, []
            rate = (bar.format_dict["rate"] or 0.0) * recipe.batch_size
            values = {"loss": sum(mean) / len(mean), "lr": training.learning_rate(step), "images_per_second": rate}
            tracker.scalars(done, {f"{name.lower()}/{key}": value for key, value in values.items()})
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s")
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            save_checkpoint(folder, done, to_dict(training.config), training.trainees, accelerator, keep=1)
            if at_checkpoint is not None:
                at_checkpoint(done)
    return history
