"""Peak memory of a training: train_ldm.py against diffusers' train_text_to_image.py.

    python -m benchmarks.memory --peer-script train_text_to_image.py

The largest resident size of a fresh process that runs from nothing to the saved pipeline; ours includes encoding
everything. Both read their data in the main process, because shared memory of worker processes can't be attributed. The
peer is P1. The same is measured up to the last step, without the final save.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Measured, Target, arguments, compare, report
from benchmarks.settings import SETTINGS, build
from benchmarks.training_runs import TrainingRuns, add_peer, likely_best, peer_identity

TARGETS = {"A": Target(0.6, 0.35)}
MIB = 2**20


def main() -> None:
    """Measure every setting and report."""
    parser = arguments(__doc__, pairs=2)
    add_peer(parser)
    parser.add_argument("--settings", default="ABC", help="which of A, B and C")
    parser.add_argument("--steps", type=int, default=5, help="steps of each process; the peak comes early")
    chosen = parser.parse_args()
    flags = likely_best()
    comparisons: list[Comparison] = []
    facts: dict[str, Any] = {**peer_identity(chosen.peer_script), "batch_size": chosen.batch_size, "P1": flags}
    for name in chosen.settings:
        work: Path = chosen.out.resolve() / "memory" / name
        shutil.rmtree(work, ignore_errors=True)
        folders = build(SETTINGS[name], chosen.source, work / "given", chosen.pictures)
        script, batch_size, threads = chosen.peer_script.resolve(), chosen.batch_size, chosen.threads
        runs = TrainingRuns(folders, work, script, batch_size, threads, warmup=1, steps=chosen.steps, whole=True)
        comparisons += measure(runs, name, chosen.pairs, flags)
        shutil.rmtree(work)
    report("memory", comparisons, chosen.out, chosen.threads, **facts)


def measure(runs: TrainingRuns, name: str, pairs: int, flags: list[str]) -> list[Comparison]:
    """The pairs of one setting: whole runs, and the same runs up to their last steps."""
    whole = Comparison(f"{name} peak memory, P1", "MiB", target=TARGETS.get(name))
    compare(whole, lambda: peak(runs.ours()), lambda: peak(runs.peer(flags)), pairs)
    steps = Comparison(f"{name} peak memory up to the last step, P1", "MiB")
    return [whole, steps.with_values(whole, lambda run: run["steps_peak_bytes"] / MIB)]


def peak(run: Measured) -> Measured:
    """A measured run, with the peak of its memory as the value."""
    return {**run, "value": run["peak_bytes"] / MIB}


if __name__ == "__main__":
    main()
