"""How the time of a training step and the memory of the process scale with rows, resolution and batch size.

    python -m benchmarks.scaling

A result is the slope of log(measured value) over log(size): 0 is constant, 1 is proportional. The settings of an axis
are measured in turns, forwards and backwards, in one process. Each turn through all of them gives one slope; the median
is reported with a bootstrap interval. Memory is that of a fresh process for each setting, which reads its rows, opens
the cache and trains, like train_ldm.py. Rows are synthetic, in a real cache (benchmarks/synthetic.py).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import Target, arguments, conditions, fresh, median_interval, write
from benchmarks.synthetic import CHANNELS, Rows
from ldm.models.unet import UNetConfig
from ldm.system.files import check_space

ROWS = Target(0.02, 0.0)  # slope over the number of rows, of time and of memory
REAL = UNetConfig(channels=(128, 192, 256), attention=(False, True, True), layers=1)
SMALL = UNetConfig(channels=(32, 64), attention=(False, True), layers=1)
LOADED = 200  # batches that a fresh process reads, besides those of its training steps


@dataclass(frozen=True)
class Setting:
    """The data and the batch size of a step."""

    rows: Rows
    batch: int


@dataclass
class Axis:
    """Settings that differ in one number.

    Attributes:
        x: that number, of each setting.
        turns: by name of the measurement: for each turn, a value of each setting.
    """

    name: str
    x: list[int]
    settings: list[Setting]
    target: Target | None = None
    turns: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, name: str, turn: list[float]) -> None:
        """Add a turn."""
        self.turns.setdefault(name, []).append(turn)

    def results(self) -> dict[str, dict[str, Any]]:
        """The slope of each measurement, and its median at each setting."""
        return {name: self.result(turns) for name, turns in self.turns.items()}

    def result(self, turns: list[list[float]]) -> dict[str, Any]:
        slopes = [slope(self.x, turn) for turn in turns]
        low, high = median_interval(slopes)
        values = [statistics.median(turn[i] for turn in turns) for i in range(len(self.x))]
        return {"slope": statistics.median(slopes), "low": low, "high": high, "turns": len(turns), "values": values}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent b of y = a x^b, by least squares in the logarithms."""
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


class Stepper:
    """A U-Net in training, and a stream of batches for each setting."""

    def __init__(self, work: Path, unet: UNetConfig, settings: Sequence[Setting], threads: int) -> None:
        import torch

        from ldm.models.unet import build_unet, choose_attention
        from ldm.training.config import Config, LoopConfig
        from ldm.training.distributed import build_accelerator
        from ldm.training.objective import DiffusionConfig
        from ldm.training.randomness import sample_numbers
        from ldm.training.samples import LatentSamples
        from ldm.training.tasks.diffusion import Diffusion
        from ldm.training.trainer import Trainer as Loop

        loop = LoopConfig(threads=threads)
        diffusion = DiffusionConfig(prediction="v", weighting="min_snr")
        config = Config(run=str(work / "run"), unet=unet, loop=loop, diffusion=diffusion)
        accelerator = build_accelerator(loop)
        self.opening: dict[str, float] = {}
        self.streams = {}
        for setting in settings:
            start = time.perf_counter()
            source = setting.rows.source()
            read = time.perf_counter()
            cache = setting.rows.cache()
            self.opening = {"reading rows": read - start, "opening the cache": time.perf_counter() - read}
            edge = setting.rows.edge
            reading = Diffusion(config, accelerator)
            reading.samples = LatentSamples.of(config, source, (CHANNELS, edge, edge), cache)
            self.streams[setting] = Loop(reading).batches(sample_numbers(0, 1000, setting.batch, 1, 0, 1))
        torch.manual_seed(0)
        network = build_unet(unet, latent_shape=(CHANNELS, 16, 16), context_dim=settings[0].rows.context[1])
        choose_attention(network, accelerator.device)
        task = Diffusion(config, accelerator)
        task.train(network)
        self.loop = Loop(task)
        self.steps = 0

    def step(self, setting: Setting) -> dict[str, float]:
        """Seconds of reading a batch, of the whole training step with it, and the step's CPU seconds."""
        start, cpu = time.perf_counter(), time.process_time()
        batch = next(self.streams[setting])
        read = time.perf_counter()
        loss, _ = self.loop.step(self.steps, [batch])
        float(loss)  # waits for a GPU
        self.steps += 1
        end = time.perf_counter()
        return {"reading a batch": read - start, "step": end - start, "step, CPU time": time.process_time() - cpu}


def time_steps(axes: Sequence[Axis], work: Path, unet: UNetConfig, turns: int, steps: int, threads: int) -> None:
    """Add `turns` turns to each axis; a value is the median of `steps` steps."""
    stepper = Stepper(work, unet, list(dict.fromkeys(setting for axis in axes for setting in axis.settings)), threads)
    for setting in stepper.streams:
        stepper.step(setting)  # warm up
    with tqdm(total=turns * sum(len(axis.x) for axis in axes), desc="timing steps", unit="setting") as bar:
        for turn in range(turns):
            for axis in axes:
                order = list(range(len(axis.x)))
                found: dict[int, list[dict[str, float]]] = {}
                for place in order if turn % 2 == 0 else order[::-1]:
                    found[place] = [stepper.step(axis.settings[place]) for _ in range(steps)]
                    bar.update()
                for name in found[0][0]:
                    axis.add(name, [statistics.median(step[name] for step in found[place]) for place in order])


def resident(setting: Setting, work: Path, unet: UNetConfig, threads: int) -> dict[str, float]:
    """Seconds that this process takes to open its data, and MiB of memory while it trains: now, and the peak."""
    stepper = Stepper(work, unet, [setting], threads)
    for _ in range(3):
        stepper.step(setting)
    for _ in range(LOADED):
        next(stepper.streams[setting])
    stepper.step(setting)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(status[key].split()[0]) / 1024 for name, key in (("memory", "VmRSS"), ("peak", "VmHWM"))}
    return {**stepper.opening, **memory}


def measure_memory(axis: Axis, turns: int, work: Path, unet: UNetConfig, threads: int) -> None:
    """Add turns of fresh processes, for their memory, to an axis."""
    log, result = work / "resident.log", work / "resident.json"
    for turn in range(turns):
        found: dict[int, dict[str, float]] = {}
        places = list(range(len(axis.x)))
        for place in tqdm(places if turn % 2 == 0 else places[::-1], f"memory over {axis.name}", unit="process"):
            setting = axis.settings[place]
            words = [setting.rows.folder, setting.rows.count, setting.rows.edge, setting.batch]
            command = [sys.executable, "-m", "benchmarks.scaling", "--resident", str(result), *map(str, words)]
            fresh([*command, *(["--small"] if unet == SMALL else []), "--threads", str(threads)], threads, log)
            found[place] = json.loads(result.read_text("utf-8"))
        for name in found[0]:
            axis.add(name, [found[place][name] for place in places])


def build_axes(work: Path, quick: bool) -> list[Axis]:
    """The axes and their settings."""
    batch, few = (16, 1000) if quick else (32, 1000)
    counts = [1000, 4000, 16_000] if quick else [1000, 4000, 16_000, 64_000, 256_000]
    edges, sizes = ([8, 16], [8, 16, 32]) if quick else ([8, 16, 32], [8, 16, 32, 64])
    return [
        Axis("rows", counts, [Setting(Rows(work, count, 16), batch) for count in counts], ROWS),
        Axis("pixels", [(4 * e) ** 2 for e in edges], [Setting(Rows(work, few, e), batch) for e in edges]),
        Axis("batch", sizes, [Setting(Rows(work, few, 16), size) for size in sizes]),
    ]


def table(axes: Sequence[Axis]) -> str:
    """One line per measurement, in seconds and MiB."""
    lines = ["| over | what | slope | 95 % | floor / aim | turns | at each setting |", "|---|---|---|---|---|---|---|"]
    for axis in axes:
        for name, result in axis.results().items():
            limits = axis.target if name in ("step", "memory") else None
            target = f"{limits.floor:g} / {limits.aim:g}" if limits else ""
            at = ", ".join(f"{x:,}: {value:.4g}" for x, value in zip(axis.x, result["values"], strict=True))
            lines.append(
                f"| {axis.name} | {name} | {result['slope']:.3f} | {result['low']:.3f} to {result['high']:.3f} | "
                f"{target} | {result['turns']} | {at} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--turns", type=int, default=12, help="through the settings of each axis (default: 12)")
    add("--steps", type=int, default=3, help="of each setting in a turn (default: 3)")
    add("--processes", type=int, default=3, help="fresh processes for each setting, for the memory (default: 3)")
    add("--small", action="store_true", help="a small U-Net, for a larger share of reading in the steps")
    add("--quick", action="store_true", help="few rows, a small U-Net, few turns: a check, not a result")
    add("--resident", nargs=5, metavar="WORD", help=argparse.SUPPRESS)  # started by `measure_memory`
    chosen = parser.parse_args()
    unet = SMALL if chosen.small or chosen.quick else REAL
    if chosen.quick:
        chosen.turns, chosen.steps, chosen.processes = 4, 2, 1
    if chosen.resident:
        result, folder, count, edge, batch = chosen.resident
        setting = Setting(Rows(Path(folder), int(count), int(edge)), int(batch))
        Path(result).write_text(json.dumps(resident(setting, Path(folder), unet, chosen.threads)), "utf-8")
        return
    out: Path = chosen.out.resolve()
    work = out / "scaling"
    axes = build_axes(work, chosen.quick)
    work.mkdir(parents=True, exist_ok=True)
    try:
        rows = list(dict.fromkeys(setting.rows for axis in axes for setting in axis.settings))
        check_space(work, {"synthetic rows": sum(each.size for each in rows if not each.place.exists())})
        for each in tqdm(rows, "writing rows", unit="data set"):
            each.write()
        for axis in axes[:1] if chosen.quick else axes:
            measure_memory(axis, chosen.processes, work, unet, chosen.threads)
        time_steps(axes, work, unet, chosen.turns, chosen.steps, chosen.threads)
    finally:
        shutil.rmtree(work)
    print(table(axes))
    record = [
        {"over": axis.name, "x": axis.x, "target": axis.target and vars(axis.target), "results": axis.results(),
         "raw": axis.turns}
        for axis in axes
    ]  # fmt: skip
    facts = {"unet": vars(unet), "steps_of_a_value": chosen.steps, "loaded_batches": LOADED}
    write(out / "scaling.json", {"benchmark": "scaling", **conditions(chosen.threads), **facts, "axes": record})


if __name__ == "__main__":
    main()
