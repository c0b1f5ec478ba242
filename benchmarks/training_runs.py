"""The two sides of a training benchmark in fresh processes: train_ldm.py and diffusers' train_text_to_image.py."""

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
#: P1's flags whatever the machine: what the script offers that makes its training faster or better.
BEST = ("--use_ema", "--foreach_ema", "--snr_gamma=5.0")
#: Optimizers that train_ldm.py steps before the run's own: its trial times a training and tries to learn with another.
OURS_TRIALS = 2
PRECISIONS = ("no", "bf16")
WORKERS = (0, 2)


@dataclass(frozen=True)
class Sides:
    """How both sides are run.

    Attributes:
        folders: what both are given.
        work: where they write.
        script: the peer's.
        batch_size, threads: of both.
        warmup: steps that are not timed, at the start of each process.
        steps: steps that are.
        whole: let the processes run to their end, saving included, instead of leaving after the last step.
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
            raise SystemExit(f"--pictures: {self.folders.pictures} end before the last step; {need} are needed")

    def ours(self, cache: Path | None = None) -> Measured:
        """Our side, which encodes first what is missing in its cache; without a folder, all of it."""
        run = self.work / "ours"
        cache = cache or run / "cache"
        shutil.rmtree(run, ignore_errors=True)
        words = self.folders.ours(run, self.batch_size, self.warmup + self.steps, self.threads, f"data.cache={cache}")
        return self.observed(TRAIN, words, OURS_TRIALS)

    def peer(self, flags: Sequence[str]) -> Measured:
        """The peer, with these flags."""
        out = self.work / "peer"
        shutil.rmtree(out / "run", ignore_errors=True)  # its data set stays prepared
        return self.observed(self.script, self.folders.peer(out, self.batch_size, self.warmup + self.steps, *flags))

    def observed(self, script: Path, words: Sequence[str], trials: int = 0) -> Measured:
        """Run a script; {"value": samples/s of the timed steps, "start": seconds to the first step's end, …}.

        Args:
            trials: optimizers that are stepped before the one whose steps are meant.
        """
        record = self.work / f"{script.stem}.json"
        leave_after = 0 if self.whole else self.warmup + self.steps
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "benchmarks.observe",
            f"--trials={trials}",
            record,
            str(leave_after),
            script,
            *words,
        ]
        fresh(command, self.threads, self.work / f"{script.stem}.log")
        told = json.loads(record.read_text("utf-8"))
        seconds, cpu = ([b - a for a, b in zip(told[clock], told[clock][1:])] for clock in ("steps", "cpu"))
        samples = self.batch_size * self.steps
        return {
            "value": samples / sum(seconds[self.warmup - 1 :]),
            "cpu_seconds_per_sample": sum(cpu[self.warmup - 1 :]) / samples,
            "start": told["steps"][0] - told["started"],
            "steps_peak_bytes": told["steps_peak_bytes"],
            "peak_bytes": told["peak_bytes"],
            "steps": [round(second, 4) for second in seconds],
        }

    def best_flags(self) -> tuple[list[str], dict[str, float]]:
        """P1: the precision and the number of workers with which the peer is fastest here, each tried once."""
        tried = {}
        for precision in PRECISIONS:
            for workers in WORKERS:
                flags = best(precision, workers)
                tried[" ".join(flags)] = self.peer(flags)["value"]
        return max(tried, key=lambda flags: tried[flags]).split(), tried


def best(precision: str, workers: int) -> list[str]:
    """P1 with this precision and so many workers."""
    return [*BEST, f"--mixed_precision={precision}", f"--dataloader_num_workers={workers}"]


def likely_best() -> list[str]:
    """P1 without trying: bf16 if the CPU multiplies it faster, and no workers."""
    return best("bf16" if cpu_is_faster_in_bf16() else "no", 0)


def add_peer(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that trains."""
    add = parser.add_argument
    add("--peer-script", type=Path, required=True, help="diffusers' examples/text_to_image/train_text_to_image.py")
    add("--source", default="data/openmoji", help="captioned pictures (default: data/openmoji)")
    add("--pictures", type=int, default=0, help="training pictures, spread evenly; 0 is all")
    add("--batch-size", type=int, default=16, help="of both sides (default: 16)")


def script_facts(script: Path) -> dict[str, Any]:
    """Which script the peer is."""
    return {"peer_script": script.name, "peer_script_sha256": hashlib.sha256(script.read_bytes()).hexdigest()}
