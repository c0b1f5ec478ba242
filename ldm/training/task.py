"""What a kind of training is, for the one loop in trainer.py. Each kind is a file in tasks/.

A task says what is trained, what sample n is, what its loss is, how it is validated and what it leaves behind. Steps,
accumulation, clipping, averages, the learning rate, logs, checkpoints, signals and resume are the trainer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm.data.dataset import CaptionedPictures, Row
from ldm.models.ema import build_ema, build_power_averages, learning
from ldm.training.config import Config
from ldm.training.optimizer import learning_rate
from ldm.training.optimizers import build_optimizer, has_own_average
from ldm.training.train_state import TrainState


class Samples(Protocol):
    """Sample n of a run, a dict of CPU tensors, for any n >= 0; and the pictures that the samples show."""

    @property
    def pictures(self) -> Sequence[Row]: ...
    def __getitem__(self, n: int) -> dict[str, Any]: ...
    def row_of(self, n: int) -> int:
        """Which of the pictures sample n shows."""

    def row_facts(self, number: int, row: Row) -> list[Any]:
        """What samples take from a row besides its picture, as JSON holds it."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training, from whichever sections of the config hold them.

    Attributes:
        name: of the optimizer (`ldm.training.optimizers`).
        lr, warmup, decay, cooldown: the learning rate (`ldm.training.optimizer.learning_rate`).
        betas, weight_decay: the optimizer's.
        clip: largest global norm of the gradient.
        ema_decay: of the averaged weights; None if there are none.
        ema_widths, ema_snapshot_every: of the averages whose width is chosen after training, and how often they are
            kept (`ldm.models.power_ema`).
        log_every, evaluate_every, sample_every, checkpoint_every: in steps; 0 is never.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int
    log_every: int
    checkpoint_every: int
    evaluate_every: int
    sample_every: int
    accumulation: int = 1
    decay: Literal["constant", "cosine"] = "cosine"
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float | None = None
    name: str = "adamw"
    ema_widths: tuple[float, ...] = ()
    ema_snapshot_every: int = 0

    @classmethod
    def of(cls, *sections: Any, **values: Any) -> Recipe:
        """The values of these sections of a config, and these."""
        named = {item.name for item in fields(cls)}
        found = {name: value for section in sections for name, value in vars(section).items() if name in named}
        return cls(**found | values)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step in [0, steps)."""
        return learning_rate(self.lr, step, self.steps, self.warmup, self.decay, self.cooldown)


@dataclass
class Task(ABC):
    """One kind of training.

    `build` makes fresh networks, `prepare` what else the steps, the validation and the export need. Before a run's
    first step the doctor takes a few steps of a copy of the task that is built and not prepared.

    Attributes:
        name: the word of `ldm train`, the folder of checkpoints, the prefix of logged names.
        title: of its network, in messages.
        optim_section, loop_section: of the config, which hold the learning rate and the batch size.
        preview_folder: RUN/<preview_folder> holds the previews.
        result: RUN/<result> is what is exported.
        samples: sample n of the run.
        workers: processes that read samples.
        train_state: what is trained, by name; the loss of the first one is logged.
        details: of the network, for one line at the start.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    optim_section: ClassVar[str]
    loop_section: ClassVar[str]
    preview_folder: ClassVar[str] = "samples"
    result: ClassVar[str]
    config: Config
    accelerator: Accelerator
    samples: Samples = field(init=False)
    workers: int = field(default=0, init=False)
    train_state: dict[str, TrainState] = field(default_factory=dict, init=False)
    details: str = field(default="", init=False)

    @classmethod
    @abstractmethod
    def create(cls, config: Config, accelerator: Accelerator, pictures: CaptionedPictures) -> Task:
        """The task on these pictures, with its frozen networks checked. Every rank must call it.

        Raises:
            ValueError: naming the key, if the config, the pictures and the frozen networks don't fit together.
        """

    @property
    @abstractmethod
    def recipe(self) -> Recipe: ...

    @abstractmethod
    def build(self) -> None:
        """Make fresh networks from the config's seed: `train_state`."""

    def prepare(self) -> None:  # noqa: B027 (optional, as are the others)
        """Make what steps, validation and export need besides the networks. Every rank must call it."""

    @abstractmethod
    def batch(self, collated: dict[str, Any]) -> Any:
        """Collated samples on the CPU => what `loss` takes, on the device."""

    def batches(self, numbers: Sequence[Sequence[int]]) -> list[Any]:
        """A few batches of these sample numbers, read here and now."""
        return [self.batch(default_collate([self.samples[n] for n in part])) for part in numbers]

    def free(self) -> None:  # noqa: B027
        """Free what only encodes: steps on batches that are there don't need it."""

    def frozen_facts(self) -> dict[str, str]:
        """What of the frozen networks a checkpoint keeps and a resumed run must have, too."""
        return {}

    def other_needs(self) -> dict[str, int]:
        """Bytes that a run writes besides checkpoints and what is exported of the first network, by what for."""
        return {}

    @abstractmethod
    def loss(self, step: int, batch: Any) -> dict[str, Tensor]:
        """The loss of each sample [B], by the name of what it trains.

        Names are those of `train_state`; what is left out of them does not learn at this step.
        """

    def after_step(self, skipped: Tensor) -> None:  # noqa: B027
        """What else a step changes; `skipped` is 1.0 if a network stayed as it was, else 0.0."""

    def validate(self) -> dict[str, float]:
        """Metrics by name, such as heldout/psnr; empty if there is nothing to measure. Every rank must call it."""
        return {}

    @abstractmethod
    def export(self, step: int) -> Path | None:
        """Save what was trained so far, checked before it replaces the last; its folder on rank 0, else None.

        Every rank must call it.

        Raises:
            RunError: if what was written is not what was trained, or can't be written at the last step.
        """

    def preview(self, step: int, interrupted: Callable[[], bool]) -> Image.Image | None:
        """A picture to look at, on rank 0; None elsewhere, or if it was interrupted. Every rank must call it."""
        return None

    def summary(self) -> str:
        """What a finished run prints last."""
        return f"{self.title}: done"

    def add(self, name: str, module: nn.Module) -> None:
        """Hand a network to accelerate (DDP, FSDP, mixed precision) with an optimizer and, if wanted, an average."""
        recipe, accelerator = self.recipe, self.accelerator
        optimizer: Any = build_optimizer(module, recipe.name, recipe.lr, recipe.betas, recipe.weight_decay, accelerator)
        module, optimizer = accelerator.prepare(module.train(), optimizer)
        decay = None if has_own_average(optimizer) else recipe.ema_decay
        ema = None if decay is None else build_ema(module, decay)
        self.train_state[name] = TrainState(module, optimizer, ema, build_power_averages(module, recipe.ema_widths))


def float32_bytes(network: nn.Module, *, learned: bool = False) -> int:
    """What its weights, or those that learn, take in a saved folder, whatever they are in now."""
    return 4 * sum(weight.numel() for weight in (learning(network) if learned else network.parameters()))
