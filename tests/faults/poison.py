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
from world import clean, saved_in

from ldm.training import trainer
from ldm.training.tasks import autoencoder
from ldm.training.tasks.autoencoder import Autoencoder
from ldm.training.tasks.classifier import Classifier
from ldm.training.tasks.diffusion import Diffusion

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
        original = Diffusion.loss

        def loss(self: Any, step: int, batch: Any) -> Any:
            Now.part += 1
            if step == STEP and part in (None, Now.part):
                owner = batch.conditioning if name == "context" else batch
                changed = dataclasses.replace(owner, **{name: spoil(getattr(owner, name), value, one)})
                batch = dataclasses.replace(batch, conditioning=changed) if name == "context" else changed
            return original(self, step, batch)

        Diffusion.loss = loss

    return plant


def in_loss(value: float, part: int | None = None, task: Any = Diffusion) -> Callable[[], None]:
    """Replace the loss by one that is not finite, whose derivative may be."""

    def plant() -> None:
        original = task.loss

        def loss(self: Any, step: int, batch: Any) -> Any:
            Now.part += 1
            found = original(self, step, batch)
            bad = step == STEP and part in (None, Now.part)
            return {name: each + value for name, each in found.items()} if bad else found

        task.loss = loss

    return plant


def in_output(value: float, one: bool = False) -> Callable[[], None]:
    """Poison what the U-Net says."""

    def plant() -> None:
        original = Diffusion.output

        def output(self: Any, *args: Any) -> Any:
            found = original(self, *args)
            if Now.step != STEP:
                return found
            return found + spoil(torch.zeros_like(found), value, one)

        Diffusion.output = output

    return plant


def in_gradient(value: float, which: Callable[[list[Any]], list[Any]], one: bool) -> Any:
    """Poison gradients after the backward pass."""

    def plant() -> None:
        original = trainer.update

        def update(accelerator: Any, network: Any, *args: Any) -> Any:
            if Now.step == STEP:
                for parameter in which(list(network.parameters())):
                    parameter.grad = spoil(parameter.grad, value, one)
            return original(accelerator, network, *args)

        trainer.update = update

    return plant


def in_field(task: Any, name: str, value: float, one: bool = False) -> Callable[[], None]:
    """Poison a tensor of the VAE's or the classifier's batch."""

    def plant() -> None:
        original = task.loss

        def loss(self: Any, step: int, batch: Any) -> Any:
            return original(self, step, {**batch, name: spoil(batch[name], value, one)} if step == STEP else batch)

        task.loss = loss

    return plant


def in_discriminator(value: float) -> Callable[[], None]:
    """Poison the loss of the VAE's discriminator alone."""

    def plant() -> None:
        original = autoencoder.discriminator_loss
        autoencoder.discriminator_loss = lambda real, fake: original(real, fake) + (value if Now.step == STEP else 0)

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
    "VAE: pixels, one NaN": ("vae", in_field(Autoencoder, "pixels", NAN, one=True)),
    "VAE: pixels, inf": ("vae", in_field(Autoencoder, "pixels", INF)),
    "VAE: posterior noise, one inf": ("vae", in_field(Autoencoder, "noise", INF, one=True)),
    "VAE: every gradient, one NaN each": ("vae", in_gradient(NAN, lambda all: all, True)),
    "VAE: the discriminator's loss, NaN": ("vae", in_discriminator(NAN)),
    "classifier: latents, one NaN": ("classifier", in_field(Classifier, "x0", NAN, one=True)),
    "classifier: noise, inf": ("classifier", in_field(Classifier, "eps", INF)),
    "classifier: loss, inf, with finite gradients": ("classifier", in_loss(INF, task=Classifier)),
    "classifier: gradient of the last weight, one NaN": ("classifier", in_gradient(NAN, lambda all: all[-1:], True)),
}


def poison(bench: Bench, places: int | None) -> Figures:
    """Poison each place once."""
    figures: Counter[str] = Counter()
    for name in ("poisoned tensors", "steps not skipped", "not written down"):
        figures[name] = 0
    names = list(PLACES) if places is None else bench.chance.sample(list(PLACES), places)
    for number, name in enumerate(names):
        kind, plant = PLACES[name]
        words: dict[str, Any] = {"loop__evaluate_every": 0, "loop__sample_every": 0, "loop__keep": 99}
        for section in ("loop", "vae_training", "classifier_training"):
            words |= {f"{section}__checkpoint_every": 1, f"{section}__steps": 7}
        config = bench.world.recipe(kind, bench.world.home / f"poison-{number}", **words)
        with clean(config):
            child = bench.world.train(kind, config, before=lambda plant=plant: (follow(), plant()))
            if child.wait() != 0:
                figures["errors"] += 1
                print(name, child.words[-3000:])
                continue
            folder = saved_in(kind, config)
            for file in folder.glob("step_*/*.safetensors"):
                tensors = load_file(file).values()
                figures["tensors examined"] += len(tensors)
                figures["poisoned tensors"] += sum(not bool(t.isfinite().all()) for t in tensors)
            stood = [
                key
                for key in ("unet", "vae", "classifier")
                if (folder / f"step_{STEP:07d}" / f"{key}.safetensors").exists()
            ]
            stood = ["discriminator"] if "discriminator" in name else stood
            for key in [*stood, *(f"{key}.optimizer" for key in stood)]:
                before, after = (folder / f"step_{STEP + i:07d}" / f"{key}.safetensors" for i in (0, 1))
                moved = before.read_bytes() != after.read_bytes()
                figures["steps not skipped"] += moved
            figures["not written down"] += not written_down(Path(config.run))
            figures["places"] += 1
    return figures


def follow() -> None:
    """Keep account of the step that is running."""
    for task in (Autoencoder, Diffusion, Classifier):
        task.export = lambda *args: None  # not what is examined here
    original = trainer.Trainer.step

    def step(self: Any, n: int, *args: Any) -> Any:
        Now.step, Now.part = n, -1
        try:
            return original(self, n, *args)
        finally:
            Now.step = -1

    trainer.Trainer.step = step


def written_down(run: Path) -> bool:
    """Whether log.jsonl names the step and its eight samples, and no other step was skipped."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    skipped = [row for row in rows if row.get("event") == "skipped"]
    if len(skipped) != 1 or skipped[0]["step"] != STEP + 1:
        return False
    right = skipped[0]["samples"] == [8 * STEP, 8 * STEP + 7] and len(skipped[0]["rows"]) == 8
    return right and all("metadata.jsonl row " in row for row in skipped[0]["rows"]) and skipped[0]["lr"] > 0
