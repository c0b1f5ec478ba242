"""loop.minutes: time as a run's one dial.

A recipe's steps are a number; how long they take is the machine's affair. With `loop.minutes` the run measures its own
step, warmed up, at full and at half size, and scales the recipe to the time: steps, half-size steps and the number of
pictures shrink or grow together, so that each picture is seen as often as in the recipe. A faster machine learns more
pictures in the same time.

What was decided is written to RUN/budget.json before the first step, and read there by every later start: a resumed run
measures nothing, and is exact.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import broadcast_object_list

from ldm.data.dataset import CaptionedPictures
from ldm.data.rows import count
from ldm.system.errors import RunError
from ldm.system.memory import give_back
from ldm.training.checkpoint import has_begun
from ldm.training.config import Config
from ldm.training.doctor.trial import eta
from ldm.training.randomness import sample_numbers
from ldm.training.task import Task
from ldm.training.trainer import Trainer

FILE = "budget.json"  # in RUN
WARM_UP, TIMED = 2, 4  # steps, at each size
USABLE = 0.9  # of the time that is left: encoding, validation and saving take the rest
PREVIEWS = 3
FEWEST_STEPS = 20


@dataclass(frozen=True)
class Budget:
    """What a run of so many minutes does.

    Attributes:
        minutes: that were asked for.
        pictures: of the training split, those of `loop.prompts` first; 0 is all.
        steps, half_size_steps, warmup: in place of the recipe's.
        seconds, half_seconds: of a step at full and at half size, as measured.
    """

    minutes: float
    pictures: int
    steps: int
    half_size_steps: int
    warmup: int
    seconds: float
    half_seconds: float

    @classmethod
    def of(cls, config: Config, pictures: int, seconds: float, half_seconds: float, left: float) -> Budget:
        """Scale a recipe to the time.

        Args:
            pictures: of the training split; the recipe's number of them is `data.limit`, or all.
            seconds, half_seconds: of a step at full and at half size.
            left: seconds until the minutes are over.
        Raises:
            ValueError: if there is no time for a training.
        """
        loop = config.loop
        half = loop.half_size_steps / loop.steps
        rows = len(loop.prompts) * config.preview_steps * 2  # of the U-Net; a training step's row takes three
        previews = PREVIEWS * rows / (3 * loop.batch_size) * seconds
        steps = int((USABLE * left - previews) / (half * half_seconds + (1 - half) * seconds))
        if steps < FEWEST_STEPS:
            needed = (FEWEST_STEPS * seconds + previews) / USABLE / 60 + loop.minutes - left / 60
            raise ValueError(
                f"loop.minutes: {loop.minutes:g} are too few: a step takes {seconds:.1f} s here; set at least "
                f"{needed:.0f}"
            )
        share = steps / loop.steps
        wanted = max(len(loop.prompts), round(share * (config.data.limit or pictures)))
        warmup = min(config.optim.warmup, max(1, round(share * config.optim.warmup)))
        return cls(
            loop.minutes, min(pictures, wanted), steps, round(half * steps), warmup, round(seconds, 4),
            round(half_seconds, 4),
        )  # fmt: skip

    def apply(self, config: Config) -> Config:
        """The recipe, scaled: a third of the steps from preview to preview."""
        third, share, optim = -(-self.steps // PREVIEWS), self.steps / config.loop.steps, config.optim
        loop = replace(
            config.loop, steps=self.steps, half_size_steps=self.half_size_steps, sample_every=third,
            evaluate_every=third, checkpoint_every=third, log_every=min(config.loop.log_every, third),
        )  # fmt: skip
        data = replace(config.data, limit=self.pictures)
        optim = replace(
            optim, warmup=self.warmup, cooldown=round(share * optim.cooldown),
            ema_snapshot_every=max(1, round(share * optim.ema_snapshot_every)),
        )  # fmt: skip
        return replace(config, loop=loop, data=data, optim=optim)

    def __str__(self) -> str:
        return (
            f"loop.minutes={self.minutes:g}: {self.steps:,} steps, {self.half_size_steps:,} of them at half size, on "
            f"{self.pictures:,} pictures; a step takes {self.seconds:.2f} s, at half size {self.half_seconds:.2f} s "
            f"(measured), all of them {eta(self.training_seconds)}"
        )

    @property
    def training_seconds(self) -> float:
        """What the steps take."""
        return self.half_size_steps * self.half_seconds + (self.steps - self.half_size_steps) * self.seconds


def read_budget(config: Config, task: str = "ldm") -> Budget | None:
    """The budget that a run of a task began with; None for a run that has not begun.

    Raises:
        RunError: if it began with other minutes, or without a budget.
    """
    file = Path(config.run) / FILE
    begun = has_begun(config.run, task)
    try:
        budget = Budget(**json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        if begun:
            raise RunError(f"loop.minutes: {config.run} began without it; set it to 0, or name another run") from None
        return None
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{file}: expected what loop.minutes wrote ({error}); delete it if the run has no steps"
        ) from None
    if budget.minutes != config.loop.minutes:
        if begun:
            raise RunError(
                f"loop.minutes: {config.run} began with {budget.minutes:g}, got {config.loop.minutes:g}; set it back, "
                "or name another run"
            )
        return None
    return budget


def decide(task: Task, pictures: int) -> Budget:
    """Measure steps of a task that was created, scale its recipe, and write RUN/budget.json.

    Every rank must call it; rank 0's measurement counts.
    """
    config, accelerator = task.config, task.accelerator
    seconds, half_seconds = (step_seconds(task, half) for half in (False, True))
    left = 60 * config.loop.minutes - (time.time() - psutil.Process().create_time())
    # Before the arithmetic: a rank that alone found too little time would leave the others waiting.
    seconds, half_seconds, left = broadcast_object_list([seconds, half_seconds, left])
    budget = Budget.of(config, pictures, seconds, half_seconds, left)
    if accelerator.is_main_process:
        file = Path(config.run) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{FILE}.new")
        new.write_text(json.dumps(asdict(budget), indent=2) + "\n", "utf-8")
        new.rename(file)
    return budget


def step_seconds(task: Task, half: bool) -> float:
    """The median time of warmed-up steps of a copy of the task."""
    config, recipe, accelerator = task.config, task.recipe, task.accelerator
    half_steps = WARM_UP + TIMED if half else 0
    trial = replace(task, config=replace(config, loop=replace(config.loop, compile=False, half_size_steps=half_steps)))
    numbers = sample_numbers(
        0, 1, recipe.batch_size, recipe.accumulation, accelerator.process_index, accelerator.num_processes,
        key=f"{task.loop_section}.batch_size",
    )  # fmt: skip
    parts: list[Any] = trial.batches(numbers)
    trial.free()
    trial.build()
    trainer, taken = Trainer(trial), []
    for step in range(WARM_UP + TIMED):
        started = time.monotonic()
        float(trainer.step(step, parts)[0])  # waits for the device
        taken.append(time.monotonic() - started)
    del trainer, trial
    accelerator.free_memory()
    give_back()
    return statistics.median(taken[WARM_UP:])


def split_sizes(pictures: CaptionedPictures, limit: int) -> str:
    """How many pictures there are to train on, at most `limit` of them, and how many are held out."""
    train = len(pictures.train)
    used = f"{limit:,} of {count(train, 'picture')}" if 0 < limit < train else count(train, "picture")
    return f"{used} to train on, {len(pictures.heldout)} held out"


def limited(pictures: CaptionedPictures, limit: int, first: Sequence[str]) -> CaptionedPictures:
    """At most so many training pictures, and all held-out ones, in their order.

    Args:
        limit: 0 is no limit.
        first: captions whose pictures are taken before others, which are spread evenly.
    """
    train = [place for place, row in enumerate(pictures) if row.split == "train"]
    if not 0 < limit < len(train):
        return pictures
    wanted = {caption: number for number, caption in enumerate(first)}
    named = [place for place in train if wanted.keys() & set(pictures[place].captions)][:limit]
    others = [place for place in train if place not in set(named)]
    rest = limit - len(named)
    spread = [others[number * len(others) // rest] for number in range(rest)]
    kept = {*named, *spread}
    return pictures.select(place for place, row in enumerate(pictures) if row.split == "heldout" or place in kept)
