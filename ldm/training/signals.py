"""How a run ends before its last step: by a signal, with everything saved, or by an error that says what to do.

Inside the training loop a signal is noted and the loop, at its next step, agrees on it with the other ranks, saves
and leaves. Elsewhere (reading pictures, building the cache, writing the VAE) there is nothing newer than the last
checkpoint, and the program leaves at once. A second Ctrl-C always leaves at once.

| signal  | exit code | meaning |
|---------|-----------|---------|
| SIGINT  | 130       | Ctrl-C |
| SIGTERM | 143       | the machine wants its place back |
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
    """A signal ended the run; leaves the program with the signal's exit code unless it is caught.

    Attributes:
        signal: which one.
        saved: what was saved, in words.
    """

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(EXIT_CODES[signal.Signals(number)])
        self.signal = signal.Signals(number)
        self.saved = saved


class Noted:
    """The signal that came, if one did: `number`, or 0."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C is the kernel's business
        self.number = number

    def __bool__(self) -> bool:
        return self.number != 0


def leave(number: int, frame: FrameType | None) -> None:
    """The handler outside of the loop. It raises nothing: a destructor that it came up in would swallow it."""
    with contextlib.suppress(OSError):
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: nothing was lost; the same command goes on from the newest checkpoint\n".encode())
    os._exit(EXIT_CODES[signal.Signals(number)])


def install() -> None:
    """From now on these signals end the program with their exit codes."""
    for number in EXIT_CODES:
        signal.signal(number, leave)


@contextlib.contextmanager
def noted() -> Iterator[Noted]:
    """Inside, signals are noted and change nothing else. One that came too late to be seen inside is obeyed after."""
    note = Noted()
    if threading.current_thread() is not threading.main_thread():  # which alone can have handlers
        yield note
        return
    before = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield note
    finally:
        for number, handler in before.items():
            if not (note and number == signal.SIGINT):  # a second Ctrl-C still leaves at once
                signal.signal(number, handler)
    if note:
        raise Stopped(note.number, "the run was complete")


def ignore_in_worker(worker: int) -> None:
    """For DataLoader(worker_init_fn=…): what a terminal or a scheduler sends to all processes is for the main one.

    A worker that died of it would take the run down before it could save.
    """
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
