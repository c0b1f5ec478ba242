"""train_ldm.py, whose rank 1 is killed in its first life at the step that VICTIM_STEP names."""

from __future__ import annotations

import os
import signal
from typing import Any

from ldm.cli.config import start
from ldm.training import trainer as loop
from train.train_ldm import main

if os.environ.get("VICTIM_STEP") and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    original = loop.Training.step

    def step(self: Any, n: int, parts: Any) -> Any:
        if n == int(os.environ["VICTIM_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, n, parts)

    loop.Training.step = step  # type: ignore[method-assign]

if __name__ == "__main__":
    start(main, __doc__)
