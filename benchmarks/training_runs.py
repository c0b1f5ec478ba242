"""The two trainings that the benchmarks compare, in fresh processes: ours (train_ldm.py) and the peer's
(train_text_to_image.py of diffusers).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Measured, fresh
from benchmarks.settings import Folders
from ldm.system.devices import cpu_is_faster_in_bf16

TRAIN = ROOT / "train" / "train_ldm.py"
#: P1's flags on every machine: the script's options that make its training faster or better.
BEST = ("--use_ema", "--foreach_ema", "--snr_gamma=5.0")
#: Optimizers that train_ldm.py steps before the run's own: its check times one training and overfits another.
OURS_TRIALS = 2
PRECISIONS = ("no", "bf16")
WORKERS = (0, 2)


@dataclass(frozen=True)
class TrainingRuns:
    """How both trainings are run.

    Attributes:
        folders: the inputs of both.
        work: the folder of their outputs.
        script: the peer's training script.
        batch_size, threads: of both.
        warmup: untimed steps at the start of each process.
        steps: timed steps.
        whole: run the processes to their end, saving included, instead of stopping after the last timed step.
    """

    folders: Folders
    work: Path
    script: Path
    batch_size: int
    threads: int
    warmup: int
    steps: int
    whole: bool = False

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.steps < 1:
            raise SystemExit(f"--warmup, --steps: expected at least 1, got {self.warmup} and {self.steps}")
        need = self.batch_size * (self.warmup + self.steps)
        if need > self.folders.pictures:  # the peer's last batch of an epoch is a smaller one
            raise SystemExit(f"--pictures: the steps need {need}, got {self.folders.pictures}")

    def ours(self, cache: Path | None = None) -> Measured:
        """Our training. It first encodes what is missing in the cache folder; without one, everything."""
        run = self.work / "ours"
        cache = cache or run / "cache"
        shutil.rmtree(run, ignore_errors=True)
        arguments = self.folders.ours(
            run, self.batch_size, self.warmup + self.steps, self.threads, f"data.cache={cache}"
        )
        return self.measured(TRAIN, arguments, OURS_TRIALS)

    def peer(self, flags: Sequence[str]) -> Measured:
        """The peer's training, with these flags."""
        out = self.work / "peer"
        shutil.rmtree(out / "run", ignore_errors=True)  # its data set stays prepared
        return self.measured(self.script, self.folders.peer(out, self.batch_size, self.warmup + self.steps, *flags))

    def measured(self, script: Path, arguments: Sequence[str], trials: int = 0) -> Measured:
        """Run a script; {"value": samples/s of the timed steps, "start": seconds to the first step's end, …}.

        Args:
            trials: number of optimizers that are stepped before the one to record.
        """
        record = self.work / f"{script.stem}.json"
        stop_after = 0 if self.whole else self.warmup + self.steps
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "benchmarks.record_steps",
            f"--trials={trials}",
            record,
            str(stop_after),
            script,
            *arguments,
        ]
        fresh(command, self.threads, self.work / f"{script.stem}.log")
        recorded = json.loads(record.read_text("utf-8"))
        seconds, cpu = ([b - a for a, b in zip(recorded[clock], recorded[clock][1:])] for clock in ("steps", "cpu"))
        samples = self.batch_size * self.steps
        return {
            "value": samples / sum(seconds[self.warmup - 1 :]),
            "cpu_seconds_per_sample": sum(cpu[self.warmup - 1 :]) / samples,
            "start": recorded["steps"][0] - recorded["started"],
            "steps_peak_bytes": recorded["steps_peak_bytes"],
            "peak_bytes": recorded["peak_bytes"],
            "steps": [round(second, 4) for second in seconds],
        }

    def best_flags(self) -> tuple[list[str], dict[str, float]]:
        """P1: the fastest combination of precision and workers on this machine, each tried once."""
        tried = {}
        for precision in PRECISIONS:
            for workers in WORKERS:
                flags = best(precision, workers)
                tried[" ".join(flags)] = self.peer(flags)["value"]
        return max(tried, key=lambda flags: tried[flags]).split(), tried


def best(precision: str, workers: int) -> list[str]:
    """P1 with this precision and number of workers."""
    return [*BEST, f"--mixed_precision={precision}", f"--dataloader_num_workers={workers}"]


def likely_best() -> list[str]:
    """P1 without a search: bf16 if the CPU is faster in it, and no workers."""
    return best("bf16" if cpu_is_faster_in_bf16() else "no", 0)


def add_peer(parser: argparse.ArgumentParser) -> None:
    """Add the options of a benchmark that trains."""
    add = parser.add_argument
    add("--peer-script", type=Path, required=True, help="diffusers' examples/text_to_image/train_text_to_image.py")
    add("--source", default="data/openmoji", help="captioned pictures (default: data/openmoji)")
    add("--pictures", type=int, default=0, help="number of training pictures, spread evenly; 0 is all")
    add("--batch-size", type=int, default=16, help="of both trainings (default: 16)")


def peer_identity(script: Path) -> dict[str, Any]:
    """Name and SHA-256 of the peer's script."""
    return {"peer_script": script.name, "peer_script_sha256": hashlib.sha256(script.read_bytes()).hexdigest()}
