"""Run a training script as it is and note when each of its optimizer steps ended.

    python -m benchmarks.observe OUT.json STEPS SCRIPT WORDS...    leave after so many steps; 0 runs to the script's end
    python -m benchmarks.observe --trials=2 OUT.json STEPS SCRIPT WORDS...    the steps of the third optimizer are meant
    python -m benchmarks.observe --snapshots=FOLDER OUT.json STEPS SCRIPT WORDS...

What this adds to the script, which runs by `runpy` as its own __main__ in this process:
- torch's public hook after every optimizer step (`register_optimizer_step_post_hook`) notes the time, and CPU time and
  peak size of this process. No function is replaced, and nothing waits: on a CPU a step is over when it returns.
  With --trials, the first optimizers that are stepped don't count: a script may try a few steps before its run.
- After STEPS steps OUT.json is written and the process left, so that neither side's saving at the end is timed.
- With --snapshots, the average's `step` (of diffusers' EMAModel, or of our `Average`) is followed by a look whether
  FOLDER holds a file want-NAME; if so the averaged weights are saved as FOLDER/NAME.safetensors. Its metadata say when,
  after how many steps, and of which average of the process: a trial before the first step has one of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import runpy
import sys
import time
import weakref
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from ldm.system.memory import peak_bytes

STARTED = time.monotonic()  # the interpreter's own start, some milliseconds, is left out on both sides


def main() -> None:
    """Read the words and run the script."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.observe", description=__doc__)
    add = parser.add_argument
    add("out", type=Path)
    add("steps", type=int)
    add("--trials", type=int, default=0)
    add("--snapshots", type=Path)
    add("script", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    seen = Seen(chosen.trials)

    def finish() -> None:
        chosen.out.write_text(json.dumps(seen.told()), "utf-8")

    watch_steps(seen, chosen.steps, finish)
    if chosen.snapshots:
        watch_average(chosen.snapshots)
    sys.argv = chosen.script
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if the script had been started by itself
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        finish()


@dataclass
class Seen:
    """The ends of the steps of one optimizer of many.

    Attributes:
        trials: optimizers that are stepped before it.
        optimizers: all that were stepped so far, in order; held weakly, their moments are memory.
        ends: when each step ended, with CPU seconds and peak bytes until then.
    """

    trials: int
    optimizers: list[weakref.ref[Any]] = field(default_factory=list)
    ends: list[tuple[float, float, int]] = field(default_factory=list)

    def step(self, optimizer: Any) -> None:
        """An optimizer has taken a step."""
        if not any(known() is optimizer for known in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))
        if len(self.optimizers) > self.trials and self.optimizers[self.trials]() is optimizer:
            self.ends.append((time.monotonic(), time.process_time(), peak_bytes()))

    def told(self) -> dict[str, Any]:
        """What OUT.json holds."""
        ends, cpu, peaks = zip(*self.ends) if self.ends else ((), (), ())
        told = {"started": STARTED, "steps": ends, "cpu": cpu, "steps_peak_bytes": max(peaks, default=0)}
        return {**told, "peak_bytes": peak_bytes(), "optimizers": len(self.optimizers)}


def watch_steps(seen: Seen, steps: int, finish: Any) -> None:
    """Note what each optimizer step ends with, and leave after the last one that is wanted."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def hook(optimizer: Any, *_: Any) -> None:
        seen.step(optimizer)
        if steps and len(seen.ends) == steps:
            finish()
            leave()

    register_optimizer_step_post_hook(hook)


def watch_average(folder: Path) -> None:
    """Save the averaged weights when asked, as soon as they have been stepped."""
    from diffusers.training_utils import EMAModel
    from safetensors.torch import save_file

    from ldm.models.ema import Average

    steps = {EMAModel: EMAModel.step, Average: Average.step}
    averages = count()

    def stepped(self: Any, parameters: Any) -> None:
        steps[type(self)](self, parameters)
        if not hasattr(self, "number"):
            self.number = next(averages)
        for wanted in folder.glob("want-*"):
            facts = {
                "time": str(time.monotonic()),
                "step": str(self.optimization_step),
                "average": str(self.number),
            }
            weights = {f"{i:04d}": weight.contiguous() for i, weight in enumerate(self.shadow_params)}
            name = wanted.name.removeprefix("want-")
            save_file(weights, folder / f".{name}.new", facts)
            (folder / f".{name}.new").rename(folder / f"{name}.safetensors")
            wanted.unlink()

    for kind in steps:
        setattr(kind, "step", stepped)  # noqa: B010


def leave() -> NoReturn:
    """End at once, workers included, without what a script does at its end."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
