"""Time to quality: how long our training takes to be as good as the peer's after its whole budget.

    python -m benchmarks.time_to_quality --peer-script train_text_to_image.py --vae runs/openmoji64/vae \\
        --net nets/openmoji --budget 3600 --seeds 3

The peer, with its best flags, trains for a budget of seconds, and ours for as many or fewer (--share), in turns
(benchmarks/interleave.py). The clock of each begins with its process, so ours has to encode everything first. Ours
saves its averaged weights at twenty-one times, each 1.19 times the last. Afterwards, off the clock, pictures of the
held-out captions are generated from both, and measured with the in-domain CLIP (benchmarks/snapshot_quality.py): the
rank of the caption's picture among all real ones (geometric mean), and KID. Our snapshots are evaluated from the end
backwards. Ours has reached the peer at the earliest time from which on all its snapshots are at least as good in both.

Settings of our training alone, such as another objective, are given with --ours and recorded in the JSON.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Target, arguments, gemm, report
from benchmarks.interleave import Runner, Snapshot, interleave
from benchmarks.settings import SETTINGS, Folders, build
from benchmarks.snapshot_quality import SnapshotEvaluator, as_good
from benchmarks.training_runs import TRAIN, add_peer, likely_best, peer_identity
from ldm.data.dataset import read_captioned

TARGET = Target(2.5, 10)
MOMENTS = 21
FASTEST = 10  # steps a second; both trainings have more steps than they can take in the budget


def marks(budget: float) -> list[float]:
    """The seconds at which ours saves its weights: from a thirty-second of its budget to all of it."""
    return [budget * 32 ** (i / (MOMENTS - 1) - 1) for i in range(MOMENTS)]


def train(folders: Folders, work: Path, seed: int, flags: Sequence[str], chosen: argparse.Namespace) -> list[Runner]:
    """Run both trainings for the budget; ours first, or the peer first for odd seeds."""
    warmup, steps = chosen.lr_warmup, int(FASTEST * chosen.budget)
    ours_arguments = folders.ours(
        work / "run", chosen.batch_size, steps, chosen.threads,
        f"seed={seed}", f"optim.lr={chosen.lr}", f"optim.warmup={warmup}", *chosen.ours,
    )  # fmt: skip
    peer_arguments = folders.peer(
        work / "peer-run", chosen.batch_size, steps, *flags, f"--seed={seed}", f"--learning_rate={chosen.lr}",
        "--lr_scheduler=constant_with_warmup", f"--lr_warmup_steps={warmup}",
    )  # fmt: skip

    def runner(name: str, script: Path, arguments: Sequence[str], marks: Sequence[float]) -> Runner:
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.record_steps", f"--snapshots={work / name}"]
        command += [work / f"{name}.json", "0", script]
        return Runner([*command, *arguments], work / name, marks, chosen.threads, work / f"{name}.log")

    ours = runner("ours", TRAIN, ours_arguments, marks(chosen.share * chosen.budget))
    peer = runner("peer", chosen.peer_script.resolve(), peer_arguments, [chosen.budget])
    interleave([ours, peer] if seed % 2 == 0 else [peer, ours], chosen.turn, lambda line: print(line, file=sys.stderr))
    return [ours, peer]


def reached(
    evaluator: SnapshotEvaluator, snapshots: Sequence[Snapshot], frozen: Path, goal: dict[str, Any]
) -> tuple[float | None, list[dict[str, Any]]]:
    """The seconds from which on ours is as good as `goal`, None if its last isn't; and the results of the snapshots.

    Args:
        frozen: the folder of our VAE and text encoder, as the training has normalized and standardized them.
    """
    since: float | None = None
    results: list[dict[str, Any]] = []
    for snapshot in reversed(snapshots):
        found = evaluator.evaluate(snapshot.file, frozen)
        results.insert(0, {"seconds": snapshot.seconds, "step": snapshot.step, **found})
        print(f"ours, {snapshot.seconds:.0f} s, step {snapshot.step}: {found}", file=sys.stderr)
        if not as_good(found, goal):
            break
        since = snapshot.seconds
    return since, results


def main() -> None:
    """Train and evaluate for every seed, and report."""
    parser = arguments(__doc__)
    add_peer(parser)
    add = parser.add_argument
    add("--vae", type=Path, help="a trained VAE of ours, for both; without one the result means nothing")
    add(
        "--net",
        type=Path,
        required=True,
        help="folder of an in-domain CLIP, made by `ldm evaluate --data SOURCE --fit-net`",
    )
    add("--setting", choices=SETTINGS, default="C")
    add("--budget", type=float, default=3600, help="seconds of each training and seed")
    add("--share", type=float, default=1.0, help="of the budget, for our training")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0, help="the first seed; so three seeds can be run on three days")
    add("--turn", type=float, default=30, help="seconds of a training's turn")
    add("--captions", type=int, default=0, help="number of held-out captions to generate, spread evenly; 0 is all")
    add("--repeats", type=int, default=3, help="pictures of each caption")
    add("--sampling-steps", type=int, default=10)
    add(
        "--guidance-scale",
        type=float,
        nargs="+",
        default=[1.0, 3.0],
        help="each snapshot is evaluated at the one with the best rank",
    )
    add("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="settings of our training alone")
    add("--lr", type=float, default=5e-4)
    add("--lr-warmup", type=int, default=100, help="in steps; then the learning rate is constant")
    chosen = parser.parse_args()
    flags = likely_best()
    comparison = Comparison(f"{chosen.setting} times P1's quality is reached in its budget", "1/budget", target=TARGET)
    everything = read_captioned(chosen.source)
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        work: Path = chosen.out.resolve() / "time_to_quality" / str(seed)
        shutil.rmtree(work, ignore_errors=True)
        folders = build(SETTINGS[chosen.setting], chosen.source, work / "given", chosen.pictures, seed, chosen.vae)
        canary = [gemm()]
        ours, peer = train(folders, work, seed, flags, chosen)
        canary.append(gemm())
        evaluator = SnapshotEvaluator.of(folders.model, everything, chosen, work / "evaluated")
        last = peer.snapshots()[-1]
        goal = evaluator.evaluate(last.file)
        print(f"P1, {last.seconds:.0f} s, step {last.step}: {goal}", file=sys.stderr)
        seconds, results = reached(evaluator, ours.snapshots(), work / "run/frozen", goal)
        mine = {"value": chosen.budget / seconds if seconds else 0.0, "seconds": seconds, "snapshots": results}
        theirs = {"value": chosen.budget / last.seconds, "seconds": last.seconds, "step": last.step, **goal}
        for folder in (folders.model.parent, work / "ours", work / "peer", work / "run", work / "peer-run"):
            shutil.rmtree(folder)  # gigabytes; the generated pictures stay in work / "evaluated"
        comparison.pair(["ours", "peer"] if seed % 2 == 0 else ["peer", "ours"], mine, theirs, canary)
    facts = {**peer_identity(chosen.peer_script), "P1": flags, "ours": chosen.ours, "budget_seconds": chosen.budget}
    facts |= {
        "batch_size": chosen.batch_size,
        "captions": len(evaluator.prompts),
        "repeats": chosen.repeats,
        "share": chosen.share,
        "first_seed": chosen.first_seed,
        "lr": chosen.lr,
        "pictures": folders.pictures,
    }
    report("time_to_quality", [comparison], chosen.out, chosen.threads, **facts, vae_is_trained=chosen.vae is not None)


if __name__ == "__main__":
    main()
