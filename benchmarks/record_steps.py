"""Run an unchanged training script and record when each of its optimizer steps ended.

    python -m benchmarks.record_steps OUT.json STEPS SCRIPT ARGS...    exit after STEPS steps; with 0 run to the end
    python -m benchmarks.record_steps --trials=2 OUT.json STEPS SCRIPT ARGS...    record the third optimizer
    python -m benchmarks.record_steps --snapshots=FOLDER OUT.json STEPS SCRIPT ARGS...

The script runs by `runpy` as __main__ in this process. This is added to it:
- torch's public hook after every optimizer step (`register_optimizer_step_post_hook`) records time, CPU time and peak
  memory of this process. No function is replaced, and nothing waits: on a CPU a step is over when it returns.
  With --trials, the first optimizers that are stepped are skipped: a script may try a few steps before its run.
- After STEPS steps OUT.json is written and the process exits, so that the final save of neither script is timed.
- With --snapshots, a `step` of the moving average (diffusers' EMAModel, or our `Average`) looks for files named
  FOLDER/want-NAME. For each, it saves the averaged weights as FOLDER/NAME.safetensors. The metadata hold the time, the
  number of steps, and the number of the average in the process: a trial before the run has an average of its own.
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

STARTED = time.monotonic()  # without the interpreter's start, some milliseconds, for both scripts


def main() -> None:
    """Parse the arguments and run the script."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_steps", description=__doc__)
    add = parser.add_argument
    add("out", type=Path)
    add("steps", type=int)
    add("--trials", type=int, default=0)
    add("--snapshots", type=Path)
    add("script", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    recorder = Recorder(chosen.trials)

    def finish() -> None:
        chosen.out.write_text(json.dumps(recorder.record()), "utf-8")

    watch_steps(recorder, chosen.steps, finish)
    if chosen.snapshots:
        watch_average(chosen.snapshots)
    sys.argv = chosen.script
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if the script had been started directly
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        finish()


@dataclass
class Recorder:
    """Records the steps of one optimizer.

    Attributes:
        trials: number of optimizers that are stepped before it.
        optimizers: all that were stepped so far, in order; weak references, since their moments take memory.
        ends: the end of each step: time, CPU seconds and peak bytes so far.
    """

    trials: int
    optimizers: list[weakref.ref[Any]] = field(default_factory=list)
    ends: list[tuple[float, float, int]] = field(default_factory=list)

    def step(self, optimizer: Any) -> None:
        """To be called after each step of any optimizer."""
        if not any(known() is optimizer for known in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))
        if len(self.optimizers) > self.trials and self.optimizers[self.trials]() is optimizer:
            self.ends.append((time.monotonic(), time.process_time(), peak_bytes()))

    def record(self) -> dict[str, Any]:
        """The content of OUT.json."""
        ends, cpu, peaks = zip(*self.ends) if self.ends else ((), (), ())
        steps = {"started": STARTED, "steps": ends, "cpu": cpu, "steps_peak_bytes": max(peaks, default=0)}
        return {**steps, "peak_bytes": peak_bytes(), "optimizers": len(self.optimizers)}


def watch_steps(recorder: Recorder, steps: int, finish: Any) -> None:
    """Record each optimizer step, and exit after `steps` of them."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def hook(optimizer: Any, *_: Any) -> None:
        recorder.step(optimizer)
        if steps and len(recorder.ends) == steps:
            finish()
            exit_at_once()

    register_optimizer_step_post_hook(hook)


def watch_average(folder: Path) -> None:
    """Save the averaged weights after the next step when a file want-NAME appears in the folder."""
    from diffusers.training_utils import EMAModel
    from safetensors.torch import save_file

    from ldm.models.ema import Average

    steps = {EMAModel: EMAModel.step, Average: Average.step}
    averages = count()

    def stepped(self: Any, parameters: Any) -> None:
        steps[type(self)](self, parameters)
        if not hasattr(self, "number"):
            self.number = next(averages)
        for request in folder.glob("want-*"):
            metadata = {
                "time": str(time.monotonic()),
                "step": str(self.optimization_step),
                "average": str(self.number),
            }
            weights = {f"{i:04d}": weight.contiguous() for i, weight in enumerate(self.shadow_params)}
            name = request.name.removeprefix("want-")
            save_file(weights, folder / f".{name}.new", metadata)
            (folder / f".{name}.new").rename(folder / f"{name}.safetensors")
            request.unlink()

    for kind in steps:
        setattr(kind, "step", stepped)  # noqa: B010


def exit_at_once() -> NoReturn:
    """End this process and its workers without the rest of the script."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
