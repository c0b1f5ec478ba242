"""The drills. Each returns its figures; a drill that finds a promise broken counts it, and none stops at the first."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from world import (
    KINDS,
    SAVE_EVERY,
    STEPS,
    Board,
    Child,
    Reference,
    World,
    clean,
    hashes,
    newest_step,
    reference,
    result,
    saved_in,
)

from ldm.system.hashing import fault
from ldm.training.checkpoint import checkpoints
from ldm.training.signals import EXIT_CODES

Figures = dict[str, Any]


class Bench:
    """The world and the reference runs, each made when it is first asked for."""

    def __init__(self, home: Path, seed: int) -> None:
        self.world = World(home)
        self.chance = random.Random(seed)
        self.made: dict[tuple[str, int], Reference] = {}

    def reference(self, kind: str, processes: int = 1) -> Reference:
        if (kind, processes) not in self.made:
            self.made[kind, processes] = reference(self.world, kind, processes)
        return self.made[kind, processes]

    def compare(self, kind: str, config: Any, figures: Counter[str], processes: int = 1) -> None:
        """Add how a finished run differs from its reference."""
        expected = self.reference(kind, processes)
        wrong, total = expected.differing(config)
        found = hashes(kind, config)
        figures["losses compared"] += total
        figures["losses that differ"] += wrong
        figures["files compared"] += len(found)
        figures["files that differ"] += sum(found.get(name) != digest for name, digest in expected.hashes.items())


def sleep_until_random_moment(bench: Bench, child: Child, seconds: float, aim: str | None) -> None:
    """Sleep for a random time within so many seconds, or until `aim` begins and a random little longer."""
    if aim is None:
        until = time.monotonic() + bench.chance.uniform(0, seconds)
        while time.monotonic() < until and not child.ended():
            time.sleep(0.002)
        return
    while child.board.phase != aim and not child.ended():
        time.sleep(0.0005)
    time.sleep(bench.chance.uniform(0, 0.05))


def kills(bench: Bench, trials: int) -> Figures:
    """kill -9 at random moments, again and again until each run is through."""
    figures: Counter[str] = Counter()
    for name in ("kills inside saves", "exports lost", "hangs", "losses that differ", "files that differ"):
        figures[name] = 0
    run = 0
    while figures["kills"] < trials:
        run += 1
        kind = list(KINDS)[run % len(KINDS)]
        seconds = bench.reference(kind).seconds
        config = bench.world.recipe(kind, bench.world.home / f"kills-{run}")
        exported = Path(config.run) / result(kind)
        with clean(config):
            ended = False
            while not ended:
                had = exported.exists()
                child = bench.world.train(kind, config)
                if figures["kills"] < trials and bench.chance.random() < 0.85:
                    aim = bench.chance.choice([None, None, "saving", "exporting"])
                    sleep_until_random_moment(bench, child, seconds, aim)
                    if not child.ended():
                        phase = child.board.phase
                        child.kill()
                        figures["kills"] += 1
                        figures[f"kills while {phase}"] += 1
                        figures["kills inside saves"] += phase in ("saving", "exporting")
                code = child.wait()
                figures["hangs"] += code is None
                figures["exports lost"] += had and not exported.exists()
                if code not in (0, -signal.SIGKILL, None):
                    figures["errors"] += 1
                    print(child.words[-3000:])
                    break
                newest_step(kind, config)
                ended = code == 0
            figures["runs finished"] += ended
            if ended:
                bench.compare(kind, config, figures)
    return figures


def signals(bench: Bench, trials: int) -> Figures:
    """SIGTERM, SIGINT and SIGUSR1 at random moments: the checkpoint holds the step that was running."""
    figures: Counter[str] = Counter()
    for name in ("steps lost", "wrong exit codes", "wrong words", "hangs", "losses that differ", "files that differ"):
        figures[name] = 0
    slowest = 0.0
    aims = [None, None, "start", "cache", "training", "saving", "exporting", "evaluating", "previewing"]
    run = 0
    while figures["trials"] < trials:
        run += 1
        kind = list(KINDS)[run % len(KINDS)]
        config = bench.world.recipe(kind, bench.world.home / f"signals-{run}")
        with clean(config):
            child = bench.world.train(kind, config)
            aim = bench.chance.choice(aims)
            sleep_until_random_moment(bench, child, bench.reference(kind).seconds, aim)
            running, phase, sent = child.board.step, child.board.phase, bench.chance.choice(list(EXIT_CODES))
            before, ended = time.monotonic(), child.ended()
            child.kill(sent)
            code = child.wait()
            slowest = max(slowest, time.monotonic() - before)
            figures[f"while {phase}"] += not ended
            figures["hangs"] += code is None
            # before `start` has set its handlers the signal's own default ends the process: nothing is lost yet
            right = (EXIT_CODES[sent], -sent if running == 0 else 0 if running == STEPS else None)
            if not ended and code not in right:
                figures["wrong exit codes"] += 1
                print(sent.name, phase, running, code, child.words[-3000:])
            saved = newest_step(kind, config)
            figures["steps lost"] += max(0, running - saved)
            if code == EXIT_CODES[sent] and running and not ended:
                right_words = [f"{sent.name}: step {saved} of {STEPS} is saved in"]
                if saved == STEPS:  # between the loop's end and the program's, where there is no step to name
                    right_words.append(f"{sent.name}: nothing was lost; run the same command again to resume")
                if not any(words in child.words for words in right_words):
                    figures["wrong words"] += 1
                    print(kind, sent.name, phase, running, saved, child.words[-3000:])
            figures["trials"] += not ended
            child = bench.world.train(kind, config)
            figures["hangs"] += child.wait() is None
            bench.compare(kind, config, figures)
    return {**figures, "seconds to leave, at most": round(slowest, 2)}


def damage(bench: Bench, files: int | None) -> Figures:
    """Each file of the newest checkpoint truncated, emptied, bit-flipped, removed: the one before is used."""
    figures: Counter[str] = Counter()
    figures["undetected"] = figures["losses that differ"] = figures["files that differ"] = 0
    for kind in ("cached", "vae", "classifier"):
        whole = bench.world.recipe(kind, bench.world.home / f"reference-{kind}-1")
        bench.reference(kind)
        last = checkpoints(saved_in(kind, whole))[-1]
        cases = [(file.name, how) for file in sorted(last.iterdir()) for how in DAMAGES]
        if files is not None:
            cases = bench.chance.sample(cases, files)
        for name, how in cases:
            config = bench.world.recipe(kind, bench.world.home / f"damage-{kind}-{name}-{how}")
            with clean(config):
                shutil.copytree(whole.run, config.run)
                folder = saved_in(kind, config)
                DAMAGES[how](folder / last.name / name, bench.chance)
                figures["undetected"] += fault(folder / last.name) is None
                child = bench.world.train(kind, config)
                figures["resumes that failed"] += child.wait() != 0
                set_aside = list(folder.glob(f"{last.name}.broken-*"))
                told = (
                    f"{last.name} is broken: " in child.words and f"step {STEPS - SAVE_EVERY} of {STEPS}" in child.words
                )
                figures["not told and set aside"] += not (len(set_aside) == 1 and told)
                figures["trials"] += 1
                bench.compare(kind, config, figures)
    return figures


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(1, path.stat().st_size)])


DAMAGES = {
    "truncated": truncate,
    "emptied": lambda path, chance: path.write_bytes(b""),
    "bit flipped": flip,
    "removed": lambda path, chance: path.unlink(),
}


RESTARTS = 4  # of a finished run of two ranks; their ends used to hang now and then


def lost_ranks(bench: Bench, trials: int) -> Figures:
    """Rank 1 of two gloo processes killed at a random moment; the other leaves, and both go on exactly."""
    figures: Counter[str] = Counter()
    for name in ("survivors that stayed", "survivors that left with 0", "losses that differ", "files that differ"):
        figures[name] = 0
    slowest, run = 0.0, 0
    while figures["trials"] < trials:
        run += 1
        kind = ("classifier", "cached", "vae", "cached")[run % 4]
        config = bench.world.recipe(kind, bench.world.home / f"ranks-{run}")
        seconds = bench.reference(kind, 2).seconds
        with clean(config):
            first, second = bench.world.train_two(kind, config)
            while second.board.step == 0 and not second.ended():
                time.sleep(0.002)
            sleep_until_random_moment(bench, second, 0.6 * seconds, None)
            second.kill()
            before = time.monotonic()
            code = first.wait(60)
            took = time.monotonic() - before
            killed = second.wait() == -signal.SIGKILL
            whole = code == 0 and newest_step(kind, config) == STEPS  # nothing was left for the lost rank to do
            if killed and not whole:
                slowest = max(slowest, took)
                figures["survivors that stayed"] += code is None or took > 10
                figures["survivors that left with 0"] += code == 0
                figures[f"survivors that left with {code}"] += code != 0
                figures["trials"] += 1
            for _ in range(1 + RESTARTS):  # to its end, then finished, which leaves at once
                for child in bench.world.train_two(kind, config):
                    if child.wait(60) != 0:
                        figures["errors"] += 1
                        print(child.words[-3000:])
            bench.compare(kind, config, figures, processes=2)
    return {**figures, "seconds until the survivor left, at most": round(slowest, 2)}


__all__ = ["Bench", "Board", "damage", "kills", "lost_ranks", "signals"]
