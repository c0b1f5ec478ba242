"""Training samples per second: train_ldm.py against diffusers' train_text_to_image.py.

    python -m benchmarks.train_throughput --peer-script train_text_to_image.py

P1 is the peer with its best flags, P0 with its defaults. Pictures, networks, batch, threads and torch are the same.
Each measurement is a fresh process whose first steps are not counted. Ours encodes once and caches; the peer encodes at
every step. So there are three results: the steady state (against P1 and P0), the first epoch of a fresh run with
everything before it, and the epoch after which the cache has paid off. The steady state is also measured in CPU seconds
of the main process, which other programs disturb less.
"""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Target, arguments, compare, report
from benchmarks.settings import SETTINGS, build
from benchmarks.training_runs import TrainingRuns, add_peer, likely_best, peer_identity

TARGETS = {
    "P1": {"A": Target(6, 12), "B": Target(2.5, 5), "C": Target(1.5, 3)},
    "P0": {"A": Target(8, 25), "B": Target(4, 10), "C": Target(2.5, 5)},
}


def measure(runs: TrainingRuns, name: str, pairs: int, flags: list[str], defaults: bool) -> list[Comparison]:
    """All comparisons of one setting. Against P1 ours starts without a cache, against P0 with one."""
    cache, pictures = runs.work / "cache", runs.folders.pictures
    steady = Comparison(f"{name} steady, P1", "samples/s", target=TARGETS["P1"][name])
    compare(steady, runs.ours, lambda: runs.peer(flags), pairs)
    fresh_run = Comparison(f"{name} first epoch, P1", "s", "peer/ours")
    fresh_run.with_values(steady, lambda run: run["start"] + (pictures - runs.batch_size) / run["value"])
    by_cpu = Comparison(f"{name} steady, P1, by CPU time", "CPU s/sample", "peer/ours")
    by_cpu.with_values(steady, lambda run: run["cpu_seconds_per_sample"])
    found = [steady, by_cpu, fresh_run]
    if defaults:
        found.append(Comparison(f"{name} steady, P0", "samples/s", target=TARGETS["P0"][name]))
        compare(found[-1], lambda: runs.ours(cache), lambda: runs.peer([]), pairs)
    return found


def break_even(steady: Comparison, pictures: int) -> float | None:
    """The epoch after which our run, started without a cache, is ahead: median of the pairs; None if never."""
    epochs = []
    for pair in steady.pairs:
        ours, peer = pair["ours"], pair["peer"]
        saved = pictures / peer["value"] - pictures / ours["value"]  # seconds an epoch
        epochs.append(max(0.0, ours["start"] - peer["start"]) / saved if saved > 0 else math.inf)
    median = statistics.median(epochs)
    return median if math.isfinite(median) else None


def main() -> None:
    """Measure every setting and report."""
    parser = arguments(__doc__)
    add_peer(parser)
    parser.add_argument("--settings", default="ABC", help="which of A, B and C")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each process")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before them, at least 1")
    parser.add_argument(
        "--no-search", action="store_true", help="P1 is bf16 if the CPU is faster in it, without workers"
    )
    parser.add_argument("--no-defaults", action="store_true", help="without P0")
    chosen = parser.parse_args()
    comparisons: list[Comparison] = []
    facts: dict[str, Any] = {**peer_identity(chosen.peer_script), "batch_size": chosen.batch_size, "settings": {}}
    for name in chosen.settings:
        work: Path = chosen.out.resolve() / "train_throughput" / name
        shutil.rmtree(work, ignore_errors=True)
        folders = build(SETTINGS[name], chosen.source, work / "given", chosen.pictures)
        runs = TrainingRuns(
            folders, work, chosen.peer_script.resolve(), chosen.batch_size, chosen.threads, chosen.warmup, chosen.steps
        )
        flags, tried = (likely_best(), {}) if chosen.no_search else runs.best_flags()
        found = measure(runs, name, chosen.pairs, flags, not chosen.no_defaults)
        epochs = break_even(found[0], folders.pictures)
        facts["settings"][name] = {
            "P1": flags,
            "tried": tried,
            "pictures": folders.pictures,
            "break_even_epochs": epochs,
        }
        comparisons += found
        shutil.rmtree(work)
    report("train_throughput", comparisons, chosen.out, chosen.threads, **facts)
    for name, setting in facts["settings"].items():
        epochs = setting["break_even_epochs"]
        paid = "never" if epochs is None else f"after {epochs:.2f} epochs of {setting['pictures']} pictures"
        print(f"{name}: the cache has paid off {paid}; P1 is {' '.join(setting['P1'])}")


if __name__ == "__main__":
    main()
