"""A training under torchrun, whose rank 1 is killed in its first life at the step that VICTIM_STEP names."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

from ldm.cli.config import start
from ldm.training import trainer
from ldm.training.run import train

if os.environ.get("VICTIM_STEP") and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    original = trainer.Trainer.step

    def step(self: Any, n: int, parts: Any) -> Any:
        if n == int(os.environ["VICTIM_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, n, parts)

    trainer.Trainer.step = step  # type: ignore[method-assign]

if __name__ == "__main__":
    start(partial(train, os.environ["VICTIM_TASK"]), __doc__)
