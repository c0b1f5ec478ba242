"""Two long trainings side by side: each runs alone for some seconds, is stopped where it is, and the other goes on.

What a machine does to one side in an hour, it does to the other. Only the seconds in which a side runs count as its
own; its averaged weights are saved, by benchmarks/observe.py, when it has had so many of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from benchmarks.harness import ROOT, environment


@dataclass(frozen=True)
class Snapshot:
    """Averaged weights, and how many seconds and steps of training made them."""

    file: Path
    seconds: float
    step: int


@dataclass
class Runner:
    """One side: a process that runs only in its turns.

    Attributes:
        command: what runs benchmarks/observe.py with --snapshots `folder`.
        marks: seconds of its own time after which a snapshot is asked for; the last one ends it.
    """

    command: Sequence[str | Path]
    folder: Path
    marks: Sequence[float]
    threads: int
    log: Path
    turns: list[tuple[float, float]] = field(default_factory=list)
    asked: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def seconds(self) -> float:
        """Its own time so far."""
        return sum(end - begin for begin, end in self.turns)

    @property
    def done(self) -> bool:
        """Whether its last snapshot is there."""
        return (self.folder / f"{len(self.marks) - 1:03d}.safetensors").exists()

    def turn(self, seconds: float) -> None:
        """Let it run alone for so long, or until it is done.

        Raises:
            SystemExit: if it ends by itself, with the end of what it said.
        """
        begin = time.monotonic()
        if self.process is None:
            self.folder.mkdir(parents=True)
            with self.log.open("wb") as out:
                self.process = subprocess.Popen(
                    [str(word) for word in self.command],
                    cwd=ROOT, env=environment(self.threads), stdout=out, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        while not self.done and (now := time.monotonic()) < begin + seconds:
            while self.asked < len(self.marks) and self.seconds + now - begin >= self.marks[self.asked]:
                (self.folder / f"want-{self.asked:03d}").touch()
                self.asked += 1
            if self.process.poll() is not None:
                said = self.log.read_text("utf-8", errors="replace").replace("\r", "\n")[-3000:]
                raise SystemExit(f"a training ended before its time was over; {self.log} ends with:\n{said}")
            time.sleep(0.05)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.turns.append((begin, time.monotonic()))

    def own_time(self, moment: float) -> float:
        """A moment of the clock that all processes share => its own seconds until then."""
        return sum(min(end, moment) - begin for begin, end in self.turns if begin < moment)

    def snapshots(self) -> list[Snapshot]:
        """What it saved of its last average, in order; a step that was asked for twice counts once."""
        found: dict[tuple[int, int], Snapshot] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                facts = opened.metadata()
            average, step = int(facts["average"]), int(facts["step"])
            found.setdefault((average, step), Snapshot(file, self.own_time(float(facts["time"])), step))
        last = max((average for average, _ in found), default=0)
        return [
            snapshot for (average, _), snapshot in sorted(found.items(), key=lambda item: item[0]) if average == last
        ]

    def end(self) -> None:
        """Kill it and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def take_turns(runners: Sequence[Runner], seconds: float, say: Callable[[str], None] = lambda _: None) -> None:
    """Run all of them to their last marks in turns; they are killed whatever happens.

    The one that runs longest has turns of so many seconds, and the others shorter ones: all end at about the same time.
    """
    longest = max(runner.marks[-1] for runner in runners)
    try:
        while not all(runner.done for runner in runners):
            for runner in runners:
                if not runner.done:
                    runner.turn(seconds * runner.marks[-1] / longest)
            say(
                ", ".join(
                    f"{runner.folder.name} {runner.seconds:.0f} s of {runner.marks[-1]:.0f}" for runner in runners
                )
            )
    finally:
        for runner in runners:
            runner.end()
