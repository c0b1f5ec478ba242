"""Time to quality: how long ours takes to be as good as the peer is after its whole budget.

    python -m benchmarks.time_to_quality --peer-script train_text_to_image.py --vae runs/openmoji64/vae \\
        --net nets/openmoji --budget 3600 --seeds 3

The peer, at its best flags, trains for a budget of seconds, and ours for as many or fewer (--share), in turns
(benchmarks/turns.py); the clock of each begins with its process, so ours has to encode everything first. Ours leaves
its averaged weights at twenty-one moments, each 1.19 times the last. Afterwards, off the clock, both draw the held-out
captions, and one frozen feature net judges: the rank of the caption's picture among all real ones (geometric mean), and
KID. Ours is looked at from the end backwards. It has reached the peer at the earliest moment from which on it is at
least as good in both, whenever it is looked at.

What is tried on our side alone, such as another objective, is said with --ours and told in the JSON.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Comparison, Target, arguments, gemm, report
from benchmarks.judge import Judge, as_good
from benchmarks.settings import SETTINGS, Folders, build
from benchmarks.sides import TRAIN, add_peer, likely_best, script_facts
from benchmarks.turns import Runner, Snapshot, take_turns
from ldm.data.dataset import read_captioned

TARGET = Target(2.5, 10)
MOMENTS = 21
FASTEST = 10  # steps a second; the budget ends both sides before they run out of steps


def marks(budget: float) -> list[float]:
    """The seconds at which ours leaves its weights: from a thirty-second of its budget to all of it."""
    return [budget * 32 ** (i / (MOMENTS - 1) - 1) for i in range(MOMENTS)]


def train(folders: Folders, work: Path, seed: int, flags: Sequence[str], chosen: argparse.Namespace) -> list[Runner]:
    """Train both sides for the budget; ours first, or the peer for odd seeds."""
    warmup, steps = chosen.lr_warmup, int(FASTEST * chosen.budget)
    ours_words = folders.ours(
        work / "run", chosen.batch_size, steps, chosen.threads,
        f"seed={seed}", f"optim.lr={chosen.lr}", f"optim.warmup={warmup}", *chosen.ours,
    )  # fmt: skip
    peer_words = folders.peer(
        work / "peer-run", chosen.batch_size, steps, *flags, f"--seed={seed}", f"--learning_rate={chosen.lr}",
        "--lr_scheduler=constant_with_warmup", f"--lr_warmup_steps={warmup}",
    )  # fmt: skip

    def runner(name: str, script: Path, words: Sequence[str], moments: Sequence[float]) -> Runner:
        observe: list[str | Path] = [sys.executable, "-m", "benchmarks.observe", f"--snapshots={work / name}"]
        observe += [work / f"{name}.json", "0", script]
        return Runner([*observe, *words], work / name, moments, chosen.threads, work / f"{name}.log")

    ours = runner("ours", TRAIN, ours_words, marks(chosen.share * chosen.budget))
    peer = runner("peer", chosen.peer_script.resolve(), peer_words, [chosen.budget])
    take_turns([ours, peer] if seed % 2 == 0 else [peer, ours], chosen.turn, lambda line: print(line, file=sys.stderr))
    return [ours, peer]


def reached(
    judge: Judge, snapshots: Sequence[Snapshot], frozen: Path, goal: dict[str, Any]
) -> tuple[float | None, list[dict[str, Any]]]:
    """The seconds from which on ours is as good as `goal`, None if it isn't in the end; and what was seen, in order.

    Args:
        frozen: the rest of ours, its VAE and text encoder as it has normalized and standardized them.
    """
    since: float | None = None
    seen: list[dict[str, Any]] = []
    for snapshot in reversed(snapshots):
        found = judge.look(snapshot.file, frozen)
        seen.insert(0, {"seconds": snapshot.seconds, "step": snapshot.step, **found})
        print(f"ours, {snapshot.seconds:.0f} s, step {snapshot.step}: {found}", file=sys.stderr)
        if not as_good(found, goal):
            break
        since = snapshot.seconds
    return since, seen


def main() -> None:
    """Train and judge for every seed and report."""
    parser = arguments(__doc__)
    add_peer(parser)
    add = parser.add_argument
    add("--vae", type=Path, help="a trained VAE of ours, for both; without one only the machinery is tried")
    add("--net", type=Path, required=True, help="the judge: a net that `ldm evaluate --data SOURCE --fit-net` left")
    add("--setting", choices=SETTINGS, default="C")
    add("--budget", type=float, default=3600, help="seconds of training for each side and seed")
    add("--share", type=float, default=1.0, help="of the budget, that ours trains for")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0, help="the first of them; three can be spread over three days")
    add("--turn", type=float, default=30, help="seconds that a side runs before the other goes on")
    add("--captions", type=int, default=0, help="held-out captions that are drawn, spread evenly; 0 is all")
    add("--draws", type=int, default=3, help="pictures of each caption")
    add("--drawing-steps", type=int, default=10)
    add("--guidance-scale", type=float, nargs="+", default=[1.0, 3.0], help="each look takes the one of the best rank")
    add("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="settings that only our side gets")
    add("--lr", type=float, default=5e-4)
    add("--lr-warmup", type=int, default=100, help="in steps; then the learning rate stays")
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
        judge = Judge.of(folders.model, everything, chosen, work / "judged")
        last = peer.snapshots()[-1]
        goal = judge.look(last.file)
        print(f"P1, {last.seconds:.0f} s, step {last.step}: {goal}", file=sys.stderr)
        seconds, seen = reached(judge, ours.snapshots(), work / "run/frozen", goal)
        told = {"value": chosen.budget / seconds if seconds else 0.0, "seconds": seconds, "seen": seen}
        theirs = {"value": chosen.budget / last.seconds, "seconds": last.seconds, "step": last.step, **goal}
        for folder in (folders.model.parent, work / "ours", work / "peer", work / "run", work / "peer-run"):
            shutil.rmtree(folder)  # gigabytes; what was drawn stays, in work / "judged"
        comparison.pair(["ours", "peer"] if seed % 2 == 0 else ["peer", "ours"], told, theirs, canary)
    facts = {**script_facts(chosen.peer_script), "P1": flags, "ours": chosen.ours, "budget_seconds": chosen.budget}
    facts |= {
        "batch_size": chosen.batch_size,
        "captions": len(judge.asked),
        "draws": chosen.draws,
        "share": chosen.share,
        "first_seed": chosen.first_seed,
        "lr": chosen.lr,
        "pictures": folders.pictures,
    }
    report("time_to_quality", [comparison], chosen.out, chosen.threads, **facts, vae_is_trained=chosen.vae is not None)


if __name__ == "__main__":
    main()
