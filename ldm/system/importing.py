"""Import torch, diffusers and transformers in three quarters of the time, and leave them in an eighth.

Their 3,700 modules make a million objects, all of which stay. Python's garbage collector looks through them again and
again while they come, and finds nothing to free: a quarter of the seconds. So it rests until they are there, and then
takes them for what they are, old: else its next look at the young ones would go through all of them. When a process
ends Python looks once more, for more than a second, and then lets all of it go.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Inside, garbage waits; afterwards, collecting goes on as before, if it was on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # nobody else has objects there, which unfreezing would let out
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_on:
            gc.enable()


def leave_quickly() -> None:
    """Let this process end without a last look for garbage; for our own commands, not for other people's programs.

    What is no garbage is let go as ever. An object that only a circle of references keeps is not: nobody may count on
    its end there, and Python promises none.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Inside, transformers reports errors alone; afterwards as much as before."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def quiet_libraries() -> None:
    """Let diffusers and transformers report errors alone in our own commands; call it before they are imported.

    Their warnings concern their own authors: no torchvision, a BERT where CLIP was expected.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
