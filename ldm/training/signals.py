"""How a run ends before its last step: by a signal, with everything saved, or by an error that names the remedy.

Inside the training loop a signal is received and the loop, at its next step, agrees on it with the other ranks, saves
and exits. Elsewhere (reading pictures, building the cache) nothing is newer than the last checkpoint, and the program
exits at once. A second Ctrl-C always exits at once.

| signal  | exit code | meaning |
|---------|-----------|---------|
| SIGINT  | 130       | Ctrl-C |
| SIGTERM | 143       | preempted |
| SIGUSR1 | 75        | saved, start me again (EX_TEMPFAIL of sysexits.h); what schedulers send before the time is up |
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}


class Stopped(SystemExit):
    """A signal ended the run; exits with the signal's code unless it is caught.

    Attributes:
        signal: which one.
        saved: what was saved, in words.
    """

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(EXIT_CODES[signal.Signals(number)])
        self.signal = signal.Signals(number)
        self.saved = saved


class Received:
    """The signal that was received: `number`, or 0."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C is the kernel's business
        self.number = number

    def __bool__(self) -> bool:
        return self.number != 0


def exit_now(number: int, frame: FrameType | None) -> None:
    """The handler outside of the loop. It raises nothing: a destructor that is running would swallow it."""
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: nothing was lost; run the same command again to resume\n".encode())
    os._exit(EXIT_CODES[signal.Signals(number)])


def install() -> None:
    """From now on these signals end the program with their exit codes."""
    for number in EXIT_CODES:
        signal.signal(number, exit_now)


@contextlib.contextmanager
def deferred() -> Iterator[Received]:
    """Inside, signals are received and change nothing else: what to do about one is up to the caller, after it too."""
    received = Received()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can have handlers
        yield received
        return
    before = {number: signal.signal(number, received) for number in EXIT_CODES}
    try:
        yield received
    finally:
        for number, handler in before.items():
            if not (received and number == signal.SIGINT):  # a second Ctrl-C still exits at once
                signal.signal(number, handler)


def ignore_in_worker(worker: int) -> None:
    """For DataLoader(worker_init_fn=…): what a terminal or a scheduler sends to all processes is for the main one.

    A worker that died of it would end the run before it could save.
    """
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
