"""NaN and infinities put into every place that a number passes: none reaches a weight, a moment, an average or a file.

One step of a short run is poisoned. The checkpoints after it must hold finite numbers only, the weights and moments of
the step before, bit by bit, and log.jsonl must name the step and its pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drills import Bench, Figures
from safetensors.torch import load_file
from world import checkpoint_folder, clean

from ldm.training import plain_loop
from ldm.training import trainer as loop
from ldm.training.tasks import autoencoder as vae_loop

NAN, INF = float("nan"), float("inf")
STEP = 5  # the poisoned one, from 0


class Now:
    """Which step and which accumulated part of it is running."""

    step = -1
    part = -1


def spoil(tensor: torch.Tensor, value: float, one: bool = False) -> torch.Tensor:
    """A copy with this value everywhere, or in one place."""
    spoiled = tensor.clone()
    (spoiled.view(-1)[:1] if one else spoiled).fill_(value)
    return spoiled


def in_batch(name: str, value: float, one: bool = False, part: int | None = None) -> Callable[[], None]:
    """Poison a field of the batch."""

    def plant() -> None:
        original = loop.Training.losses

        def losses(self: Any, batch: Any) -> Any:
            Now.part += 1
            if Now.step == STEP and part in (None, Now.part):
                owner = batch.conditioning if name == "context" else batch
                changed = dataclasses.replace(owner, **{name: spoil(getattr(owner, name), value, one)})
                batch = dataclasses.replace(batch, conditioning=changed) if name == "context" else changed
            return original(self, batch)

        loop.Training.losses = losses

    return plant


def in_loss(value: float, part: int | None = None) -> Callable[[], None]:
    """Replace the loss by one that is not finite, whose derivative may be."""

    def plant() -> None:
        original = loop.Training.losses

        def losses(self: Any, batch: Any) -> Any:
            Now.part += 1
            t, found, weight = original(self, batch)
            return t, found + value if Now.step == STEP and part in (None, Now.part) else found, weight

        loop.Training.losses = losses

    return plant


def in_output(value: float, one: bool = False) -> Callable[[], None]:
    """Poison what the U-Net says."""

    def plant() -> None:
        original = loop.Training.answer

        def answer(self: Any, *args: Any) -> Any:
            found = original(self, *args)
            if Now.step != STEP:
                return found
            return found + spoil(torch.zeros_like(found), value, one)

        loop.Training.answer = answer

    return plant


def in_gradient(value: float, which: Callable[[list[Any]], list[Any]], one: bool, module: Any = loop) -> Any:
    """Poison gradients after the backward pass."""

    def plant() -> None:
        original = module.update

        def update(accelerator: Any, network: Any, *args: Any) -> Any:
            if Now.step == STEP:
                for parameter in which(list(network.parameters())):
                    parameter.grad = spoil(parameter.grad, value, one)
            return original(accelerator, network, *args)

        module.update = update

    return plant


def in_pixels(name: str, value: float, one: bool = False) -> Callable[[], None]:
    """Poison the VAE's pictures or the noise of its posterior."""

    def plant() -> None:
        original = vae_loop.VAETraining.step

        def step(self: Any, n: int, batch: Any) -> Any:
            return original(self, n, {**batch, name: spoil(batch[name], value, one)} if n == STEP else batch)

        vae_loop.VAETraining.step = step

    return plant


def in_verdict(value: float) -> Callable[[], None]:
    """Poison the loss of the VAE's judge alone."""

    def plant() -> None:
        original = vae_loop.judge_loss
        vae_loop.judge_loss = lambda real, fake: original(real, fake) + (value if Now.step == STEP else 0)

    return plant


PLACES: dict[str, tuple[str, Callable[[], None]]] = {
    "latents, NaN": ("cached", in_batch("x0", NAN)),
    "latents, one NaN": ("cached", in_batch("x0", NAN, one=True)),
    "latents, inf": ("cached", in_batch("x0", INF)),
    "latents, one -inf": ("cached", in_batch("x0", -INF, one=True)),
    "latents, 1e30: the square overflows": ("cached", in_batch("x0", 1e30)),
    "latents in the second accumulated part": ("cached", in_batch("x0", NAN, one=True, part=1)),
    "noise, one NaN": ("cached", in_batch("eps", NAN, one=True)),
    "noise, inf": ("cached", in_batch("eps", INF)),
    "context, one NaN": ("cached", in_batch("context", NAN, one=True)),
    "context, inf": ("cached", in_batch("context", INF)),
    "output, one NaN": ("cached", in_output(NAN, one=True)),
    "output, inf": ("cached", in_output(INF)),
    "loss, NaN": ("cached", in_loss(NAN)),
    "loss, inf, with finite gradients": ("cached", in_loss(INF)),
    "loss, -inf, in the first accumulated part": ("cached", in_loss(-INF, part=0)),
    "gradient of the first weight, one NaN": ("cached", in_gradient(NAN, lambda all: all[:1], True)),
    "gradient of the last weight, one inf": ("cached", in_gradient(INF, lambda all: all[-1:], True)),
    "every gradient, NaN": ("cached", in_gradient(NAN, lambda all: all, False)),
    "every gradient, 1e25: the norm overflows": ("cached", in_gradient(1e25, lambda all: all, False)),
    "VAE: pixels, one NaN": ("vae", in_pixels("pixels", NAN, one=True)),
    "VAE: pixels, inf": ("vae", in_pixels("pixels", INF)),
    "VAE: posterior noise, one inf": ("vae", in_pixels("noise", INF, one=True)),
    "VAE: every gradient, one NaN each": ("vae", in_gradient(NAN, lambda all: all, True, plain_loop)),
    "VAE: the judge's loss, NaN": ("vae", in_verdict(NAN)),
}


def poison(bench: Bench, places: int | None) -> Figures:
    """Poison each place once."""
    figures: Counter[str] = Counter()
    for name in ("poisoned tensors", "steps not skipped", "not written down"):
        figures[name] = 0
    names = list(PLACES) if places is None else bench.chance.sample(list(PLACES), places)
    for number, name in enumerate(names):
        kind, plant = PLACES[name]
        words = {"loop__checkpoint_every": 1, "vae_training__checkpoint_every": 1, "loop__keep": 99}
        config = bench.world.recipe(
            kind, bench.world.home / f"poison-{number}", loop__steps=7, vae_training__steps=7, loop__evaluate_every=0,
            loop__sample_every=0, **words,
        )  # fmt: skip
        with clean(config):
            child = bench.world.train(kind, config, before=lambda plant=plant, kind=kind: (follow(kind), plant()))
            if child.wait() != 0:
                figures["errors"] += 1
                print(name, child.words[-3000:])
                continue
            folder = checkpoint_folder(kind, config)
            for file in folder.glob("step_*/*.safetensors"):
                tensors = load_file(file).values()
                figures["tensors examined"] += len(tensors)
                figures["poisoned tensors"] += sum(not bool(t.isfinite().all()) for t in tensors)
            stood = [key for key in ("unet", "vae") if (folder / f"step_{STEP:07d}" / f"{key}.safetensors").exists()]
            stood = ["discriminator"] if "judge" in name else stood
            for key in [*stood, *(f"{key}.optimizer" for key in stood)]:
                before, after = (folder / f"step_{STEP + i:07d}" / f"{key}.safetensors" for i in (0, 1))
                moved = before.read_bytes() != after.read_bytes()
                figures["steps not skipped"] += moved
            figures["not written down"] += not written_down(Path(config.run))
            figures["places"] += 1
    return figures


def follow(kind: str) -> None:
    """Keep account of the step that is running."""
    loop.export = lambda *args: None  # not what is examined here
    training = vae_loop.VAETraining if kind == "vae" else loop.Training
    original = training.step

    def step(self: Any, n: int, *args: Any) -> Any:
        Now.step, Now.part = n, -1
        try:
            return original(self, n, *args)
        finally:
            Now.step = -1

    training.step = step


def written_down(run: Path) -> bool:
    """Whether log.jsonl names the step and its eight samples, and no other step was skipped."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    skipped = [row for row in rows if row.get("event") == "skipped"]
    if len(skipped) != 1 or skipped[0]["step"] != STEP + 1:
        return False
    right = skipped[0]["samples"] == [8 * STEP, 8 * STEP + 7] and len(skipped[0]["rows"]) == 8
    return right and all("metadata.jsonl row " in row for row in skipped[0]["rows"]) and skipped[0]["lr"] > 0
