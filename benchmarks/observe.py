"""Run a training script as it is and note when each of its optimizer steps ended.

    python -m benchmarks.observe OUT.json STEPS SCRIPT WORDS...    leave after so many steps; 0 runs to the script's end
    python -m benchmarks.observe OUT.json STEPS --snapshots FOLDER SCRIPT WORDS...

What this adds to the script, which runs by `runpy` as its own __main__ in this process:
- torch's public hook after every optimizer step (`register_optimizer_step_post_hook`) notes the time, and CPU time and
  peak size of this process. No function is replaced, and nothing waits: on a CPU a step is over when it returns.
- After STEPS steps OUT.json is written and the process left, so that neither side's saving at the end is timed.
- With --snapshots, the average's `step` (of diffusers' EMAModel, or of our `Average`) is followed by a look whether
  FOLDER holds a file want-NAME; if so the averaged weights are saved as FOLDER/NAME.safetensors. Its metadata say when,
  after how many steps, and of which average of the process: a trial before the first step has one of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

STARTED = time.monotonic()  # the interpreter's own start, some milliseconds, is left out on both sides


def main() -> None:
    """Read the words and run the script."""
    out, steps, rest = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    snapshots = None
    if rest[0] == "--snapshots":
        snapshots, rest = Path(rest[1]), rest[2:]
    seen: list[tuple[float, float, int]] = []

    def finish() -> None:
        ends, cpu, peaks = zip(*seen) if seen else ((), (), ())
        told = {"started": STARTED, "steps": ends, "cpu": cpu, "steps_peak_bytes": max(peaks, default=0)}
        out.write_text(json.dumps({**told, "peak_bytes": peak_bytes()}), "utf-8")

    watch_steps(seen, steps, finish)
    if snapshots:
        watch_average(snapshots)
    sys.argv = rest
    sys.path[0] = str(Path(rest[0]).parent)  # as if the script had been started by itself
    try:
        runpy.run_path(rest[0], run_name="__main__")
    finally:
        finish()


def watch_steps(seen: list[tuple[float, float, int]], steps: int, finish: Any) -> None:
    """Note what each optimizer step ends with, and leave after the last one that is wanted."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def hook(*_: Any) -> None:
        seen.append((time.monotonic(), time.process_time(), peak_bytes()))
        if len(seen) == steps:
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


def peak_bytes() -> int:
    """The largest resident size of this process so far; of its workers, nothing."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def leave() -> NoReturn:
    """End at once, workers included, without what a script does at its end."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
