"""What a signal does inside the loop, outside, and the second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import road

from ldm.training.signals import EXIT_CODES, deferred

PROGRAM = """
import sys, time
from ldm.training.signals import deferred, install
install()
{inside}
"""
INSIDE = """
with deferred() as received:
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
    print("received", flush=True)
    time.sleep(60)
"""
OUTSIDE = "print('ready', flush=True)\ntime.sleep(60)"
WORKER = """
from ldm.training.signals import ignore_in_worker
ignore_in_worker(0)
print("ready", flush=True)
time.sleep(1)
"""


def run(inside: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM.format(inside=inside)]
    child = subprocess.Popen(words, cwd=road.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(("number", "code"), EXIT_CODES.items())
def test_outside_of_the_loop_a_signal_leaves_with_its_code(number: signal.Signals, code: int) -> None:
    child = run(OUTSIDE)
    child.send_signal(number)
    assert child.wait(30) == code
    assert child.stderr is not None and "Traceback" not in child.stderr.read()


def test_a_second_ctrl_c_leaves_at_once() -> None:
    child = run(INSIDE)
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None and child.stdout.readline() == "received\n"
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == -signal.SIGINT  # by the kernel, whatever Python is doing


def test_a_data_worker_survives_what_is_sent_to_all() -> None:
    child = run(WORKER)
    for number in EXIT_CODES:
        child.send_signal(number)
    assert child.wait(30) == 0


@pytest.mark.parametrize("number", EXIT_CODES)
def test_inside_it_is_received_and_nothing_else(number: signal.Signals) -> None:
    before = {known: signal.getsignal(known) for known in EXIT_CODES}
    try:
        with deferred() as received:
            assert not received
            os.kill(os.getpid(), number)
            assert received and received.number == number
        assert received
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)


def test_an_error_inside_is_not_hidden_by_a_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is before


def test_exit_codes_are_documented() -> None:
    told = (Path(road.ROOT) / "docs/reliability.md").read_text("utf-8")
    for number, code in EXIT_CODES.items():
        assert f"| {number.name} | {code} |" in told
