"""Two long trainings, interleaved: each runs alone for some seconds, is paused, and the other continues.

So a change of the machine's speed within an hour affects both. Only the seconds in which a training runs count as its
own. benchmarks/record_steps.py saves its averaged weights at given numbers of such seconds.
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
    """Averaged weights, and the seconds and steps of training until then."""

    file: Path
    seconds: float
    step: int


@dataclass
class Runner:
    """A training process that runs only in its turns.

    Attributes:
        command: benchmarks/record_steps.py with --snapshots `folder`.
        marks: seconds of its own time at which a snapshot is requested; the last one ends it.
        turns: begin and end of each turn.
        requested: number of snapshots requested so far.
    """

    command: Sequence[str | Path]
    folder: Path
    marks: Sequence[float]
    threads: int
    log: Path
    turns: list[tuple[float, float]] = field(default_factory=list)
    requested: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def seconds(self) -> float:
        """Its own time so far."""
        return sum(end - begin for begin, end in self.turns)

    @property
    def done(self) -> bool:
        """Whether its last snapshot exists."""
        return (self.folder / f"{len(self.marks) - 1:03d}.safetensors").exists()

    def turn(self, seconds: float) -> None:
        """Run it for this long, or until it is done.

        Raises:
            SystemExit: if the process ends by itself, with the end of its log.
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
            while self.requested < len(self.marks) and self.seconds + now - begin >= self.marks[self.requested]:
                (self.folder / f"want-{self.requested:03d}").touch()
                self.requested += 1
            if self.process.poll() is not None:
                output = self.log.read_text("utf-8", errors="replace").replace("\r", "\n")[-3000:]
                raise SystemExit(f"a training ended too early; {self.log} ends with:\n{output}")
            time.sleep(0.05)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.turns.append((begin, time.monotonic()))

    def own_time(self, moment: float) -> float:
        """A time of the monotonic clock, which all processes share => its own seconds until then."""
        return sum(min(end, moment) - begin for begin, end in self.turns if begin < moment)

    def snapshots(self) -> list[Snapshot]:
        """The snapshots of its last average, in order; of several at the same step, the first."""
        found: dict[tuple[int, int], Snapshot] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            average, step = int(metadata["average"]), int(metadata["step"])
            found.setdefault((average, step), Snapshot(file, self.own_time(float(metadata["time"])), step))
        last = max((average for average, _ in found), default=0)
        return [
            snapshot for (average, _), snapshot in sorted(found.items(), key=lambda item: item[0]) if average == last
        ]

    def kill(self) -> None:
        """Kill it and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def interleave(runners: Sequence[Runner], seconds: float, log: Callable[[str], None] = lambda _: None) -> None:
    """Run all of them in turns to their last marks, then kill them, also after an exception.

    The longest one has turns of `seconds`, the others shorter ones, so that all end at about the same time.
    """
    longest = max(runner.marks[-1] for runner in runners)
    try:
        while not all(runner.done for runner in runners):
            for runner in runners:
                if not runner.done:
                    runner.turn(seconds * runner.marks[-1] / longest)
            log(
                ", ".join(
                    f"{runner.folder.name} {runner.seconds:.0f} s of {runner.marks[-1]:.0f}" for runner in runners
                )
            )
    finally:
        for runner in runners:
            runner.kill()
