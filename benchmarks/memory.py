"""Peak memory of a training: train_ldm.py against diffusers' train_text_to_image.py.

    python -m benchmarks.memory --peer-script train_text_to_image.py

The largest resident size of a fresh process that runs from nothing to the saved pipeline: on our side,
encoding everything is part of it. Both sides read their data in the main process, because memory that worker processes
share can't be divided among them. The peer is P1. Beside it, the same up to the last step, without what the last save
takes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Measured, Target, arguments, compare, report
from benchmarks.settings import SETTINGS, build
from benchmarks.sides import Sides, add_peer, likely_best, script_facts

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
    facts: dict[str, Any] = {**script_facts(chosen.peer_script), "batch_size": chosen.batch_size, "P1": flags}
    for name in chosen.settings:
        work: Path = chosen.out.resolve() / "memory" / name
        shutil.rmtree(work, ignore_errors=True)
        folders = build(SETTINGS[name], chosen.source, work / "given", chosen.pictures)
        script, batch_size, threads = chosen.peer_script.resolve(), chosen.batch_size, chosen.threads
        sides = Sides(folders, work, script, batch_size, threads, warmup=1, steps=chosen.steps, whole=True)
        comparisons += measure(sides, name, chosen.pairs, flags)
        shutil.rmtree(work)
    report("memory", comparisons, chosen.out, chosen.threads, **facts)


def measure(sides: Sides, name: str, pairs: int, flags: list[str]) -> list[Comparison]:
    """The pairs of one setting: of whole runs, and of the same up to their last steps."""
    whole = Comparison(f"{name} peak memory, P1", "MiB", target=TARGETS.get(name))
    compare(whole, lambda: peak(sides.ours()), lambda: peak(sides.peer(flags)), pairs)
    steps = Comparison(f"{name} peak memory up to the last step, P1", "MiB")
    return [whole, steps.with_values(whole, lambda told: told["steps_peak_bytes"] / MIB)]


def peak(told: Measured) -> Measured:
    """What a side told, the peak of the whole run being the value."""
    return {**told, "value": told["peak_bytes"] / MIB}


if __name__ == "__main__":
    main()
