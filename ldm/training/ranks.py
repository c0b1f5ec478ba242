"""Work that one process does for all."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast

TICK_SECONDS = 10.0  # far below the minutes after which NCCL and gloo give a silent process up
GOING_ON, DONE, FAILED = range(3)


def while_others_wait(work: Callable[[Callable[[], None]], None]) -> None:
    """Do minutes or hours of work on rank 0; the other ranks wait without being given up.

    A collective that isn't answered within minutes ends a run, so rank 0 answers one every few seconds.

    Args:
        work: is given a function to call often.
    Raises:
        RuntimeError: on the other ranks, if the work failed.
    """
    state = PartialState()
    last = time.monotonic()

    def tell(news: int) -> int:
        return int(broadcast(torch.tensor([news], device=state.device))[0])

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last > TICK_SECONDS:
            last = time.monotonic()
            tell(GOING_ON)

    if state.is_main_process:
        try:
            work(tick)
        except Exception:  # not Ctrl-C, which ends the others, too
            tell(FAILED)
            raise
        tell(DONE)
        return
    while (news := tell(GOING_ON)) == GOING_ON:
        pass
    if news == FAILED:
        raise RuntimeError("rank 0 failed at what this process was waiting for; its message says why")
