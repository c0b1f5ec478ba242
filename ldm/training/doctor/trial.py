"""A few real steps of a training that isn't kept: how long they take, what they hold, whether anything is learned.

Steps are those of the very `step` that the run will call, on batches of the run. A network that can't get better at
one and the same batch in thirty steps at its peak learning rate won't learn from many: the oldest test there is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import tqdm

from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.doctor.findings import Finding
from ldm.training.doctor.resources import memory
from ldm.training.randomness import sample_numbers
from ldm.training.task import Task
from ldm.training.trainer import Trainer

TIMED = 3  # steps, after one that warms up
OVERFIT = 30  # steps on one batch
FEW = 4  # samples in it
FALLS = 0.9  # to at most this share of the first loss
FOREVER = 10**9  # steps, so that no learning rate decays


def trial_numbers(task: Task) -> list[range]:
    """The sample numbers of this process's batches in the steps that are timed."""
    recipe, accelerator = task.recipe, task.accelerator
    return sample_numbers(
        0, 1 + TIMED, recipe.batch_size, recipe.accumulation, accelerator.process_index, accelerator.num_processes,
        key=f"{task.loop_section}.batch_size",
    )  # fmt: skip


def try_steps(task: Task, batches: list[list[Any]], few: list[Any]) -> list[Finding]:
    """Take steps of copies of a task and throw them away. Every rank must call it.

    Args:
        batches: what 1 + TIMED steps take.
        few: what a step on FEW samples takes.
    """
    config, accelerator, name, section = task.config, task.accelerator, task.title, task.optim_section
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    steps = task.recipe.steps
    # compiling takes longer than all of this; steps at half the size are the fewer and the faster ones
    plain = replace(config, loop=replace(config.loop, compile=False, half_size_steps=0))
    found: list[Finding] = []
    bar = tqdm(total=len(batches) + OVERFIT, desc=f"trying the {name}", unit="step", leave=False)

    def losses_and_seconds(config: Config, batches: list[list[Any]]) -> Iterator[tuple[float, float]]:
        trial = replace(task, config=config)
        trial.build()
        trainer = Trainer(trial)
        for step, parts in enumerate(batches):
            started = time.monotonic()
            loss = float(accelerator.reduce(trainer.step(step, parts)[0], "mean"))
            bar.update()
            yield loss, time.monotonic() - started

    try:
        taken = [seconds for _, seconds in losses_and_seconds(plain, batches)][1:]
        each = sorted(taken)[len(taken) // 2]
        message = f"{each:.2f} s a step, {eta(each * steps)} for {steps:,} of them, previews and saving not counted"
        found += [
            Finding("ok", f"{name} time", message),
            memory(accelerator.device, f"{name} memory", _smaller(section)),
        ]
        accelerator.free_memory()
        losses = [loss for loss, _ in losses_and_seconds(at_peak(plain, section), [few] * OVERFIT)]
        share = FALLS if config.init is None else 1.0  # a trained network has less to learn, at a lower rate
        found.append(learning(losses, f"{name} learning", f"{section}.lr", task.recipe.lr, share))
    except torch.OutOfMemoryError as error:
        message = f"{str(error).splitlines()[0]}; {_smaller(section)}"
        found.append(Finding("problem", f"{name} memory", message))
    finally:
        bar.close()
        accelerator.free_memory()
        give_back()
        if scaler is not None:
            accelerator.scaler.load_state_dict(scaler)
    return found


def at_peak(config: Config, section: str) -> Config:
    """The config with its peak learning rate at every step."""
    recipe = replace(getattr(config, section), warmup=0)
    if section == "optim":
        return replace(config, optim=recipe, loop=replace(config.loop, steps=FOREVER))
    return replace(config, **{section: replace(recipe, steps=FOREVER)})


def learning(losses: list[float], check: str, key: str, rate: float, share: float = FALLS) -> Finding:
    """Whether the losses of one batch, taken again and again, fall to this share of the first."""
    first, last = losses[0], min(losses[-5:])
    message = f"on one batch the loss goes from {first:.3g} to {last:.3g} in {len(losses)} steps"
    if last <= share * first:
        return Finding("ok", check, message)
    way_out = "higher" if last <= 1.05 * first else "lower"
    return Finding("problem", check, f"{message}; expected at most {share:.0%} of the first: set {key} {way_out} than "
                   f"{rate:g}")  # fmt: skip


def eta(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _smaller(section: str) -> str:
    if section == "optim":
        return "raise loop.accumulation, or set loop.gradient_checkpointing=true"
    return f"set {section}.batch_size lower"
